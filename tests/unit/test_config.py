"""Every configuration file composes and says how it is used, every key is read, and mistakes name the nearest key."""

import ast
import copy
import dataclasses
import functools
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

import instructblip
from instructblip.config import entry as entry_points
from instructblip.config.checks import check
from instructblip.config.entry import _choices_and_values, _set, _settable, compose_config
from instructblip.config.schema import (
    CONFIGS,
    CapFiltConfig,
    DemoConfig,
    EvaluateConfig,
    FeaturesConfig,
    InspectConfig,
    LLMConfig,
    MixtureConfig,
    MixtureDatasetConfig,
    ModelConfig,
    PrepareConfig,
    StudyCommandConfig,
    TrainConfig,
)
from instructblip.config.validate import (
    differences,
    read_config,
    read_model_config,
    to_dict,
    to_yaml,
    unknown_key,
    valid_keys,
    validate,
)
from instructblip.errors import UserError

SCHEMAS: dict[str, Any] = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "prepare": PrepareConfig,
    "inspect": InspectConfig,
    "features": FeaturesConfig,
    "demo": DemoConfig,
    "capfilt": CapFiltConfig,
    "study": StudyCommandConfig,
}
PARTS = ("vision", "qformer", "llm")
# Launchers need optional plugins: tests/end_to_end/test_sweep.py.
FILES = sorted(
    str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml") if path.relative_to(CONFIGS).parts[0] != "hydra"
)
COMMAND = re.compile(
    r"# (?:(?:torchrun [^ ]+ |python )(?=\w+\.py)|python -m instructblip\.(?:training\.)?)"
    r"(train|evaluate|prepare|inspect|features|demo|capfilt|study)(?:\.py)?(.*)"
)


def _commands(file: str) -> list[tuple[str, list[str]]]:
    """(entry point, overrides) of the commands in a file's first comment; two spaces begin a remark."""
    lines = (CONFIGS / file).read_text(encoding="utf-8").splitlines()
    lines = lines[1:] if lines[0].startswith("# @package") else lines  # Hydra wants this line first
    assert COMMAND.match(lines[0]), f"{file} must begin with a comment that holds a command that uses it"
    found = [match for line in lines if (match := COMMAND.match(line))]
    return [(match[1], shlex.split(re.split(r"\s{2,}", match[2])[0])) for match in found]


def _compose(entry: str, overrides: list[str]) -> DictConfig:
    """With Hydra's own section, which says what was chosen."""
    choices, values = _choices_and_values(_settable(overrides))
    config = copy.deepcopy(_composed_by_hydra(entry, choices))
    for value in values:
        _set(config, value)
    return config


@functools.lru_cache(maxsize=16)
def _composed_by_hydra(entry: str, overrides: tuple[str, ...]) -> DictConfig:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(entry, overrides=list(overrides), return_hydra_config=True)


