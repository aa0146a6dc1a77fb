"""Instruction templates: (record, template) -> instruction and target. Pure functions of their arguments."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from instructblip.data.sample import Record
from instructblip.errors import UserError

TEMPLATE_FOLDER = Path(__file__).parents[2] / "datasets" / "templates"


@dataclass(frozen=True)
class TemplateSet:
    """A named list of instruction templates with the placeholder `{question}`."""

    name: str
    task_group: str
    templates: tuple[str, ...]


def load_templates(name: str, folder: Path = TEMPLATE_FOLDER) -> TemplateSet:
    """Read `datasets/templates/<name>.yaml`.

    Raises:
        UserError: no such set, not YAML, no templates, or a template without its placeholder.
    """
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise UserError(f"there is no template set {name!r} in {folder}; choose one of: {known}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    templates = content.get("templates") if isinstance(content, dict) else None
    if not templates or not all(isinstance(text, str) for text in templates):
        raise UserError(f"{path} needs a list `templates` of strings; put those in quotes that YAML reads otherwise")
    for text in templates:
        if "{question}" not in text:
            raise UserError(
                f"{path}: template {text!r} lacks the placeholder {{question}}; add it, or remove the template"
            )
    return TemplateSet(name, str(content.get("task_group", "")), tuple(templates))


def render_prompt(template: str, record: Record) -> str:
    """Fill a template from a record.

    Raises:
        ValueError: the record lacks what the template asks for.
    """
    if record.question is None:
        raise ValueError(f"record {record.id} has no question for the template {template!r}")
    return template.replace("{question}", record.question)


def render_training(record: Record, templates: TemplateSet, random: np.random.Generator) -> tuple[str, str, str]:
    """Draw a template and an answer for a training sample; return (instruction, target, template).

    Answers are drawn by their weights, so that a question with several accepted answers teaches all of them.

    Raises:
        ValueError: the record has no answer, as in a test split.
    """
    if not record.answers:
        raise ValueError(f"record {record.id} has no answer and cannot be trained on")
    template = templates.templates[int(random.integers(len(templates.templates)))]
    weights = np.array(record.answer_weights or [1.0] * len(record.answers))
    answer = record.answers[int(random.choice(len(record.answers), p=weights / weights.sum()))]
    return render_prompt(template, record), answer, template
