"""What a dataset card says of its evaluation, and the presets where others than the paper ask otherwise.

A card's `evaluation:` is the paper's protocol. Below `presets.lavis` stand the keys that the released code (LAVIS) has
otherwise, below `presets.lmms_eval` those of that harness; what holds for one kind of language model stands below `decoder`
or `encoder_decoder` once more.
"""

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from instructblip.config.schema import (
    AtLeastOne,
    LLMKind,
    MetricName,
    Mode,
    Normalize,
    NotNegative,
    PositiveFloat,
    Preset,
    Section,
    TextProcessor,
)
from instructblip.config.validate import build, nearest
from instructblip.data.card_defaults import is_metric_file
from instructblip.data.records import Record
from instructblip.data.templates import FIELDS, render_prompt
from instructblip.data.text_processors import TEXT_PROCESSORS
from instructblip.errors import UserError
from instructblip.files import sha256_file

OTHER_PRESETS = tuple(preset for preset in get_args(Preset) if preset != "paper")

# What a run's folder holds, all of it, and what the folder of a model does, any of it.
_RUN = ("config.yaml", "metrics.jsonl", "checkpoints")
_MODEL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# What a prompt of a card may name in braces: what a template may, without what would give the answer away.
PROMPT_FIELDS = tuple(name for name in FIELDS if name not in ("answer", "caption"))
STATEMENT = "{question}"  # the prompt of `match` mode, whatever a card says
_FIELD = re.compile(r"\{([^{}]*)\}")
_PYTHON = re.compile(r"(?P<file>.+\.py):(?P<name>[^\W\d]\w*)", re.DOTALL)


@dataclass(frozen=True)
class Evaluation(Section):
    """How a dataset is evaluated.

    Attributes:
        split: the split that is scored.
        prompt: instruction, with fields of the record in braces.
        mode: `rank` scores given answers by log-likelihood, `generate` writes one, `retrieve` looks for each image's
            captions among those of all images, and for each caption's image, `match` judges the question, a statement, by
            whether it and the image match, and shows no prompt.
        normalize: log-likelihood of a candidate as the sum or the mean over its tokens.
        include_eos: whether the end-of-sequence token counts as one of them.
        max_new_tokens, num_beams: decoding in `generate` mode (tokens; beam size).
        metric: name of the score, or `FILE.py:FUNCTION` of a card of one's own, whose path is absolute once it is read.
        candidates: the answers to rank, the same for all records.
        verbalizers: class -> the texts that stand for it.
        aggregate: a class is as likely as any of its texts (`sum` of likelihoods) or as the likeliest (`max`).
        candidates_from: where the answers to rank come from: each record's own `choices`; `train_answers`, all answers of
            the train split; or `answer_list`, a file that whoever evaluates has fetched and gives as `answers=`. With
            `rank`, exactly one of candidates, verbalizers and candidates_from.
        answer_list: address of that file, a JSON list of texts.
        min_new_tokens, length_penalty, repetition_penalty: further decoding in `generate` mode (tokens; exponent of the
            length that a beam's log-likelihood is divided by; factor against tokens that were written before, 1 for none).
        beam_lengths: how lengths of beams are counted, one of `decoding.BEAM_LENGTHS`.
        until: texts that end an answer in `generate` mode and are no part of it.
        text_processor: what is done to a question first, one of `text_processors.TEXT_PROCESSORS`.
        may_be_empty: fields that the prompt shows even where a record has none of them.
        transform: how an image becomes a square, one of `transforms.FITS`.
        upright: whether pictures are turned as their EXIF orientation says.
        transparency: what is seen where a picture is transparent: `white`, or, once that is `dropped`, what lies beneath.
        frames: pictures of a sample, 1 but for videos. This and `ocr` the prepared shards settle; a score on shards that
            were prepared otherwise is marked.
        ocr: whose tokens a prompt with `{ocr_tokens}` shows: `own`, those that come with the dataset; None: not known.
        rerank: in `retrieve` mode, how many of the nearest by contrast the matching head ranks anew.
        max_text_tokens: of a caption in `retrieve` mode and a statement in `match` mode, with [CLS] and [SEP]; longer ones
            lose their end.
        kinds: the record kinds that are scored; empty: the card's own.
        validation_split: the split that training watches; None: the scored one.
        presets: name of a preset -> the keys that differ there.
    """

    split: str
    prompt: str
    mode: Mode
    normalize: Normalize
    include_eos: bool
    max_new_tokens: AtLeastOne
    num_beams: AtLeastOne
    metric: str
    candidates: tuple[str, ...] = ()
    verbalizers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    aggregate: Literal["sum", "max"] = "sum"
    candidates_from: Literal["choices", "train_answers", "answer_list"] | None = None
    answer_list: str | None = None
    min_new_tokens: NotNegative = 1
    length_penalty: float = 1.0
    repetition_penalty: PositiveFloat = 1.0
    beam_lengths: Literal["new_tokens", "transformers_4_33"] = "new_tokens"
    until: tuple[str, ...] = ()
    text_processor: TextProcessor = "none"
    may_be_empty: tuple[str, ...] = ()
    transform: Literal["resize_square", "center_crop"] = "resize_square"
    upright: bool = True
    transparency: Literal["white", "dropped"] = "white"
    frames: AtLeastOne = 1
    ocr: Literal["own"] | None = None
    rerank: AtLeastOne = 128
    max_text_tokens: AtLeastOne = 35
    kinds: tuple[str, ...] = ()
    validation_split: str | None = None
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)


