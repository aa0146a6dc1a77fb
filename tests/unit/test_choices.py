"""One verdict: the choices of the schema are those of the code, and the same wrong value gives the same line everywhere."""

import os
import shlex
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from instructblip.config import schema
from instructblip.config.entry import _parse, check_overrides, compose_config
from instructblip.config.schema import (
    CapFiltConfig,
    DemoConfig,
    EvaluateConfig,
    FeaturesConfig,
    InspectConfig,
    PrepareConfig,
    StudyCommandConfig,
    TrainConfig,
)
from instructblip.config.validate import read_model_config, to_yaml
from instructblip.data.batching import BATCHINGS
from instructblip.data.mixture import WEIGHTINGS
from instructblip.data.prepare.ocr import RECOGNISERS
from instructblip.data.text_processors import TEXT_PROCESSORS
from instructblip.data.transforms import TRANSFORMS
from instructblip.errors import UserError
from instructblip.fetch.converters import CONVERTERS
from instructblip.models.facts import OUTPUTS, RANKING_PRESETS
from instructblip.models.llm import LLM_KINDS
from instructblip.models.quantized import QUANTIZATIONS
from instructblip.tracking import LOGGERS
from instructblip.training.layout import PRECISIONS
from instructblip.training.plan.flops import GPUS
from instructblip.weights.names import PROJECTIONS
from instructblip.weights.parts import MODELS, VISION_NORMS
from tests.kit.runs import REPOSITORY

COMMANDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "train": (TrainConfig, ()),
    "evaluate": (EvaluateConfig, ("checkpoint=x",)),
    "prepare": (PrepareConfig, ()),
    "inspect": (InspectConfig, ()),
    "features": (FeaturesConfig, ("checkpoint=x",)),
    "demo": (DemoConfig, ("checkpoint=x",)),
    "capfilt": (CapFiltConfig, ("shards=s", "captioner=x", "filter=y", "out=o")),
    "study": (StudyCommandConfig, ("study=sampling",)),
}


@pytest.mark.parametrize(
    ("choices", "known"),
    [
        (schema.BatchingKind, BATCHINGS),
        (schema.Converter, CONVERTERS),
        (schema.GPUName, GPUS),
        (schema.LLMKind, LLM_KINDS),
        (schema.ModelKind, MODELS),
        (schema.LavisProjection, PROJECTIONS),
        (schema.LoggerKind, LOGGERS),
        (schema.OcrLibrary, RECOGNISERS),
        (schema.Precision, PRECISIONS),
        (schema.Preset, (*RANKING_PRESETS, "lmms_eval")),  # which ranks nothing
        (schema.Quantization, QUANTIZATIONS),
        (schema.TextProcessor, TEXT_PROCESSORS),
        (schema.Transform, TRANSFORMS),
        (schema.VisionNorm, VISION_NORMS),
        (schema.Weighting, WEIGHTINGS),
    ],
)
def test_what_may_be_chosen_is_what_the_code_can_do(choices: Any, known: Collection[str]) -> None:
    assert set(get_args(choices)) == set(known)


