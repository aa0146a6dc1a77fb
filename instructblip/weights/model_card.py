"""A model card (README.md) for the Hugging Face hub: what a model is made of, trained on and scored, and on which terms."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from instructblip.config.schema import LLMConfig, ModelKind, SourcesConfig, VisionConfig
from instructblip.data.cards import Card, OwnCard, load_card
from instructblip.data.trained_on import is_trained_on, run_mixture
from instructblip.errors import UserError
from instructblip.fetch.parts import recorded_licence, sources
from instructblip.files import read_json
from instructblip.models.fingerprint import fingerprint_tensors
from instructblip.weights.load import LoadedModel, Source, is_hub_id

CARD = "README.md"
# What the hub lists a model under.
PIPELINE_TAGS: dict[ModelKind, str] = {
    "instructblip": "image-text-to-text",
    "blip2": "image-text-to-text",
    "blip2_stage1": "zero-shot-image-classification",
    "blip_caption": "image-to-text",
    "blip_vqa": "visual-question-answering",
    "blip_retrieval": "zero-shot-image-classification",
    "blip_pretrain": "zero-shot-image-classification",
}
_UNSTATED = "not stated"
_AGAIN = "give the results of an evaluation of this model: --results FOLDER"


class Part(NamedTuple):
    """A part whose weights came from elsewhere; `hub` is its id there, where it has one."""

    role: str
    name: str
    source: str
    licence: str
    hub: str | None


class ScoreRow(NamedTuple):
    """A dataset's score, as results.json has it; `trained_on` None: that is not known."""

    dataset: str
    title: str
    trained_on: bool | None
    entry: Mapping[str, Any]


def write_model_card(
    folder: Path,
    loaded: LoadedModel,
    found: Source,
    *,
    name: str,
    origin: str,
    results: Path | None,
    licence: str | None,
) -> None:
    """Write the card of a model into the folder that holds it.

    Args:
        folder: gets README.md.
        loaded, found: the model, and the source that it was read from.
        name: by which it is loaded: a hub id, or its folder.
        origin: the source as it was given, which may be a hub id.
        results: results.json, or the folder with it; None: the ones of the run's own final evaluation, where there are any.
        licence: the hub's name of the licence that the model is given; None: `other`, which the card explains.

    Raises:
        UserError: no such results, or those of other weights.
    """
    run = found.path.parents[1] if found.format == "run" else None
    base = origin if is_hub_id(origin) and not Path(origin).exists() else None
    mixture = {} if run is None else run_mixture(run / "config.yaml")
    scores = _scores(_results_file(run, results), loaded, mixture)
    parts = _parts(loaded, base)
    metadata = _metadata(loaded, PIPELINE_TAGS[found.kind], name, parts, _official(mixture), scores, licence)
    sections = [
        f"---\n{metadata}---",
        f"# {name.rsplit('/', 1)[-1]}",
        _introduction(loaded, scores),
        f"```python\nimport instructblip\n\nmodel = instructblip.load({json.dumps(name)})\n```",
        "## Parts",
        _table(("part", "name", "from", "licence"), [part[:4] for part in parts]),
        *_data_section(mixture),
        *_score_section(scores),
        "## Licence",
        _terms(licence),
    ]
    (folder / CARD).write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _metadata(
    loaded: LoadedModel,
    task: str,
    name: str,
    parts: Sequence[Part],
    datasets: list[str],
    scores: Sequence[ScoreRow],
    licence: str | None,
) -> str:
    """The card's YAML, as the hub's own client writes it."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=task,
            dataset_type=row.dataset,
            dataset_name=row.title,
            dataset_split=row.entry["protocol"]["split"],
            metric_type=row.entry["metric"],
            metric_name=row.entry["metric"],
            metric_value=row.entry["value"],
            metric_args={
                "low": row.entry["low"],
                "high": row.entry["high"],
                "samples": row.entry["count"],
                "held": _held(row),
                "protocol_sha256": row.entry["protocol"]["sha256"],
            },
        )
        for row in scores
        if row.entry["value"] is not None and not row.entry.get("made_up")
    ]
    bases = [part.hub.partition("@")[0] for part in parts if part.hub is not None]
    bases += [
        weights["source"]
        for weights in loaded.standing.start.weights
        if is_hub_id(weights["source"]) and not Path(weights["source"]).exists()
    ]
    data = ModelCardData(
        license=licence or "other",
        license_name=None if licence else "licences-of-parts-and-data",
        license_link=None if licence else CARD,
        library_name="transformers",
        pipeline_tag=task,
        base_model=list(dict.fromkeys(bases)) or None,
        datasets=datasets or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        tags=["instructblip", "q-former" if loaded.config is None or loaded.config.qformer else "vision-language"],
        model_name=name.rsplit("/", 1)[-1],
        eval_results=results or None,
    )
    return str(data.to_yaml()) + "\n"


def _introduction(loaded: LoadedModel, scores: Sequence[ScoreRow]) -> str:
    made_of = ", ".join(part.name for part in loaded.parts.values())
    lines = [f"{type(loaded.model).__name__} of {made_of}, {loaded.step:,} optimiser steps."]
    if loaded.standing.start.weights:
        lines.append(f"It started from {', '.join(weights['name'] for weights in loaded.standing.start.weights)}.")
    if loaded.standing.untrained:
        lines.append(f"Never trained: {', '.join(loaded.standing.untrained)}.")
    if not scores:
        lines.append("It has not been evaluated.")
    return " ".join(lines)


# --- parts and data --------------------------------------------------------------------------------------------------


def _parts(loaded: LoadedModel, base: str | None) -> list[Part]:
    """The parts, which have sources of their own, or came all from one hub repository."""
    configs: dict[str, VisionConfig | LLMConfig | None] = {}
    if loaded.config is not None:
        configs = {"vision": loaded.config.vision, "llm": loaded.config.llm}
    found = []
    for role, part in loaded.parts.items():
        config = configs.get(role)
        hub, licence = _on_the_hub(base) if config is None else _origin(part.name, config.sources)
        # A folder of this machine says nothing to a reader, and something of whoever wrote it.
        source = hub or ("a local folder" if Path(part.source).is_absolute() else part.source)
        found.append(Part(role, part.name, source, licence, hub))
    return found


def _on_the_hub(repository: str | None) -> tuple[str | None, str]:
    return repository, _UNSTATED if repository is None else f"see https://huggingface.co/{repository.partition('@')[0]}"


def _origin(name: str, config: SourcesConfig) -> tuple[str | None, str]:
    """The hub id of a part's files, and their licence."""
    if config.path is not None:
        return None, _UNSTATED
    if config.wheel is None and config.hub is not None:
        return _on_the_hub(config.hub)
    return None, recorded_licence(sources(name, config)) or _UNSTATED