def _own(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


# --- the files -------------------------------------------------------------------------------------------------------


def test_the_files_are_found() -> None:
    assert len(FILES) >= 29
    assert {"train.yaml", "evaluate.yaml", "prepare.yaml", "experiment/demo.yaml", "llm/vicuna_7b.yaml"} <= set(FILES)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_every_file_begins_with_commands_that_use_it_and_compose(file: str) -> None:
    for entry, overrides in _commands(file):
        composed = _compose(entry, overrides)
        chosen = {f"{group.split('@')[0]}/{name}.yaml" for group, name in composed.hydra.runtime.choices.items()}
        assert file in {f"{entry}.yaml", *chosen}, f"python {entry}.py {' '.join(overrides)} does not use {file}"
        check(validate(_own(composed), SCHEMAS[entry]))


@pytest.mark.parametrize("file", [file for file in FILES if file.split("/")[0] in PARTS])
def test_a_part_is_named_after_its_file(file: str) -> None:
    group, name = file.removesuffix(".yaml").split("/")
    part = getattr(compose_config("train", TrainConfig, [f"{group}={name}"]), group)
    assert part.name in (name, getattr(part, "backbone", None))


@pytest.mark.parametrize("name", ["train", "prepare"])
def test_an_entry_point_needs_no_argument(name: str) -> None:
    validate(_own(_compose(name, [])), SCHEMAS[name])


def test_the_experiment_is_what_train_does_alone() -> None:
    assert _own(_compose("train", [])) == _own(_compose("train", ["experiment=demo"]))


# --- one composition for many settings -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["recipe.phases.alignment.steps=3", "seed=5", "name='a b'", "llm=vicuna_7b", "llm.image_prefix=x"],
        ["seed=2", "~recipe.phases", "recipe.phases={only: {steps: 1}}", "recipe.phases.only.steps=2"],
        ["mixture.datasets=[{name: gqa}]", "name=${seed}", "vision={image_size: 32}", "logger=null"],
    ],
)
def test_values_set_on_a_composition_are_as_hydra_sets_them(overrides: list[str]) -> None:
    choices, values = _choices_and_values(_settable(overrides))
    assert len(values) >= 2 and len(choices) + len(values) == len(overrides)
    whole = _own(_composed_by_hydra.__wrapped__("train", tuple(_settable(overrides))))
    assert OmegaConf.to_yaml(entry_points._compose("train", overrides)) == OmegaConf.to_yaml(whole)
    assert entry_points._compose("train", ["seed=1"]).seed == 1
    assert OmegaConf.to_yaml(entry_points._compose("train", overrides)) == OmegaConf.to_yaml(whole)


def test_a_value_that_cannot_be_set_is_named() -> None:
    with pytest.raises(UserError) as error:
        compose_config("train", TrainConfig, ["seed=1", "mixture.datasets.99.name=gqa"])
    assert "(Error merging override ++mixture.datasets.99.name=gqa: " in str(error.value)


def test_a_file_that_changed_is_composed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "small.yaml"
    monkeypatch.setattr(entry_points, "CONFIGS", tmp_path)
    for number in range(2):
        file.write_text(f"number: {number}", encoding="utf-8")
        os.utime(file, ns=(number, number))
        assert entry_points._compose("small", ["other=1"]) == {"number": number, "other": 1}


# --- no key that nobody reads ----------------------------------------------------------------------------------------


def _schemas(schema: Any) -> Iterator[Any]:
    """A dataclass and all dataclasses it holds, at any depth."""
    yield schema
    for text in [str(part.type) for part in dataclasses.fields(schema)]:
        for name in re.findall(r"\w+Config\b", text):
            yield from _schemas(getattr(instructblip.config.schema, name))


def _attributes_read() -> set[str]:
    """Names of all attributes that are read anywhere in the package but in config/."""
    files = [path for path in Path(instructblip.__file__).parent.rglob("*.py") if path.parent.name != "config"]
    assert len(files) > 30
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


@pytest.mark.slow
def test_every_key_is_read_somewhere() -> None:
    read = _attributes_read()
    keys = {
        (kind, part.name) for top in SCHEMAS.values() for kind in _schemas(top) for part in dataclasses.fields(kind)
    }
    assert len(keys) > 80
    assert sorted(f"{kind.__name__}.{name}" for kind, name in keys if name not in read) == []


def test_every_key_of_a_file_is_in_the_schema() -> None:
    """What composes is also complete: no file sets a key that only Hydra knows."""
    composed = _own(_compose("train", []))
    assert {str(key) for key in composed} <= {part.name for part in dataclasses.fields(TrainConfig)}


