"""Instruction templates: (record, template, random stream) -> instruction and target. Pure functions of their arguments.

A template is a line of text with the fields of a record in braces; docs/data.md, "Templates", lists them. Training templates
(`datasets/templates/*.yaml`) and the evaluation prompts of the dataset cards are filled by one function, `render_prompt`.

Square brackets around a part that names a field make it optional: `[OCR tokens: {ocr_tokens}. ]{question}` leaves out all
between the brackets, spaces too, for a record without OCR tokens. A field outside brackets must be there. Brackets without
a field, and braces around anything but a small word, are plain text. What a record holds is put in verbatim, never read as
a template.
"""

import re
import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from instructblip.config.validate import read_sections
from instructblip.data.card_defaults import is_template_file
from instructblip.data.records import Record
from instructblip.errors import UserError
from instructblip.files import shipped

TEMPLATE_FOLDER = shipped("datasets") / "templates"

FIELDS = ("question", "answer", "choices", "options", "context", "ocr_tokens", "history", "caption")
MAX_OCR_TOKENS = 30
# What a set teaches to write -> the field that each of its templates must show, and those that would give it away.
NEEDED_FIELD = {"answer": "question", "choice": "question", "question": "answer", "caption": None, "class": None}
TELLING_FIELDS = {
    "answer": ("answer",),
    "choice": ("answer",),
    "question": ("question",),
    "caption": ("caption", "answer"),
    "class": ("answer",),
}

_FIELD = re.compile(r"\{([a-z_]+)\}")
_WORD = re.compile(r"\S+")
_PART = re.compile(r"\[([^\[\]]*\{[a-z_]+\}[^\[\]]*)\]")


@dataclass(frozen=True)
class TemplateSet:
    """A named list of instruction templates.

    Attributes:
        name, task_group: the file's name, and the paper's group of tasks it is for.
        templates: the texts to draw from, evenly.
        target: what the model is to write: an `answer` (drawn by weight), the right `choice` in its own words, the
            `question` (then the instruction holds the drawn answer), a `caption`, or a `class`: an answer to what the
            template itself may ask.
        max_ocr_tokens: how many of a record's OCR tokens are shown.
    """

    name: str
    task_group: str
    templates: tuple[str, ...]
    target: str = "answer"
    max_ocr_tokens: int = MAX_OCR_TOKENS


# --- rendering -------------------------------------------------------------------------------------------------------