def with_preset(evaluation: Evaluation, preset: str, llm_kind: str) -> Evaluation:
    """The evaluation as it is under a preset with one kind of language model; `paper` is the card as it stands.

    Raises:
        UserError: a preset's key or value that is not valid.
    """
    return _with_preset(evaluation, preset, llm_kind, "the card")


def finished_prompt(evaluation: Evaluation, record: Record) -> str:
    """The prompt that a record is asked with.

    Raises:
        ValueError: as `render_prompt`.
    """
    if record.question:
        question = TEXT_PROCESSORS[evaluation.text_processor](record.question)
        record = dataclasses.replace(record, question=question)
    return render_prompt(evaluation.prompt, record, may_be_empty=evaluation.may_be_empty)


def own_metric(metric: str) -> tuple[Path, str] | None:
    """File and name of the function of a metric of one's own; None for a metric's name."""
    match = _PYTHON.fullmatch(metric)
    return None if match is None else (Path(match["file"]), match["name"])


def metric_name(metric: str) -> str:
    """What results call a metric: one of one's own by its file and function, wherever the file lies."""
    own = own_metric(metric)
    return metric if own is None else f"{own[0].name}:{own[1]}"


def metric_sha256(metric: str) -> str:
    """Hash of the file of a metric of one's own, without which its name says nothing; empty for a metric's name.

    Raises:
        UserError: the file cannot be read.
    """
    own = own_metric(metric)
    if own is None:
        return ""
    try:
        return sha256_file(own[0])
    except OSError as error:
        raise UserError(f"metric {own[0]} cannot be read ({error.strerror})") from None


def check_evaluation(evaluation: Evaluation, splits: Collection[str], path: Path, *, own: bool) -> None:
    """Refuse statements that are well-typed one by one but do not go together, in any preset.

    Args:
        own: whether the card is one's own, whose metric may be too.

    Raises:
        UserError: names the file and the key.
    """
    for name in evaluation.presets:
        if name not in OTHER_PRESETS:
            raise UserError(f"{path}: evaluation.presets has {name!r}{nearest(name, OTHER_PRESETS)}")
    for preset in ("paper", *evaluation.presets):
        for llm_kind in get_args(LLMKind):
            rules = _with_preset(evaluation, preset, llm_kind, str(path))
            _check_rules(rules, splits, path)
            _check_metric(rules.metric, path, own=own)