def test_valid_keys_reach_into_lists_and_optional_sections() -> None:
    keys = valid_keys(TrainConfig)
    assert len(keys) == len(set(keys))
    for key in ("seed", "recipe.phases", "recipe.phases.NAME.learning_rate", "mixture.datasets.0.multiplier"):
        assert key in keys
    assert {"llm.sources.wheel.sha256", "data.sources.NAME.wheel.version"} <= set(keys)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("recipe.lerning_rate", "recipe.phases.NAME.learning_rate"),
        ("recipe.phases.NAME.stepps", "recipe.phases.NAME.steps"),
        ("learning_rate", "recipe.phases.NAME.learning_rate"),
        ("llms", "llm"),
        ("sed", "seed"),
        ("vision.imagesize", "vision.image_size"),
        ("qformer.instruction_awre", "qformer.instruction_aware"),
        ("mixture.datasets.0.nam", "mixture.datasets.0.name"),
        ("data.cache_feature", "data.cache_features"),
    ],
)
def test_a_misspelt_key_names_the_nearest(key: str, nearest: str) -> None:
    message = f"unknown key {key}; did you mean {nearest}?"
    assert unknown_key(key, valid_keys(TrainConfig)) == message


def test_a_key_like_no_other_names_its_neighbours() -> None:
    message = unknown_key("mixture.zzzz", valid_keys(TrainConfig))
    assert message.endswith(
        "mixture.weights, mixture.temperature, mixture.per, mixture.image_records, mixture.templates"
    )
    assert unknown_key("zzzz", valid_keys(PrepareConfig)).endswith("check, show, samples, seed, audit, cards, sources")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=abc", ["seed must be a whole number, not 'abc'"]),
        ("recipe.phases.alignment.steps=many", ["recipe.phases.alignment.steps must be a whole number, not 'many'"]),
        ("data.cache_features=maybe", ["data.cache_features must be true or false, not 'maybe'"]),
        ("vision.mean=[1, a, 3]", ["vision.mean.1 must be a number, not 'a'"]),
        ("recipe.phases=3", ["recipe.phases must be keys and values, not 3"]),
        ("mixture.datasets=[./mine.yaml]", ["mixture.datasets.0 must be keys", "; give {name: ./mine.yaml}"]),
        ("mixture.datasets=./mine.yaml", ["must be a list", "; give mixture.datasets=[{name: ./mine.yaml}]"]),
        ("suite.held_in=./mine.yaml", ["must be a list", "; give suite.held_in=[./mine.yaml]"]),
        ("+recipe.warmup=3", ["unknown key recipe.warmup", "the keys there are: recipe.name"]),
        (
            "recipe.phases={alignment: {stepps: 1}}",
            ["unknown key recipe.phases.alignment.stepps", "mean recipe.phases.al"],
        ),
        ("mixture.datasets=[{multiplier: 1}]", ["key mixture.datasets.0.name is missing"]),
        ("name=???", ["key name is missing; give name=..."]),
        ("name=${nothing}", ["configuration key name", "'nothing' not found"]),
    ],
)
def test_wrong_values_name_their_key(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        compose_config("train", TrainConfig, [override])
    message = str(error.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


def test_evaluate_needs_a_checkpoint() -> None:
    with pytest.raises(UserError, match=r"key checkpoint is missing; give checkpoint="):
        validate(_own(_compose("evaluate", [])), EvaluateConfig)


@pytest.mark.slow
def test_blip_is_of_parts_that_make_it() -> None:
    def composed(kind: str, *overrides: str) -> TrainConfig:
        blip = [
            f"model={kind}",
            "vision=vit_b16",
            "text=minilm",
            "~qformer",
            "~llm",
            "train.vision=full",
            "data.cache_features=false",
        ]
        return compose_config("train", TrainConfig, [*blip, *overrides])

    config = composed("blip_retrieval")
    assert (config.qformer, config.llm, config.text_model().name) == (None, None, "minilm")
    assert config.train.parts(config) == ("vision", "text")
    cnn = composed("blip_caption", "vision=efficientnet_lite0", "train.vision=frozen")
    assert cnn.vision.norm == "channel"
    for kind, override, message in (
        (
            "blip_caption",
            "qformer=minilm",
            "model=blip_caption has no qformer, and qformer=minilm is one; leave it out",
        ),
        ("blip_vqa", "llm=opt_2_7b", "model=blip_vqa has no llm, and llm=opt_2_7b is one"),
        ("blip_vqa", "text=null", "model=blip_vqa needs a text model; give text=NAME"),
        (
            "blip_vqa",
            "model.queue_size=8",
            "model.queue_size is none of model=blip_vqa; .* or set model=blip_retrieval or",
        ),
        ("blip_pretrain", "vision.norm=layer", "reads the vision encoder's last tokens behind its own norm"),
        ("blip_pretrain", "vision.final_norm=false", "reads the vision encoder's last tokens behind its own norm"),
        (
            "blip_caption",
            "train.learning_rates.qformer=1e-5",
            "has no qformer to train; leave train.learning_rates.qformer",
        ),
    ):
        kept = [part for part in ("qformer", "llm") if override.startswith(f"{part}=")]
        with pytest.raises(UserError, match=message):
            if override == "text=null":
                compose_config("train", TrainConfig, [f"model={kind}", "vision=vit_b16", "~qformer", "~llm"])
            elif kept:
                others = [f"~{part}" for part in ("qformer", "llm") if part not in kept]
                compose_config(
                    "train", TrainConfig, [f"model={kind}", "vision=vit_b16", "text=minilm", *others, override]
                )
            else:
                composed(kind, override)


@pytest.mark.slow
def test_the_second_stage_is_of_parts_that_make_it() -> None:
    def composed(*overrides: str) -> TrainConfig:
        return compose_config("train", TrainConfig, ["experiment=blip2_stage2", *overrides])

    decoder, both = composed(), composed("llm=flan_t5_xl")
    assert (decoder.model.kind, decoder.reads_prefixes(), both.reads_prefixes()) == ("blip2", False, True)
    assert decoder.language_model().eos_token == "\u010a"
    for override, message in (
        ("qformer.instruction_aware=true", "model=blip2 has a Q-Former that reads no text"),
        ("model.feature_width=8", "model.feature_width is none of model=blip2"),
    ):
        with pytest.raises(UserError, match=message):
            composed(override)
    with pytest.raises(UserError, match="model=blip2 needs a language model; give llm=NAME"):
        check(dataclasses.replace(decoder, llm=None))


def test_values_become_typed() -> None:
    config = validate(_own(_compose("train", ["seed=7", "recipe.phases.alignment.learning_rate=1"])), TrainConfig)
    assert (config.seed, config.recipe.phases["alignment"].learning_rate) == (7, 1.0)
    assert isinstance(config.recipe.phases["alignment"].learning_rate, float)
    assert isinstance(config.llm, LLMConfig)
    assert isinstance(config.mixture, MixtureConfig)


# --- stored configurations -------------------------------------------------------------------------------------------


def test_a_stored_configuration_is_read_back(tmp_path: Path) -> None:
    config = validate(_own(_compose("train", ["qformer.instruction_aware=false"])), TrainConfig)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert read_config(path, TrainConfig) == config


@pytest.mark.slow
def test_a_model_is_read_out_of_a_configuration_with_or_without_the_rest(tmp_path: Path) -> None:
    config = validate(_own(_compose("train", ["seed=4", "llm=vicuna_7b", "vision=eva_vit_g"])), TrainConfig)
    sections = ModelConfig(seed=4, vision=config.vision, qformer=config.qformer, llm=config.llm)
    whole, alone = tmp_path / "whole.yaml", tmp_path / "alone.yaml"
    whole.write_text(to_yaml(config), encoding="utf-8")
    alone.write_text(to_yaml(sections), encoding="utf-8")
    assert read_model_config(whole) == read_model_config(alone) == sections
    whole.write_text(to_yaml(config).replace("mixture:", "mixtures:"), encoding="utf-8")
    assert read_model_config(whole) == sections
    alone.write_text(to_yaml(sections).replace("backbone:", "backbones:"), encoding="utf-8")
    with pytest.raises(UserError, match=r"alone\.yaml: unknown key vision\.backbones"):
        read_model_config(alone)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["config.yaml is missing", "run folder"]),
        ("a: [", ["config.yaml", "not valid YAML"]),
        ("seed: 1\nnmae: x\n", ["config.yaml", "unknown key nmae", "did you mean name?"]),
        ("- a\n", ["config.yaml", "not a configuration"]),
    ],
)
def test_a_broken_stored_configuration_is_named(tmp_path: Path, text: str | None, words: list[str]) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_config(path, TrainConfig)
    assert [word for word in words if word not in str(error.value)] == []


