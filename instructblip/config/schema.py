"""The schema of every configuration: what may be set, of which type. Read by the entry points and the run.py files only.

Hydra composes YAML files; `validate` turns the result into these dataclasses, so a misspelt key or a wrong type stops a run
at its start with the key's name and the nearest valid one.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING

Schema = TypeVar("Schema")

CONFIGS = Path(__file__).parents[2] / "configs"


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
    options: dict[str, Any] = field(default_factory=dict)  # of timm.create_model
    dtype: str = "float32"
    image_size: int = MISSING
    mean: list[float] = MISSING
    std: list[float] = MISSING
    layers: list[str] = field(default_factory=list)
    grid: int | None = None
    final_norm: bool = True  # false leaves the backbone's own last norm out
    norm: str = "layer"  # layer: trainable ln_vision; channel: fixed statistics measured on training images
    norm_eps: float = 1e-5  # of norm=layer


@dataclass
class QFormerConfig:
    """The trainable Q-Former and what it starts from."""

    name: str = MISSING
    sources: SourcesConfig = field(default_factory=SourcesConfig)  # BERT: sizes, tokenizer and, for init=bert, weights
    init: str = "bert"  # bert, blip2 or scratch
    stage1: str | None = None  # init=blip2: LAVIS files of BLIP-2's two stages
    stage2: str | None = None
    aligned_to: str | None = None  # name of the LLM that stage 2 was trained with
    sizes: dict[str, Any] = field(default_factory=dict)  # as in BERT's config.json, for what opens no file: a plan
    extra_tokens: list[str] = field(default_factory=list)
    layers: int | None = None  # the first ones of BERT's; null: all
    queries: int = 32
    query_init: str = "normal"  # or cls: near BERT's [CLS] token, which its attention already knows to read a text with
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
    kind: str = "decoder"  # or encoder_decoder
    dtype: str = "float32"
    quantization: str | None = None  # int8 or nf4
    options: dict[str, Any] = field(default_factory=dict)  # values that replace those of the model's own config.json
    sizes: dict[str, Any] = field(default_factory=dict)  # as in that file, for what opens no file: a plan
    eos_token: str = MISSING
    pad_token: str = MISSING
    bos_token: str | None = None
    unk_token: str | None = None  # null: the tokenizer's own
    added_tokens: list[str] = field(default_factory=list)
    image_prefix: str = ""  # text in front of the visual tokens
    prompt_prefix: str = ""  # text between them and the prompt
    prompt_suffix: str = ""  # text after the prompt
    answer_prefix: str = ""
    max_prompt_tokens: int = 128
    max_target_tokens: int = 256
    lavis_projection: str | None = None  # llm_proj, t5_proj or opt_proj: as LAVIS's files trained with this LLM call it


@dataclass
class ModelConfig:
    """All that a model is built from."""

    seed: int = 0
    vision: VisionConfig = field(default_factory=VisionConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)


@dataclass
class MixtureDatasetConfig:
    """One training dataset of a mixture."""

    name: str = MISSING
    multiplier: float = 1.0


@dataclass
class MixtureConfig:
    """What is trained on and how it is weighted."""

    name: str = MISSING
    finetuning: bool = False  # may train on held-out datasets, which are zero-shot no more
    datasets: list[MixtureDatasetConfig] = MISSING
    weights: str = "sqrt"  # or proportional, uniform, temperature
    temperature: float | None = None  # T of p_d ~ n_d ** (1 / T), for weights=temperature
    per: str = "sample"  # or batch, step: what comes from one dataset


@dataclass
class SuiteConfig:
    """Which cards are evaluated."""

    name: str = MISSING
    held_in: list[str] = MISSING
    held_out: list[str] = MISSING


@dataclass
class ToleranceConfig:
    """How much of a dataset training may lose on the way: whichever of the two is more."""

    fraction: float = 0.001  # of the samples drawn
    samples: int = 10


@dataclass
class DataConfig:
    """Where prepared shards lie and how they are read."""

    shards: str = "data/shards"  # a folder, or a URL that fsspec reads
    synthetic: bool = False  # datasets that are not prepared in it are made up, in place of their official files
    remote_cache_bytes: int = 100_000_000_000  # of shards that are kept on this machine when they come from a URL
    sources: dict[str, SourcesConfig] = field(default_factory=dict)  # raw data that may be fetched, by dataset
    workers: int = 0
    cache_features: bool = False
    transform: str = "resize_square"  # of training images: resize_square, center_crop, or a random one
    tolerance: ToleranceConfig = field(default_factory=ToleranceConfig)


@dataclass
class PhaseConfig:
    """One stretch of training with its own length, batch and schedule."""

    name: str = MISSING
    steps: int = MISSING
    batch_size: int = MISSING
    # How a rank's share of the batch is cut into forward passes, which changes no gradient. fixed: as the samples are drawn;
    # bucketed: samples of like length together; packed: the same, and several samples in a row of a decoder-only LLM.
    batching: str = "fixed"
    micro_batch_size: int | None = None  # samples of a forward pass at most; None: no limit
    micro_batch_tokens: int | None = (
        None  # bucketed, packed: tokens of the LLM in a forward pass at most; None: no limit
    )
    learning_rate: float = MISSING
    warmup_steps: int = 0
    warmup_learning_rate: float = 1e-8
    final_learning_rate: float = 0.0
    new_parts_scale: float = (
        1.0  # learning rate of what BERT does not bring (query tokens, cross-attention), a multiple
    )
    through_llm: bool = True
    plateau_steps: int | None = None  # None: a cosine of every step; 3000: the released code's staircase


@dataclass
class RecipeConfig:
    """Optimisation, and what is done on the way."""

    name: str = MISSING
    phases: list[PhaseConfig] = MISSING
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    clip_norm: float | None = 1.0
    precision: str = "fp32"  # or bf16: autocast over float32 weights of what trains
    non_finite: str = "stop"  # or skip: what a loss or gradient that is not finite does
    average_decay: float | None = None  # moving average of the trained weights, evaluated in their place; such as 0.999
    checkpoint_every: int = MISSING
    keep_checkpoints: int = 2
    keep_best: str | None = None  # also the best: a validation dataset by name, or mean over all of them
    full_disk: str = "stop"  # or continue, without the checkpoint that could not be written
    validate_every: int = MISSING
    validation_samples: int = MISSING
    final_samples: int | None = MISSING  # per dataset, in the evaluation that ends the run; None is all


@dataclass
class ParallelConfig:
    """How the run is laid over processes; changes nothing but speed and memory."""

    kind: str = "ddp"  # single, ddp or fsdp
    shard_size: int | None = None  # fsdp: processes that hold the frozen parts once together; None: all
    activation_checkpointing: bool = False
    compile: bool = False
    timeout: float = 600.0  # seconds that a process may be silent before the others end


@dataclass
class LoggerConfig:
    """An experiment tracker beside metrics.jsonl."""

    kind: str = "none"
    mode: str = "offline"  # or online
    project: str = "instructblip"


@dataclass
class TrainConfig(ModelConfig):
    """Everything train.py reads."""

    name: str = MISSING
    output: str = "outputs/train"
    device: str = "auto"
    resume: str | None = None
    resume_allow: list[str] = field(default_factory=list)  # keys that a resumed run may change
    profile_step: int | None = None  # trace the five steps after this one into trace.json.gz
    plan: bool = False  # print what the run needs and how long it takes, and end
    plan_gpu: str = "a100_40"
    plan_gpus: int | None = None  # None: 16 or what the batches divide among; 1 where parallel=single
    plan_mfu: float = 0.4  # share of the GPU's peak that is reached
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class EvaluateConfig:
    """Everything evaluate.py reads."""

    name: str = MISSING
    output: str = "outputs/evaluate"
    device: str = "auto"
    checkpoint: str = MISSING  # a run or one of its checkpoints, a transformers folder or hub id, a .pth file of LAVIS
    llm: LLMConfig | None = None  # of a .pth file, or in place of the checkpoint's own
    vision_path: str | None = None
    qformer_path: str | None = None
    split: str | None = None  # None takes each card's own
    mode: str | None = None  # rank or generate; None takes each card's own
    preset: str = "paper"  # or lavis, what the released code computes
    samples: int | None = None  # per dataset; None is all of them
    withhold_images: bool = False
    blind_baseline: bool = False
    batch_size: int = 64
    tolerance: int = 0  # damaged samples, per dataset, that are counted and left out
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
    image_size: int | None = None  # shorter side, pixels; None keeps images as they are
    frames: int = 4  # of a video
    ocr: str | None = None  # library that makes OCR tokens on the images; None keeps the dataset's own
    fetch: bool = False
    check: str | None = None
    show: str | None = None
    samples: int = 12
    seed: int = 0
    audit: list[str] | None = None
    sources: dict[str, SourcesConfig] = field(default_factory=dict)


@dataclass
class InspectConfig:
    """Everything `python -m instructblip.training.inspect` reads."""

    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0
    image_size: int = 224
    steps: int = 60_000  # of the run that is planned
    batch_size: int = 128
    micro_batch_size: int | None = None  # for mixture.per=batch
    samples: int = 8  # shown
    timed: int = 1024  # samples that the loader is timed over
    workers: int = 0