def _with_preset(evaluation: Evaluation, preset: str, llm_kind: str, file: str) -> Evaluation:
    overrides = dict(evaluation.presets.get(preset, {}))
    by_kind = {kind: overrides.pop(kind, {}) for kind in get_args(LLMKind)}
    overrides |= by_kind[llm_kind]
    if "presets" in overrides:
        raise UserError(f"{file}: evaluation.presets.{preset} has presets of its own; remove them")
    values = dataclasses.asdict(evaluation) | {"presets": {}}
    # Back to what YAML would give, so that all keys are checked in one way.
    plain: dict[str, Any] = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    plain["verbalizers"] = {name: list(texts) for name, texts in evaluation.verbalizers.items()}
    where = f"evaluation.presets.{preset}" if overrides else "evaluation"
    settled: Evaluation = build(Evaluation, plain | overrides, file, where)
    return settled


def _check_rules(evaluation: Evaluation, splits: Collection[str], path: Path) -> None:
    for key in ("split", "validation_split"):
        name = getattr(evaluation, key)
        if name is not None and name not in splits:
            raise UserError(f"{path}: evaluation.{key} {name!r} is not among splits{nearest(name, splits)}")
    stated = bool(evaluation.candidates) + bool(evaluation.verbalizers) + (evaluation.candidates_from is not None)
    if stated != (evaluation.mode == "rank"):
        ways = "candidates, verbalizers and candidates_from"
        raise UserError(f"{path}: evaluation needs one of {ways} to rank, none of them to generate, retrieve or match")
    most, fewest = evaluation.max_new_tokens, evaluation.min_new_tokens
    if evaluation.mode == "generate" and fewest > most:
        raise UserError(f"{path}: evaluation.min_new_tokens {fewest} is more than max_new_tokens {most}; lower it")
    if (evaluation.candidates_from == "answer_list") != (evaluation.answer_list is not None):
        raise UserError(f"{path}: candidates_from: answer_list and answer_list, its address, go together; give both")
    if set("{}") & set(_FIELD.sub("", evaluation.prompt)):
        raise UserError(f"{path}: evaluation.prompt {evaluation.prompt!r} has a brace without its partner")
    for name in _FIELD.findall(evaluation.prompt):
        if name not in PROMPT_FIELDS:
            raise UserError(f"{path}: evaluation.prompt names an unknown field {name!r}{nearest(name, PROMPT_FIELDS)}")
    for name in evaluation.may_be_empty:
        if name not in PROMPT_FIELDS:
            raise UserError(f"{path}: evaluation.may_be_empty has {name!r}{nearest(name, PROMPT_FIELDS)}")
    if evaluation.ocr is not None and "{ocr_tokens}" not in evaluation.prompt:
        raise UserError(f"{path}: evaluation.ocr is said where the prompt shows no {{ocr_tokens}}; remove it")


def _check_metric(metric: str, path: Path, *, own: bool) -> None:
    """One of the metrics there are, or a Python file of one's own that is none of a checkpoint's."""
    if not is_metric_file(metric):
        known = get_args(MetricName)
        if metric not in known:
            raise UserError(f"{path}: evaluation.metric is {metric!r}{nearest(metric, known)}")
        return
    found = own_metric(metric)
    if not own or found is None:
        way_out = "write ./FILE.py:FUNCTION" if own else "an official card names one of the metrics there are"
        raise UserError(f"{path}: evaluation.metric is {metric!r}; {way_out}")
    for file in (path, found[0]):
        if (folder := _checkpoint_around(file)) is not None:
            raise UserError(
                f"{path}: evaluation.metric is Python code, and {file} lies in {folder}, which holds a checkpoint: code "
                "that comes with weights is not run; copy the card and its metric elsewhere if you trust them"
            )
    if not found[0].is_file():
        raise UserError(f"{path}: evaluation.metric names {found[0]}, which is not there")


def _checkpoint_around(file: Path) -> Path | None:
    """The folder of a run or of a model that a file lies in."""
    for folder in file.resolve().parents:
        if all((folder / name).exists() for name in _RUN) or any((folder / name).is_file() for name in _MODEL):
            return folder
    return None
