"""The schema of every configuration: what may be set, of which type. Read by the entry points and the run.py files only.

Hydra composes YAML files; `validate` turns the result into these dataclasses, so a misspelt key or a wrong type stops a run
at its start with the key's name and the nearest valid one.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from instructblip.errors import UserError

Schema = TypeVar("Schema")


@dataclass
class WheelConfig:
    """A wheel of the Python registry that carries a part's files."""

    project: str = MISSING
    version: str = MISSING
    sha256: str = MISSING
    bytes: int = MISSING
    files: dict[str, str] = MISSING  # member (or prefix ending in /) -> name in the part's folder


@dataclass
class SourcesConfig:
    """Where a part's files come from; see `weights/assets.py` for the order."""

    path: str | None = None
    wheel: WheelConfig | None = None
    hub: str | None = None
    hub_revision: str | None = None
    hub_files: list[str] | None = None
    convert: str | None = None


@dataclass
class VisionConfig:
    """The frozen image encoder."""

    name: str = MISSING
    sources: SourcesConfig = field(default_factory=SourcesConfig)
    backbone: str = MISSING
    image_size: int = MISSING
    mean: list[float] = MISSING
    std: list[float] = MISSING
    layers: list[str] = field(default_factory=list)
    grid: int | None = None
    norm: str = "layer"  # layer: trainable ln_vision; channel: fixed statistics measured on training images


@dataclass
class QFormerConfig:
    """The trainable Q-Former and where its text branch starts from."""

    name: str = MISSING
    sources: SourcesConfig = field(default_factory=SourcesConfig)
    queries: int = 32
    cross_attention_every: int = 2
    dropout: float = 0.1
    instruction_aware: bool = True
    max_instruction_tokens: int = 128
    train_text_embeddings: bool = True


@dataclass
class LLMConfig:
    """The frozen language model and its text conventions."""

    name: str = MISSING
    sources: SourcesConfig = field(default_factory=SourcesConfig)
    dtype: str = "float32"
    eos_token: str = MISSING
    pad_token: str = MISSING
    bos_token: str | None = None
    answer_prefix: str = ""
    max_prompt_tokens: int = 128
    max_target_tokens: int = 256


@dataclass
class MixtureDatasetConfig:
    """One training dataset of a mixture."""

    name: str = MISSING
    multiplier: float = 1.0


@dataclass
class MixtureConfig:
    """What is trained on and how it is weighted."""

    name: str = MISSING
    datasets: list[MixtureDatasetConfig] = MISSING
    weights: str = "sqrt"


@dataclass
class SuiteConfig:
    """Which cards are evaluated."""

    name: str = MISSING
    held_in: list[str] = MISSING
    held_out: list[str] = MISSING


@dataclass
class DataConfig:
    """Where prepared shards lie and how they are read."""

    shards: str = "data/shards"
    sources: dict[str, SourcesConfig] = field(default_factory=dict)  # raw data that may be fetched, by dataset
    workers: int = 0
    cache_features: bool = False


@dataclass
class PhaseConfig:
    """One stretch of training with its own length, batch and schedule."""

    name: str = MISSING
    steps: int = MISSING
    batch_size: int = MISSING
    micro_batch_size: int | None = None  # None: the whole batch in one forward pass
    learning_rate: float = MISSING
    warmup_steps: int = 0
    warmup_learning_rate: float = 1e-8
    final_learning_rate: float = 0.0
    through_llm: bool = True


@dataclass
class RecipeConfig:
    """Optimisation, and what is done on the way."""

    name: str = MISSING
    phases: list[PhaseConfig] = MISSING
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    clip_norm: float | None = 1.0
    checkpoint_every: int = MISSING
    keep_checkpoints: int = 2
    validate_every: int = MISSING
    validation_samples: int = MISSING
    final_samples: int | None = MISSING  # per dataset, in the evaluation that ends the run; None is all


@dataclass
class LoggerConfig:
    """An experiment tracker beside metrics.jsonl."""

    kind: str = "none"
    mode: str = "offline"  # or online
    project: str = "instructblip"


@dataclass
class TrainConfig:
    """Everything train.py reads."""

    name: str = MISSING
    output: str = "outputs/train"
    seed: int = 0
    device: str = "auto"
    resume: str | None = None
    vision: VisionConfig = field(default_factory=VisionConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class EvaluateConfig:
    """Everything evaluate.py reads."""

    name: str = MISSING
    output: str = "outputs/evaluate"
    device: str = "auto"
    checkpoint: str = MISSING
    split: str | None = None  # None takes each card's own
    mode: str | None = None  # rank or generate; None takes each card's own
    samples: int | None = None  # per dataset; None is all of them
    withhold_images: bool = False
    blind_baseline: bool = False
    batch_size: int = 32
    examples: int = 60
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    data: DataConfig = field(default_factory=DataConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class PrepareConfig:
    """Everything prepare.py reads."""

    dataset: str | None = None
    raw: str | None = None
    out: str = "data/shards"
    split: str | None = None
    workers: int = 1
    images_per_shard: int = 1000
    check: str | None = None
    sources: dict[str, SourcesConfig] = field(default_factory=dict)


def validate(config: DictConfig, schema: type[Schema]) -> Schema:
    """Check a composed configuration against its dataclass and return it as one.

    Raises:
        UserError: an unknown key (with the nearest valid one), a wrong type, or a value that must be given.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), config)
        result = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise UserError(unknown_key(str(error.full_key or error.key), valid_keys(schema))) from None
    except MissingMandatoryValue as error:
        raise UserError(f"the configuration needs a value for {error.full_key}; give {error.full_key}=...") from None
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"configuration key {error.full_key}: {reason}; give a value of the right type") from None
    assert isinstance(result, schema)
    return result


def unknown_key(key: str, valid: list[str]) -> str:
    """The message for a key that does not exist, naming the nearest one that does."""
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    leaf = difflib.get_close_matches(key.split(".")[-1], [name.split(".")[-1] for name in valid], n=1, cutoff=0.6)
    same_leaf = [name for name in valid if leaf and name.split(".")[-1] == leaf[0]]
    nearest = near or same_leaf[:1]
    hint = f"did you mean {nearest[0]}?" if nearest else f"the keys are: {', '.join(valid)}"
    return f"unknown configuration key {key}; {hint}"


def valid_keys(schema: Any, prefix: str = "") -> list[str]:
    """Dotted names of every key of a dataclass schema, inner ones included."""
    names = []
    for item in dataclasses.fields(schema):
        names.append(prefix + item.name)
        default = item.default_factory if item.default_factory is not dataclasses.MISSING else None
        if isinstance(default, type) and dataclasses.is_dataclass(default):
            names += valid_keys(default, f"{prefix}{item.name}.")
    return names


def read_config(path: Path, schema: type[Schema]) -> Schema:
    """Read a run's stored config.yaml.

    Raises:
        UserError: missing, not YAML, or of another schema.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; a checkpoint is used inside the run folder that it was written to")
    try:
        loaded = OmegaConf.load(path)
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    assert isinstance(loaded, DictConfig)
    return validate(loaded, schema)


def to_yaml(config: Any) -> str:
    """A validated configuration as YAML that `read_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Any) -> dict[str, Any]:
    """A validated configuration as plain values."""
    return dataclasses.asdict(config)


def differences(old: dict[str, Any], new: dict[str, Any], *, ignore: tuple[str, ...], prefix: str = "") -> list[str]:
    """`key: old -> new` for every value that differs, except below the keys in `ignore`."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        name, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if name in ignore or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, ignore=ignore, prefix=f"{name}.")
        else:
            found.append(f"{name}: {before} -> {after}")
    return found
