"""Penn Treebank tokenisation of captions without Java, near to Stanford's PTBTokenizer.

The rules were found by comparing tokens with those of the Java program (CoreNLP 3.4.1). Punctuation left out, they differ
in none of 2,700 captions, questions and explanations of public data sets, in 0.9% of 4,000 lines of software documentation
(file names, mark-up) and in 0.5% of 12,000 lines of randomly joined words and marks. The CIDEr of the test vectors is the
same to the last digit. Scores to be reported should still use the Java program (`ptb_tokenize`), as `cider` does by
itself where it can run.

At each place the rule that matches furthest wins, the first of equals, as in the lexer of the original. What a rule
matches behind its group `t` counts for the length but is left to the next token.
"""

import importlib.util
import re
import shutil
import subprocess
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NoReturn

from instructblip.errors import UserError

_L = "(?:[^\\W_\\d\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u218b\u2460-\u24ff]|[\u0300-\u036f])"  # a letter
_A = f"(?:{_L}|\\d)"
_Q = "['\u2019]"
_THING = f"{_A}+(?:[-_\u2010\u2011](?:[dol]{_Q}(?={_A}))?{_A}+)*"  # a word of letters, digits and inner hyphens
_CLITIC = f"(?:{_Q}(?:[msd]|re|ve|ll)(?!{_L})|\u2019s)"
_ABBREVIATIONS = """
    adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bhd bldg blvd brig bros calif capt cf cie cmdr co
    col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov govs hon
    inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont
    mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte ppty pres prof profs pte ptes pty ptys pvt rd rep
    reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs treas tue tues univ va vs vt wed
    wis wisc wm wyo
"""
_STATES = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"  # abbreviations only with a capital
_BEFORE_NUMBERS = "art|ca|figs?|nos?|op|pp|prop"  # abbreviations only where a number follows
_STARTERS = """
    a about according additionally after an as at but earlier he her here however if in it last many more mr now once one
    other our she since so some such that the their then there these they this we what when while yet you
"""
_NEW_SENTENCE = f"\\s(?=(?-i:[A-Z]))(?:{'|'.join(_STARTERS.split())})\\s"  # before it a letter's period is a full stop
_RULES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # mark-up, addresses, names on social media
        r"</?[a-z!?][\w:.-]*(?: [\w:.-]+=(?:\"[^\"<>]*\"|'[^'<>]*'))* */?>",
        r"&(?:amp|lt|gt|quot|nbsp|apos|#\d+);",
        r"(?:https?://|www\.)[^\s<>|\"(){}]*[^\s<>|\".!?,;:(){}'-]|(?:[\w-]+\.)+(?:com|net|org|edu)(?![a-z0-9])",
        r"<?[a-z0-9][^\s\"<>|(){}]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.]+>?",
        r"@[a-z_][a-z0-9_]*",
        f"#{_L}+",
        # contractions
        f"(?P<t>can)not(?!{_A})|(?P<g>gon|wan)na(?!{_A})|(?P<o>got)ta(?!{_A})|(?P<m>lem|gim)me(?!{_A})",
        f"(?P<t>{_Q}t)(?:is|was)(?!{_A})",
        f"(?P<t>more){_Q}n(?!{_A})",
        f"(?P<t>[a-z]*[a-mo-z])n{_Q}t",
        f"n{_Q}t(?!{_L})",
        f"(?P<t>{_L}{_A}*){_CLITIC}",
        f"(?P<t>{_THING}){_CLITIC}",
        _CLITIC,
        # words with an apostrophe
        f"{_Q}n{_Q}|{_Q}n(?!{_A})|{_Q}(?:em|till?|cause)|{_Q}[2-9]0s|{_Q}\\d\\d(?=[\\s.,;:?!)])|(?P<t>y{_Q}){_L}",
        f"[ldj]{_Q}|(?:dunkin|somethin|ol){_Q}",
        f"(?:[dol]{_Q}{_A}{{2,}}|n{_Q}{_L}{{2,}})(?:-{_A}+)*",
        f"(?-i:[A-HJ-XZ]{_Q}{_L}{{2,}}|{_L}+[aeiouyAEIOUY]{_Q}[aeiouA-Z]{_L}*)",
        f"c{_Q}mon|c{_Q}est|nor{_Q}easter|e{_Q}er|s{_Q}mores|ev{_Q}ry|li{_Q}l|nat{_Q}l|cont{_Q}d",
        # abbreviations
        f"(?:{'|'.join(_ABBREVIATIONS.split())}|(?-i:{_STATES}|{_STATES.upper()}))\\.",
        f"{_L}\\.(?!{_NEW_SENTENCE})",
        f"(?P<t>(?:{_BEFORE_NUMBERS})\\.)(?:\\s?\\d|[,;!])",
        r"[a-z](?:\.[a-z])+\.?(?![a-z])|ph\.d\.?|(?-i:[A-Z]+&[A-Z]+)|w/o(?!\w)",
        f"{_L}{_A}*(?:[.!?]{_L}{_A}*)+(?:-{_A}+)*|(?:[a-z]\\.){{2,}}(?:-{_A}+)+",
        # numbers
        r"[-+]?\d*(?:[.,:]\d+)+|[-+]?\d+(?: \d+/\d+)?",
        r"\(\d{2,3}\)[ -]?\d{3,4}[ -]?\d{3,5}|\d{3,4}[ -]\d{3,4}[ -]\d{3,5}",
        f"\\d+(?:[.,]\\d+)+{_A}*(?:-{_A}+)+",
        # words and marks
        _THING,
        f"{_A}+(?:-{_A}+)*(?:/{_A}+(?:-{_A}+)*){{1,2}}",
        r"[<>]?[:;=]['o-]?[()dp\]](?!\w)|[-^~][_.][-^~](?!\w)|:3(?!\w)|[ot-]_[ot-]",
        r"\.\.\.|\. \. \.|[?!]+|-{5,}|-{2,4}|#{2,}|_{2,}|\*{2,}|``|''",
    )
]
_PLAIN_WORD = re.compile(r"(?!(?:cannot|gonna|wanna|gotta|lemme|gimme)\\s)[a-z]+(?=\\s)", re.IGNORECASE)
_LOOKAHEAD = 20  # characters of the next caption that may matter
_UNSEEN = re.compile("[\u00ad\ufeff]")  # nothing to the tokenizer, not even a break
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SYMBOLS = {
    **_BRACKETS,
    **{"\u00bd": "1/2", "\u00bc": "1/4", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"},
    **{"\u00a3": "#", "\u20ac": "$", "\u00a2": "cents", "\u2026": "...", "\u2013": "--", "\u2014": "--"},
    **dict.fromkeys('"\u201c\u201d\u00ab\u00bb', "''"),
    **dict.fromkeys("\u2018\u2019\u2039\u203a", "'"),
    **{"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&nbsp;": "", "&apos;": "'", ". . .": "..."},
}


def tokenize(captions: Sequence[str]) -> list[list[str]]:
    """Lower-cased tokens of each caption, punctuation included; a space within a token is a no-break space.

    As in the original, the start of the next caption decides whether a period at the end of one belongs to its letter
    ("plan B." is a sentence's end before "The").
    """
    texts = [" ".join("".join(map(_seen, _UNSEEN.sub("", caption))).split()) for caption in captions]
    return [_tokens(text, following) for text, following in zip(texts, [*texts[1:], ""], strict=True)]


def _tokens(caption: str, following: str) -> list[str]:
    text = f"{caption}\n{following[:_LOOKAHEAD]} "
    tokens = []
    place = 0
    while place < len(caption):
        plain = _PLAIN_WORD.match(text, place)
        end = plain.end() if plain else _longest(text, place)
        token = _normalized(text[place:end])
        if token:
            tokens.append(token)
        place = end + text.startswith(" ", end)
    return tokens


def _longest(text: str, place: int) -> int:
    """Where the token at `place` ends."""
    furthest, end = place, place + 1
    for rule in _RULES:
        match = rule.match(text, place)
        if match and match.end() > furthest:
            group = match.lastgroup
            furthest, end = match.end(), match.end(group) if group else match.end()
    return end


def _normalized(token: str) -> str:
    token = _SYMBOLS.get(token, token)
    if token != ":]":
        token = "".join(_BRACKETS.get(character, character) for character in token)
    if len(token) <= 4:  # clitics: 's, 're, n't
        plain = token.replace("\u2019", "'")
        if re.fullmatch("'(?:[msdt]|re|ve|ll)|n't", plain, re.IGNORECASE):
            token = plain
    if set(token) == {"-"} and 2 <= len(token) <= 4:
        token = "--"
    return token.replace(" ", "\u00a0").lower()


def _seen(character: str) -> str:
    """The character, or a space for one that the tokenizer passes over."""
    category = unicodedata.category(character)
    return " " if ord(character) > 0xFFFF or category in ("Cc", "Cf", "Nl", "Co", "Cn", "Zs") else character


_PACKAGE = "pycocoevalcap"
_TOKENIZER_JAR = Path("tokenizer", "stanford-corenlp-3.4.1.jar")


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """METEOR 1.5 of tokenised captions, as the COCO scorers run it: over all, and of each.

    Denkowski and Lavie, "Meteor Universal", WMT 2014; English, with `-norm`.

    Raises:
        UserError: Java or the package is missing, or the program failed.
    """
    command = ["java", *_UTF8, "-Xmx2G", "-jar", str(_jar(_METEOR_JAR)), "-", "-", "-stdio", "-l", "en", "-norm"]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        ) as program,
    ):
        assert program.stdin is not None and program.stdout is not None
        try:
            statistics = [
                _ask(program.stdin, program.stdout, _meteor_line(prediction, given))
                for prediction, given in zip(predictions, references, strict=True)
            ]
            answers = [_ask(program.stdin, program.stdout, "EVAL ||| " + " ||| ".join(statistics))]
            answers += [program.stdout.readline() for _ in predictions]
            scores = [float(answer) for answer in answers]
        except (ValueError, BrokenPipeError) as error:
            program.kill()
            errors.seek(0)
            _fail("METEOR", errors.read(), str(error))
        program.stdin.close()
    return scores[-1], scores[:-1]