def test_nothing_in_a_stored_configuration_is_interpolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "s3cr3t")
    config = compose_config("train", TrainConfig, [])
    config.llm.name = "${oc.env:SECRET_TOKEN}"
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert read_config(path, TrainConfig).llm.name == read_model_config(path).llm.name == "${oc.env:SECRET_TOKEN}"


def test_aliases_that_stand_for_millions_of_values_are_refused(tmp_path: Path) -> None:
    levels = "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True))
    path = tmp_path / "config.yaml"
    path.write_text("a: &a [x,x,x,x,x,x,x,x,x]\n" + levels, encoding="utf-8")
    for read in (read_model_config, lambda path: read_config(path, TrainConfig)):
        with pytest.raises(UserError, match=r"config\.yaml: there are more than 100,000 values, by aliases perhaps"):
            read(path)


def test_a_key_that_stands_twice_and_numbers_without_a_point(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("seed: 1\nseed: 2\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.yaml is not valid YAML: .*seed stands twice"):
        read_config(path, TrainConfig)
    path.write_text("name: mine\nmultiplier: 5e-1\n", encoding="utf-8")
    assert read_config(path, MixtureDatasetConfig).multiplier == 0.5


def test_differences() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": 3, "e": {"f": None}}, "gone": 0}
    new = {"a": 1, "b": {"c": [1, 3], "d": 4, "e": {"f": "x"}}, "come": 5}
    assert differences(old, old, ignore=()) == []
    assert differences(old, new, ignore=()) == [
        "b.c: [1, 2] -> [1, 3]",
        "b.d: 3 -> 4",
        "b.e.f: None -> x",
        "come: None -> 5",
        "gone: 0 -> None",
    ]
    assert differences(old, new, ignore=("b", "come", "gone")) == []
    assert differences(old, new, ignore=("b.e", "b.c", "come", "gone")) == ["b.d: 3 -> 4"]


def test_differences_in_a_list_of_sections_are_named_by_number() -> None:
    old = {"phases": [{"steps": 1, "name": "a"}, {"steps": 2, "name": "b"}]}
    new = {"phases": [{"steps": 1, "name": "a"}, {"steps": 3, "name": "b"}]}
    assert differences(old, new, ignore=()) == ["phases.1.steps: 2 -> 3"]
    shorter = {"phases": new["phases"][:1]}
    assert differences(old, shorter, ignore=()) == ["phases.1: {'steps': 2, 'name': 'b'} -> None"]


def test_a_resumed_run_may_change_what_does_not_change_results() -> None:
    from instructblip.training.resume import _FREE

    assert set(_FREE) <= set(valid_keys(TrainConfig))
    base = to_dict(validate(_own(_compose("train", [])), TrainConfig))
    other = to_dict(validate(_own(_compose("train", ["data.workers=3", "logger=wandb", "resume=auto"])), TrainConfig))
    assert differences(base, other, ignore=_FREE) == []
    longer = to_dict(validate(_own(_compose("train", ["recipe.phases.alignment.steps=3"])), TrainConfig))
    steps = base["recipe"]["phases"]["alignment"]["steps"]
    assert differences(base, longer, ignore=_FREE) == [f"recipe.phases.alignment.steps: {steps} -> 3"]