def fields_of(template: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The fields that a template needs, and those that it names in optional parts only.

    Raises:
        ValueError: a field that no record has; the message names it.
    """
    needed: list[str] = []
    optional: list[str] = []
    for text, is_optional in _parts(template):
        (optional if is_optional else needed).extend(_FIELD.findall(text))
    return tuple(dict.fromkeys(needed)), tuple(name for name in dict.fromkeys(optional) if name not in needed)


def render_prompt(
    template: str,
    record: Record,
    *,
    answer: str | None = None,
    max_ocr_tokens: int = MAX_OCR_TOKENS,
    may_be_empty: Collection[str] = (),
) -> str:
    """Fill a template from a record.

    Args:
        answer: what `{answer}` stands for; None: the record's most usual answer.
        may_be_empty: fields that count as there even where the record has none of them.

    Raises:
        ValueError: the record lacks what the template asks for outside brackets, or has more than 26 choices to letter.
    """

    def fill(match: re.Match[str]) -> str:
        return _field_text(match[1], record, answer, max_ocr_tokens)

    filled = []
    for text, is_optional in _parts(template):
        missing = [
            name
            for name in _FIELD.findall(text)
            if name not in may_be_empty and not _field_text(name, record, answer, max_ocr_tokens)
        ]
        if missing and not is_optional:
            raise ValueError(f"record {record.id} has no {missing[0]} for the template {template!r}")
        if not missing:
            filled.append(_FIELD.sub(fill, text))
    return "".join(filled)


def render_training(record: Record, templates: TemplateSet, random: np.random.Generator) -> tuple[str, str, str]:
    """Draw a template and a target for a training sample; return (instruction, target, template).

    Answers are drawn by their weights, so that a question with several accepted answers teaches all of them; captions
    alike. Two numbers are drawn at most: the template's, then the answer's or caption's.

    Raises:
        ValueError: the record has no answer (choice, question, caption) to teach, as in a test split.
    """
    template = templates.templates[int(random.integers(len(templates.templates)))]
    answer, target = _draw_target(record, templates.target, random)
    instruction = render_prompt(template, record, answer=answer, max_ocr_tokens=templates.max_ocr_tokens)
    return instruction, target, template


def cut_prefix(target: str, random: np.random.Generator) -> tuple[str, str]:
    """A text's beginning and the rest, for prefix language modelling (BLIP-2, section 3.2): (prefix, suffix).

    The cut is drawn evenly between the end of the first word and the middle: the authors' rule (LAVIS, issue 139), with
    words for tokens. A text of one word has no prefix.
    """
    words = list(_WORD.finditer(target))
    if len(words) < 2:
        return "", target
    count = int(random.integers(1, len(words) // 2, endpoint=True))
    return target[: words[count - 1].end()], target[words[count].start() :]


def answer_shares(record: Record) -> list[tuple[str, float]]:
    """All answers that people gave to a question, each with the share of those who gave it, most usual first."""
    weights = record.answer_weights or [1.0] * len(record.answers)
    people = record.annotators or sum(weights)
    return [(answer, weight / people) for answer, weight in zip(record.answers, weights, strict=True)]


def _draw_target(record: Record, target: str, random: np.random.Generator) -> tuple[str | None, str]:
    """The answer that the instruction may show, and the text that the model is to write."""
    if target == "choice":
        if record.label is None or not 0 <= record.label < len(record.choices):
            raise ValueError(f"record {record.id} has no right choice and cannot be trained on")
        return None, record.choices[record.label]
    if target == "caption" and record.captions:
        return None, record.captions[int(random.choice(len(record.captions)))]
    if not record.answers:
        raise ValueError(f"record {record.id} has no answer and cannot be trained on")
    weights = np.array(record.answer_weights or [1.0] * len(record.answers))
    if not weights.any():
        raise ValueError(f"record {record.id} has no answer of a weight above 0 and cannot be trained on")
    answer = record.answers[int(random.choice(len(record.answers), p=weights / weights.sum()))]
    if target != "question":
        return None, answer
    if not record.question:
        raise ValueError(f"record {record.id} has no question and cannot be trained on")
    return answer, record.question


@lru_cache(maxsize=4096)
def _parts(template: str) -> tuple[tuple[str, bool], ...]:
    """The template cut at its optional parts: (text without its brackets, whether it is optional)."""
    for name in _FIELD.findall(template):
        if name not in FIELDS:
            raise ValueError(f"template {template!r} names an unknown field {name!r}; known: {', '.join(FIELDS)}")
    pieces = _PART.split(template)  # outside, inside, outside, inside, ..., outside
    return tuple((text, place % 2 == 1) for place, text in enumerate(pieces) if text)


def _field_text(name: str, record: Record, answer: str | None, max_ocr_tokens: int) -> str:
    if name == "answer" and answer is not None:
        return answer
    return _TEXT_OF_FIELD[name](record, max_ocr_tokens)


def _lettered(choices: tuple[str, ...], form: str, between: str) -> str:
    if len(choices) > len(string.ascii_lowercase):
        raise ValueError(f"{len(choices)} choices are too many to be lettered (a) to (z)")
    letters = string.ascii_lowercase if "(" in form else string.ascii_uppercase
    return between.join(form.format(*pair) for pair in zip(letters, choices, strict=False))


_TEXT_OF_FIELD: Mapping[str, Callable[[Record, int], str]] = {
    "question": lambda record, _: record.question or "",
    "answer": lambda record, _: record.answers[0] if record.answers else "",
    "choices": lambda record, _: _lettered(record.choices, "({}) {}", " "),
    "options": lambda record, _: _lettered(record.choices, "{}. {}", "\n"),
    "context": lambda record, _: record.context or "",
    "ocr_tokens": lambda record, count: ", ".join(record.ocr_tokens[:count]),
    "history": lambda record, _: "\n".join(f"Q: {question} A: {answer}" for question, answer in record.history),
    "caption": lambda record, _: record.captions[0] if record.captions else "",
}


# --- reading sets ----------------------------------------------------------------------------------------------------


def load_templates(name_or_path: str, folder: Path = TEMPLATE_FOLDER) -> TemplateSet:
    """Read `datasets/templates/<name>.yaml`, or a set of one's own by its path.

    Its keys: `task_group`; `templates`, a list of texts, or `templates_of`, the name of another set whose texts it takes
    with `prefix` before each; `target` and `max_ocr_tokens` as in `TemplateSet`.

    Raises:
        UserError: no such set, not YAML, an unknown key, no templates, a template without the field it needs, with one
            that gives the target away, or with one that no record has.
    """
    path = Path(name_or_path) if is_template_file(name_or_path) else folder / f"{name_or_path}.yaml"
    content = _read_set(path)
    templates = content.get("templates")
    if "templates_of" in content:
        if templates is not None:
            raise UserError(f"{path} has both templates and templates_of; keep one of them")
        if "templates_of" in _read_set(folder / f"{content['templates_of']}.yaml"):
            raise UserError(f"{path}: templates_of must name a set with templates of its own")
        other = load_templates(str(content["templates_of"]), folder)
        content = {"target": other.target, **content}
        templates = [str(content.get("prefix", "")) + text for text in other.templates]
    if not isinstance(templates, list) or not templates or not all(isinstance(text, str) for text in templates):
        raise UserError(f"{path} needs a list `templates` of strings; put those in quotes that YAML reads otherwise")
    target = content.get("target", "answer")
    if not isinstance(target, str) or target not in NEEDED_FIELD:
        raise UserError(f"{path}: target is {target!r}; choose one of: {', '.join(NEEDED_FIELD)}")
    for text in templates:
        _check_template(text, target, path)
    count = content.get("max_ocr_tokens", MAX_OCR_TOKENS)
    if type(count) is not int or count < 1:
        raise UserError(f"{path}: max_ocr_tokens must be a whole number, 1 or more, not {count!r}")
    return TemplateSet(path.stem, str(content.get("task_group", "")), tuple(templates), target, count)


_SET_KEYS = ("name", "task_group", "target", "templates", "templates_of", "prefix", "max_ocr_tokens")


def _read_set(path: Path) -> dict[str, Any]:
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise UserError(f"there is no template set {path.stem!r} in {path.parent}; choose one of: {known or 'none'}")
    content = read_sections(path, "template set")
    if unknown := [key for key in content if key not in _SET_KEYS]:
        raise UserError(f"{path}: unknown key {unknown[0]!r}; known: {', '.join(_SET_KEYS)}")
    if "prefix" in content and "templates_of" not in content:
        raise UserError(f"{path}: prefix belongs to templates_of; write it into the templates")
    return content


def _check_template(text: str, target: str, path: Path) -> None:
    try:
        needed, optional = fields_of(text)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    field = NEEDED_FIELD[target]
    if field is not None and field not in needed:
        raise UserError(f"{path}: template {text!r} lacks the placeholder {{{field}}}; add it, or remove the template")
    if telling := [name for name in (*needed, *optional) if name in TELLING_FIELDS[target]]:
        raise UserError(f"{path}: template {text!r} gives away the target by {{{telling[0]}}}; remove that")