WRONG = [
    ("train", "vision.norm=foo", "vision.norm=foo is none of layer, channel, none"),
    ("train", "vision.init=scratch", "vision.init=scratch draws the vision encoder, and nothing trains it"),
    ("train", "qformer.init=foo", "qformer.init=foo is none of bert, given, scratch"),
    ("train", "qformer.query_init=foo", "qformer.query_init=foo is none of normal, cls"),
    ("train", "model.kind=foo", "model.kind=foo is none of instructblip, blip2, blip2_stage1"),
    ("train", "llm=null", "model=instructblip needs a language model; give llm=NAME"),
    ("train", "llm.kind=foo", "llm.kind=foo is none of decoder, encoder_decoder"),
    ("train", "llm.quantization=int4", "llm.quantization=int4 is none of int8, nf4, fp8, null; did you mean int8?"),
    ("train", "vision.dtype=half", "vision.dtype=half is none of float32, bfloat16, float16"),
    ("train", "mixture.weights=root", "mixture.weights=root is none of sqrt, proportional, uniform, temperature"),
    ("train", "recipe.precision=bf", "recipe.precision=bf is none of fp32, bf16; did you mean bf16?"),
    ("train", "recipe.full_disk=go", "recipe.full_disk=go is none of stop, continue"),
    ("train", "parallel.kind=tp", "parallel.kind=tp is none of single, ddp, fsdp"),
    ("train", "parallel.packed_attention=flash", "parallel.packed_attention=flash is none of dense, by_length"),
    (
        "train",
        "parallel.packed_attention=by_length",
        "parallel.packed_attention=by_length is of rows of several samples",
    ),
    ("train", "parallel.ahead=all", "parallel.ahead=all is none of none, copies, vision"),
    (
        "train",
        "parallel.ahead=vision parallel=fsdp",
        "parallel.ahead=vision encodes a step's images before it, and parallel=",
    ),
    (
        "train",
        "parallel.ahead=vision train.vision=full data.cache_features=false",
        "parallel.ahead=vision encodes a step's images before it, and train.vision=full changes the encoder",
    ),
    (
        "train",
        "parallel.ahead=vision train.vision=lora data.cache_features=false",
        "parallel.ahead=vision encodes a step's images before it, and train.vision=lora changes the encoder",
    ),
    (
        "train",
        "qformer.max_instruction_tokens=2",
        "qformer.max_instruction_tokens=2 leaves nothing of a text beside its 2 marks; set it to 3 or more",
    ),
    ("train", "parallel.read_every=0", "parallel.read_every=0 is too small; give 1 or more"),
    ("train", "logger.mode=on", "logger.mode=on is none of offline, online"),
    ("train", "device=tpu", "device=tpu: use auto, cpu or cuda"),
    ("train", "plan_mfu=0", "plan_mfu=0 is too small; give more than 0"),
    ("train", "name=7", "name must be text, not 7; put it in quotes: name=\"'7'\""),
    ("train", "seed=1.5", "seed must be a whole number, not 1.5"),
    ("train", "mixture.temperature=2", "mixture.weights=sqrt takes no mixture.temperature"),
    ("evaluate", "preset=papers", "preset=papers is none of paper, lavis, lmms_eval; did you mean paper?"),
    ("evaluate", "mode=guess", "mode=guess is none of rank, generate, retrieve, match, null"),
    ("evaluate", "data.transform=crop", "data.transform=crop is none of resize_square, center_crop"),
    (
        "evaluate",
        "data.tolerance.samples=5",
        "data.tolerance.samples= is of training, and an evaluation does not read it; give tolerance=NUMBER",
    ),
    (
        "evaluate",
        "data.transform=center_crop",
        "data.transform= is of training, and an evaluation does not read it; leave it out",
    ),
    ("evaluate", "suite.held_in=[] suite.held_out=[]", "there is nothing to evaluate; name a dataset"),
    ("prepare", "ocr=tesseract", "ocr=tesseract is none of rapidocr, null"),
    ("prepare", "workers=0", "workers=0 is too small; give 1 or more"),
    ("prepare", "check=a show=b", "check= and show= are different tasks"),
    ("inspect", "data.tolerance.samples=5", "data.tolerance.samples= is of a run, which stops past it; a look at"),
    ("inspect", "mixture.per=epoch", "mixture.per=epoch is none of sample, image, batch, step"),
    ("capfilt", "variant=blip3", "variant=blip3 is none of blip, blip2"),
    ("capfilt", "top_p=0", "top_p=0 is too small; give more than 0"),
    ("capfilt", "variant=blip2 threshold=0.5", "threshold= is of variant=blip; variant=blip2 keeps the best"),
    ("capfilt", "kept=2", "kept= is of variant=blip2; variant=blip keeps all that match"),
    ("capfilt", "max_new_tokens=4 min_new_tokens=5", "min_new_tokens=5 is more than max_new_tokens=4"),
    ("study", "form=long", "form=long is none of reduced, short, full"),
    ("study", "jobs=0", "jobs=0 is too small; give 1 or more"),
    ("study", "seeds=[2,2]", "seeds [2, 2] of the study must differ"),
]


