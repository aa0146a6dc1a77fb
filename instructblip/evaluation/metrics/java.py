"""The two Java programs of the COCO caption scorers, out of the package pycocoevalcap: PTBTokenizer and METEOR.

Both are called directly: the package's own wrappers write beside the installed jar, shift captions when one holds a line
break, and take the machine's locale for their encoding.
"""

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NoReturn

from instructblip.errors import UserError

_PACKAGE = "pycocoevalcap"
_TOKENIZER_JAR = Path("tokenizer", "stanford-corenlp-3.4.1.jar")
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