def _official(mixture: Mapping[str, Card | None]) -> list[str]:
    """Those that others know by their names; the hub would take the name of one's own for a dataset of its own."""
    return [name for name, card in mixture.items() if card is not None and not isinstance(card, OwnCard)]


def _data_section(mixture: Mapping[str, Card | None]) -> list[str]:
    if not mixture:
        return ["## Training data", "Not known here: the model was read from a format that does not name it."]
    rows = [
        (name, card.title, card.licence, card.homepage) if card is not None else (name, "", _UNSTATED, "")
        for name, card in mixture.items()
    ]
    return ["## Training data", _table(("dataset", "title", "licence", "from"), rows)]


# --- scores ----------------------------------------------------------------------------------------------------------


def _results_file(run: Path | None, given: Path | None) -> Path | None:
    if given is not None:
        file = given / "results.json" if given.is_dir() else given
        if not file.is_file():
            raise UserError(f"{file} is missing; {_AGAIN}")
        return file
    own = None if run is None else run / "evaluation/results.json"
    return own if own is not None and own.is_file() else None


def _scores(file: Path | None, loaded: LoadedModel, mixture: Mapping[str, Card | None]) -> list[ScoreRow]:
    """The scores of a results.json, which must be of these very weights."""
    if file is None:
        return []
    try:
        stored = read_json(file)
        evaluated = stored["checkpoint"]["trainable_sha256"]
        rows = [
            ScoreRow(name, _title(name, entry), is_trained_on(name, mixture) if mixture else None, _checked(entry))
            for name, entry in stored["datasets"].items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is no results.json of an evaluation ({type(error).__name__}: {error}); {_AGAIN}"
        ) from None
    if evaluated != fingerprint_tensors(loaded.model.held_state()):
        raise UserError(f"{file} has the scores of other weights than {loaded.source}; {_AGAIN}")
    return rows


def _checked(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("value", "low", "high"):
        if not isinstance(entry[key], int | float | None):
            raise TypeError(f"{key} is {entry[key]!r}")
    if not isinstance(entry["count"], int) or not isinstance(entry["metric"], str):
        raise TypeError("count or metric")
    for key in ("split", "sha256", "preset", "mode", "prompt"):
        if not isinstance(entry["protocol"][key], str):
            raise TypeError(f"protocol.{key}")
    return entry


def _title(name: str, entry: Mapping[str, Any]) -> str:
    try:
        return load_card(name).title
    except UserError:  # a card of one's own, which the results hold
        return str(entry.get("card", {}).get("title", name))


def _held(row: ScoreRow) -> str:
    return "not known" if row.trained_on is None else "held-in" if row.trained_on else "held-out"


def _score_section(scores: Sequence[ScoreRow]) -> list[str]:
    if not scores:
        return []
    rows = []
    for row in scores:
        entry, protocol = row.entry, row.entry["protocol"]
        value = "answers not public" if entry["value"] is None else f"{entry['value']:.1f}"
        interval = "" if entry["low"] is None else f"{entry['low']:.1f} to {entry['high']:.1f}"
        title = row.title + (" (made-up data: the score means nothing)" if entry.get("made_up") else "")
        how = f"{protocol['mode']}, preset {protocol['preset']}, prompt `{protocol['prompt'] or 'none'}`"
        held, count = _held(row), f"{entry['count']:,}"
        rows.append(
            (title, held, protocol["split"], entry["metric"], value, interval, count, how, protocol["sha256"][:12])
        )
    headings = ("dataset", "", "split", "metric", "score", "95% interval", "samples", "protocol", "its SHA-256")
    return [
        "## Scores",
        _table(headings, rows),
        "Held-in: of a dataset that the model was trained on. Held-out: of one that it was not. A prompt's fields are the "
        "record's. Scores are comparable where the protocol's SHA-256 is the same.",
    ]


def _terms(licence: str | None) -> str:
    given = f"The model is given under `{licence}`. " if licence else "No licence was chosen for the model. "
    return f"{given}The licences of the parts and of the data, in the tables above, hold beside it."


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in line)} |" for line in lines
    )