@pytest.mark.parametrize(("command", "overrides", "line"), WRONG)
def test_a_wrong_value_gives_the_same_line_to_every_use_of_a_command(command: str, overrides: str, line: str) -> None:
    kind, needed = COMMANDS[command]
    uses = [(), ("--cfg", "job"), ("--help",)]
    uses += [("plan=true",)] if command == "train" else []
    lines = set()
    for use in uses:
        with pytest.raises(UserError) as error:
            check_overrides(command, kind, [*needed, *overrides.split(), *use])
        lines.add(str(error.value))
    with pytest.raises(UserError) as error:
        compose_config(command, kind, [*needed, *overrides.split()])
    assert lines == {str(error.value)}
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


HARD_VALUES = [
    "/data/My Photos (1)", "a=b", "s3://bucket/x?y=1&z=2", "Müller", "don't", 'a "quoted" word', "{x}", "[a", "a#b", "a;b",
    "it's \"both\"(", "$HOME(", "a`b`(", "wow!(", "C:\\(x)", "ends(\\", "a(\\'b",
]  # fmt: skip


@pytest.mark.parametrize("value", HARD_VALUES)
def test_the_hint_for_a_value_that_hydra_cannot_read_works_in_a_shell(value: str) -> None:
    with pytest.raises(UserError, match="cannot be understood; put the value in quotes within quotes: ") as error:
        _parse([f"name={value}"])
    hint = str(error.value).split("within quotes: ")[1].split("; in a list")[0]
    printed = subprocess.run(["bash", "-c", f"printf %s {hint}"], capture_output=True, text=True, check=True).stdout
    assert [printed] == shlex.split(hint)
    (override,) = _parse([printed])
    assert (override.key_or_group, override.value()) == ("name", value)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("name=a,b", "name=a,b are several values; give -m to run one job for each, or \"name='a,b'\" for one text"),
        ("llm=a,b", "llm=a,b are several values; give -m to run one job for each"),
        ("suite.held_out=gqa", "suite.held_out must be a list, not 'gqa'; give suite.held_out=[gqa]"),
        ("suite=[gqa]", "there is no suite=gqa; configs/suite has: "),
        ("name", "name cannot be understood; write each setting as key=value"),
        ("train.learning_rates.qfromer=1", "unknown key train.learning_rates.qfromer; did you mean train.learning_rates.q"),
        ("recipe.keep_best=easy_vqa_colou", "recipe.keep_best=easy_vqa_colou is no dataset of suite.held_in, nor mean; did"),
    ],
)  # fmt: skip
def test_hints_name_what_works(override: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        compose_config("train", TrainConfig, [override])
    assert str(error.value).startswith(line)


FOREIGN = [
    ("vision.options", {"pretrained": True}, "unknown key vision.options.pretrained; the keys there are: act_layer, "),
    ("vision.options", {"checkpoint_path": "x.pth"}, "unknown key vision.options.checkpoint_path; "),
    ("vision.options", {"dept": 3}, "unknown key vision.options.dept; did you mean vision.options.depth?"),
    ("vision.options", {"depth": {"a": ["b"]}}, "vision.options={'depth': {'a': ['b']}}: depth must be a number, true or"),
    ("llm.options", {"attn_implementation": "sdpa"}, "unknown key llm.options.attn_implementation; "),
    ("llm.options", {"auto_map": {}}, "unknown key llm.options.auto_map; "),
    ("llm.options", {"hiden_act": "gelu"}, "unknown key llm.options.hiden_act; did you mean llm.options.hidden_act?"),
    ("llm.options", {"hidden_act": "evil/x"}, "llm.options={'hidden_act': 'evil/x'}: hidden_act must be a number, "),
    ("llm.name", "../../x", "llm.name=../../x: give a name, not a path"),
    ("vision.name", ".hidden", "vision.name=.hidden: give a name, not a path"),
    ("llm.sources.hub_revision", "refs/../x", "llm.sources.hub_revision=refs/../x: give a commit, tag or branch"),
    ("vision.sources.wheel.project", "--index-url", "vision.sources.wheel.project=--index-url: give the name of a Python"),
    ("vision.sources.wheel.version", "1 -r x", "vision.sources.wheel.version=1 -r x: give a version, such as 1.0.2"),
    ("vision.sources.wheel.sha256", "../x", "vision.sources.wheel.sha256=../x: give the 64 hexadecimal digits"),
]  # fmt: skip


@pytest.mark.slow
def test_what_a_foreign_configuration_could_reach_with_is_refused(tmp_path: Path) -> None:
    text, path = to_yaml(compose_config("train", TrainConfig, [])), tmp_path / "config.yaml"
    for place, value, line in FOREIGN:
        stored = yaml.safe_load(text)
        *sections, last = place.split(".")
        inner = stored
        for section in sections:
            inner = inner[section]
        inner[last] = value
        path.write_text(yaml.safe_dump(stored))
        with pytest.raises(UserError) as error:
            read_model_config(path)
        assert str(error.value).startswith(f"{path}: {line}")
    with pytest.raises(UserError, match=r"^data\.sources\.a/b: give a name, not a path"):
        compose_config("train", TrainConfig, ["data.sources={a/b: {path: x}}"])


def test_a_hash_in_capitals_is_the_same_hash() -> None:
    config = compose_config("train", TrainConfig, ["vision.sources.wheel.sha256=" + "AB" * 32])
    assert config.vision.sources.wheel.sha256 == "ab" * 32


def test_several_wrong_values_are_all_named() -> None:
    with pytest.raises(UserError) as error:
        check_overrides("train", TrainConfig, ["vision.norm=foo", "qformer.init=foo", "llm.kind=foo"])
    assert str(error.value).endswith("is none of layer, channel, none (also wrong: qformer.init, llm.kind)")


@pytest.mark.parametrize("option", [("--help",), ("--cfg", "job"), ("--info", "config")])
def test_hydras_options_need_no_required_key(option: tuple[str, ...]) -> None:
    check_overrides("evaluate", EvaluateConfig, list(option))


@pytest.mark.slow
def test_what_hydra_only_shows_is_checked_in_a_real_process() -> None:
    command = [sys.executable, "train.py", "--cfg", "job", "vision.norm=foo"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HYDRA")}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "error: vision.norm=foo is none of layer, channel, none\n",
    )


# --- keys that no file writes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_every_key_of_the_schema_can_be_set(plus: str) -> None:
    overrides = {
        "recipe.keep_best": "mean",
        "recipe.phases.instruction.new_parts_scale": 2.5,
        "llm.options.attention_dropout": 0.25,
        "data.sources.mine.path": "/data/mine",
        "vision.sources.hub_revision": "main",
        "seed": 3,
    }
    config = compose_config("train", TrainConfig, [f"{plus}{key}={value}" for key, value in overrides.items()])
    assert config.recipe.keep_best == "mean"
    assert config.recipe.phases["instruction"].new_parts_scale == 2.5
    assert config.llm.options["attention_dropout"] == 0.25
    assert config.data.sources["mine"].path == "/data/mine"
    assert (config.vision.sources.hub_revision, config.seed) == ("main", 3)


def test_a_section_can_be_added_to_as_a_whole() -> None:
    config = compose_config("train", TrainConfig, ["vision.options={drop_rate: 0.1}", "data.tolerance={samples: 3}"])
    assert config.vision.options["drop_rate"] == 0.1
    assert (config.data.tolerance.samples, config.data.tolerance.fraction) == (3, 0.001)


def test_phases_are_replaced_by_leaving_out_those_of_the_recipe() -> None:
    phase = "{steps: 5, batch_size: 2, learning_rate: 1e-4}"
    config = compose_config(
        "train", TrainConfig, ["~recipe.phases", f"recipe.phases={{second: {phase}, first: {phase}}}"]
    )
    assert list(config.recipe.phases) == ["second", "first"]


@pytest.mark.slow
def test_an_experiment_changes_one_number_of_one_phase() -> None:
    paper, other = (
        compose_config("train", TrainConfig, [f"experiment={name}"]).recipe.phases["instruction"]
        for name in ("paper_vicuna_7b", "paper_flan_t5_xl")
    )
    assert (paper.batch_size, other.batch_size) == (128, 192)
    assert (paper.steps, paper.learning_rate, paper.warmup_steps) == (
        other.steps,
        other.learning_rate,
        other.warmup_steps,
    )


def test_the_outputs_that_are_known_before_a_model_is_imported_are_its_own() -> None:
    assert {kind: model.OUTPUTS for kind, model in MODELS.items()} == OUTPUTS