_METEOR_JAR = Path("meteor", "meteor-1.5.jar")
_UTF8 = ("-Dfile.encoding=UTF-8", "-Dsun.stdout.encoding=UTF-8", "-Dstdout.encoding=UTF-8")
_LINE_BREAKS = re.compile("[\n\r\v\f\u2028\u2029]")  # each would end a caption in the Java tokenizer


def missing() -> str | None:
    """What keeps the Java programs from running, or None."""
    if shutil.which("java") is None:
        return "no java on the PATH"
    if importlib.util.find_spec(_PACKAGE) is None:
        return f"the package {_PACKAGE} is not installed"
    return None


def ptb_tokenize(captions: Sequence[str]) -> list[list[str]]:
    """All tokens of each caption by Stanford CoreNLP 3.4.1's PTBTokenizer, lower-cased, punctuation included.

    Raises:
        UserError: Java or the package is missing, or the program failed.
    """
    jar = _jar(_TOKENIZER_JAR)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "captions.txt")
        text.write_bytes("".join(_LINE_BREAKS.sub(" ", caption) + "\n" for caption in captions).encode())
        program = ["java", *_UTF8, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        done = subprocess.run([*program, "-preserveLines", "-lowerCase", str(text)], capture_output=True, check=False)
    lines = done.stdout.decode().split("\n")[:-1]
    if done.returncode != 0 or len(lines) != len(captions):
        _fail("PTBTokenizer", done.stderr, f"{len(lines)} lines came back for {len(captions)} captions")
    return [line.rstrip().split(" ") for line in lines]


def _meteor_line(prediction: str, references: Sequence[str]) -> str:
    texts = [text.replace("|||", "").replace("  ", " ") for text in (*references, prediction)]
    return " ||| ".join(("SCORE", *texts))


def _ask(program: IO[str], answers: IO[str], line: str) -> str:
    program.write(line + "\n")
    program.flush()
    return answers.readline().strip()


def _jar(place: Path) -> Path:
    reason = missing()
    if reason is not None:
        raise UserError(
            f"the Java caption scorers cannot run: {reason}; install a Java runtime and `pip install {_PACKAGE}`, or "
            "leave the tokenizer at auto"
        )
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / place


def _fail(name: str, stderr: bytes, otherwise: str) -> NoReturn:
    lines = stderr.decode(errors="replace").strip().splitlines()
    raise UserError(f"{name} (Java) failed: {lines[-1] if lines else otherwise}; see that java -version is 8 or newer")
