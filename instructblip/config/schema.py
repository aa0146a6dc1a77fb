"""The schema of every configuration: what may be set, of which type, among which choices, within which bounds.

Hydra composes YAML files; `config.validate` turns the result into these dataclasses. A key without a default must be set;
any other may be left out of every YAML file and still be set on the command line. What goes together is in `config.checks`.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from instructblip.errors import UserError
from instructblip.files import sha256_digits, shipped

Schema = TypeVar("Schema")

CONFIGS = shipped("configs")


class Section:
    """Base of all dataclasses that are read from YAML: no unknown keys, no conversions, no numbers that are not finite."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    NOT_SAID: ClassVar[tuple[str, ...]] = ()  # what code sets, and no file may


# --- choices ---------------------------------------------------------------------------------------------------------

Dtype = Literal["float32", "bfloat16", "float16"]
VisionNorm = Literal["layer", "channel", "none"]
VisionInit = Literal["file", "scratch"]
QFormerInit = Literal["bert", "given", "scratch"]
TextInit = Literal["bert", "scratch"]
QueryInit = Literal["normal", "cls"]
ModelKind = Literal[
    "instructblip", "blip2", "blip2_stage1", "blip_caption", "blip_vqa", "blip_retrieval", "blip_pretrain"
]
ConnectorKind = Literal["qformer", "mlp", "linear", "resampler"]
Budget = Literal["parameters", "tokens", "flops"]
LLMKind = Literal["decoder", "encoder_decoder"]
TrainMode = Literal["frozen", "full", "lora"]
WholeMode = Literal["frozen", "full"]
PartName = Literal["vision", "qformer", "connector", "text", "llm"]
Quantization = Literal["int8", "nf4", "fp8"]
LavisProjection = Literal["llm_proj", "t5_proj", "opt_proj"]
Converter = Literal["gguf", "efficientnet_pth"]
Weighting = Literal["sqrt", "proportional", "uniform", "temperature"]
MixedPer = Literal["sample", "image", "batch", "step"]
Transform = Literal[
    "resize_square",
    "center_crop",
    "blip2_image_train",
    "blip_image_train",
    "blip_image_pretrain",
    "clip_image_train",
]
TextProcessor = Literal["none", "blip_caption", "blip_question", "capitalize"]
BatchingKind = Literal["fixed", "bucketed", "packed"]
Ahead = Literal["none", "copies", "vision"]
PackedAttention = Literal["dense", "by_length"]
Gather = Literal["gradient", "detached"]
Precision = Literal["fp32", "bf16"]
EvaluationPrecision = Literal["fp32", "bf16", "tf32"]
LossMean = Literal["global", "micro_batch"]
ParallelKind = Literal["single", "ddp", "fsdp"]
LoggerKind = Literal["none", "wandb", "tensorboard", "mlflow"]
LoggerMode = Literal["offline", "online"]
GPUName = Literal["a100_40", "a100_80", "h100", "h200", "l40s", "rtx_4090"]
Mode = Literal["rank", "generate", "retrieve", "match"]
Preset = Literal["paper", "lavis", "lmms_eval"]
OcrLibrary = Literal["rapidocr"]
Missing = Literal["stop", "skip"]
CapFiltVariant = Literal["blip", "blip2"]
StudyForm = Literal["reduced", "short", "full"]
Normalize = Literal["sum", "mean"]
CardTask = Literal["vqa", "captioning", "multiple_choice", "classification", "statement", "conversation"]
# Scores that a card may name; `evaluation.metrics.METRICS` has them all.
MetricName = Literal[
    "accuracy",
    "multiple_choice_accuracy",
    "aokvqa_multiple_choice",
    "aokvqa_direct_answer",
    "exact_match",
    "vqa_accuracy",
    "vqa_accuracy_lavis",
    "textvqa_accuracy",
    "vizwiz_accuracy",
    "vizwiz_accuracy_lmms_eval",
    "gqa_accuracy",
    "gqa_accuracy_lavis",
    "gqa_accuracy_lmms_eval",
    "anls_lmms_eval",
    "letter_accuracy_lmms_eval",
    "ocr_vqa_accuracy",
    "ivqa_accuracy",
    "cider",
    "rouge_l",
    "auroc",
    "retrieval_recall",
    "visdial",
]

# --- bounds ----------------------------------------------------------------------------------------------------------

AtLeastOne = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what numpy's and torch's streams both take
NotNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
LayerDecay = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]


def _check_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", name):
        raise ValueError("use auto, cpu or cuda")
    return name


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else [] if value is None else value


Device = Annotated[str, AfterValidator(_check_device)]
OneOrMore = Annotated[list[str], BeforeValidator(_as_list)]  # a text alone is a list of one, null of none
LoggerKinds = Annotated[list[LoggerKind], BeforeValidator(_as_list)]

# --- texts that become paths, or words of a command -------------------------------------------------------------------

# A configuration may come with somebody's run. Names of parts are names of folders in the cache, a hash names a file there,
# and pip takes a project that begins with a dash for an option.


def _matching(pattern: str, wanted: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text) or ".." in text.split("/"):
            raise ValueError(wanted)
        return text

    return AfterValidator(check)


PartFolder = Annotated[str, _matching(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,199}", "give a name, not a path")]
Sha256 = Annotated[str, AfterValidator(sha256_digits)]
Project = Annotated[str, _matching(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", "give the name of a Python project")]
Version = Annotated[str, _matching(r"[0-9][A-Za-z0-9.!+_-]*", "give a version, such as 1.0.2")]
Revision = Annotated[str, _matching(r"[A-Za-z0-9_][A-Za-z0-9_./-]*", "give a commit, tag or branch")]

# --- options for timm and transformers --------------------------------------------------------------------------------

# They would also take files to unpickle, code to fetch and settings of other libraries.
VisionOption = Literal[
    "act_layer", "attn_drop_rate", "class_token", "depth", "depths", "dims", "drop_path_rate", "drop_rate",
    "dynamic_img_pad", "dynamic_img_size", "embed_dim", "embed_dims", "img_size", "init_values", "layers",
    "ls_init_value", "mlp_ratio", "mlp_ratios", "no_embed_class", "num_heads", "output_stride", "patch_drop_rate",
    "patch_size", "pos_drop_rate", "pre_norm", "proj_drop_rate", "qk_norm", "qkv_bias", "reg_tokens", "scale_mlp",
    "strict_img_size", "swiglu_mlp", "use_abs_pos_emb", "use_rot_pos_emb", "window_size",
]  # fmt: skip
LLMOption = Literal[
    "activation_dropout", "activation_function", "attention_dropout", "attention_multiplier",
    "attention_probs_dropout_prob", "attn_logit_softcapping", "attn_pdrop", "d_ff", "d_kv", "d_model", "dense_act_fn",
    "dropout", "dropout_rate", "embd_pdrop", "embedding_multiplier", "feed_forward_proj", "ffn_dim",
    "final_logit_softcapping", "head_dim", "hidden_act", "hidden_activation", "hidden_dropout", "hidden_dropout_prob",
    "hidden_size", "initializer_range", "intermediate_size", "layer_norm_eps", "layer_norm_epsilon", "layerdrop",
    "logit_scale", "logits_scaling", "max_position_embeddings", "max_window_layers", "num_attention_heads",
    "num_decoder_layers", "num_heads", "num_hidden_layers", "num_key_value_heads", "num_layers",
    "relative_attention_max_distance", "relative_attention_num_buckets", "resid_pdrop", "residual_dropout",
    "residual_multiplier", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window",
    "tie_word_embeddings", "use_sliding_window",
]  # fmt: skip


def _check_plain_options(options: dict[str, Any]) -> dict[str, Any]:
    """Numbers, true and false, plain words, and lists or one level of keys of those."""
    for name, value in options.items():
        values = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
        for inner in values:
            if isinstance(inner, list | dict) or (isinstance(inner, str) and not re.fullmatch(r"\w{1,40}", inner)):
                raise ValueError(f"{name} must be a number, true or false, or a word, or a list of those")
    return options


VisionOptions = Annotated[dict[VisionOption, Any], AfterValidator(_check_plain_options)]
LLMOptions = Annotated[dict[LLMOption, Any], AfterValidator(_check_plain_options)]

# --- sections --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class WheelConfig(Section):
    """A wheel of the Python registry that carries a part's files."""

    project: Project
    version: Version
    sha256: Sha256
    bytes: AtLeastOne
    files: dict[str, str]  # member (or prefix ending in /) -> name in the part's folder


@dataclass(kw_only=True)
class SourcesConfig(Section):
    """Where a part's files come from; see `fetch/parts.py` for the order."""

    path: str | None = None
    wheel: WheelConfig | None = None
    hub: str | None = None
    hub_revision: Revision | None = None
    hub_files: list[str] | None = None
    convert: Converter | None = None  # what makes safetensors of a wheel's files


@dataclass(kw_only=True)
class VisionConfig(Section):
    """The image encoder."""

    name: PartFolder
    sources: SourcesConfig = field(default_factory=SourcesConfig)
    init: VisionInit = "file"  # scratch: drawn, or given by init_from=; no file is opened
    backbone: str
    options: VisionOptions = field(default_factory=dict)  # of timm.create_model
    dtype: Dtype = "float32"
    image_size: AtLeastOne
    mean: Channels
    std: Channels
    layers: list[str] = field(default_factory=list)
    grid: AtLeastOne | None = None
    final_norm: bool = True  # false leaves the backbone's own last norm out
    # layer: trainable ln_vision; channel: fixed statistics measured on training images; none: as BLIP, whose encoder keeps
    # its own
    norm: VisionNorm = "layer"
    norm_eps: PositiveFloat = 1e-5  # of norm=layer; with norm=none that of the encoder's own norms


@dataclass(kw_only=True)
class QFormerConfig(Section):
    """The trainable Q-Former and what it starts from."""

    name: PartFolder
    sources: SourcesConfig = field(default_factory=SourcesConfig)  # BERT: sizes, tokenizer and, for init=bert, weights
    init: QFormerInit = "bert"  # given: it has no weights of its own, init_from= must give them
    stage1: str | None = None  # the same as init_from=[stage1, stage2]: files of BLIP-2's two stages
    stage2: str | None = None
    aligned_to: str | None = None  # name of the LLM that init_from's weights were trained with, where they do not say
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
class ConnectorConfig(Section):
    """What makes tokens of the LLM's width of image tokens. The Q-Former's own settings are the section `qformer`."""

    kind: ConnectorKind = "qformer"
    # What each kind reads of the rest, `checks.CONNECTOR` says.
    # Budgets that equal those of the Q-Former which `qformer` describes: parameters that train choose hidden_width; visual
    # tokens, or FLOPs of a training step, choose tokens. Empty: sizes are as they stand here.
    match: Annotated[list[Budget], BeforeValidator(_as_list)] = field(default_factory=list)
    class_token: bool = False  # a ViT's [CLS] is read too
    tokens: AtLeastOne | None = None  # of a frame, for the LLM. mlp, linear: average-pooled patches; null: all of them
    hidden_width: AtLeastOne | None = (
        None  # mlp; null: the LLM's width. resampler, of its feed-forwards; null: 4 * width
    )
    width: AtLeastOne | None = None  # of the resampler's latents; null: that of the image tokens
    depth: AtLeastOne = 6
    heads: AtLeastOne = 8


@dataclass(kw_only=True)
class TextConfig(Section):
    """BLIP's text model: what its encoder, its decoder or both are made of, and what they start from."""

    name: PartFolder
    sources: SourcesConfig = field(default_factory=SourcesConfig)  # BERT: sizes, tokenizer and, for init=bert, weights
    init: TextInit = "bert"
    sizes: dict[str, Any] = field(default_factory=dict)  # as in BERT's config.json, for what opens no file: a plan
    layers: AtLeastOne | None = None  # the first ones of BERT's; null: all
    dropout: Decay = 0.1


@dataclass(kw_only=True)
class LLMConfig(Section):
    """The frozen language model and its text conventions."""

    name: PartFolder
    sources: SourcesConfig = field(default_factory=SourcesConfig)
    kind: LLMKind = "decoder"
    dtype: Dtype = "float32"
    quantization: Quantization | None = None  # of its linear layers; None keeps dtype
    options: LLMOptions = field(default_factory=dict)  # values that replace those of the model's own config.json
    sizes: dict[str, Any] = field(default_factory=dict)  # as in that file, for a plan; empty: read from it
    eos_token: str
    pad_token: str
    bos_token: str | None = None
    unk_token: str | None = None  # null: the tokenizer's own
    added_tokens: list[str] = field(default_factory=list)
    image_prefix: str = ""  # text in front of the visual tokens
    prompt_prefix: str = ""  # text between them and the prompt
    prompt_suffix: str = ""  # text after the prompt
    answer_prefix: str = ""  # text before an answer that follows a text
    # BOS in front of all, and image_prefix and prompt cut as one text with the image in it, as LLaVA's processor does
    image_in_text: bool = False
    supervise_bos: bool = (
        False  # without a prompt BOS is learned as the answer's first token, as in BLIP-2's OPT models
    )
    max_prompt_tokens: AtLeastOne = 128
    max_target_tokens: AtLeastOne = 256
    lavis_projection: LavisProjection | None = None  # as LAVIS's files trained with this LLM call it


@dataclass(kw_only=True)
class ArchitectureConfig(Section):
    """Which model the parts are put together to."""

    kind: ModelKind = "instructblip"
    # What each kind reads of the rest, `checks.ARCHITECTURE` says.
    feature_width: AtLeastOne = 256  # of the features that image and text are contrasted by
    max_text_tokens: AtLeastOne = 32
    temperature: PositiveFloat = 0.07  # that similarities are divided by; trained from here on
    language_model_head: bool = True  # false: it does not caption, as transformers' retrieval models
    prompt: str = "a picture of "  # that a caption begins with
    enc_token: bool = True  # a text that reads an image begins with [ENC]; false: with [CLS], as in transformers
    queue_size: AtLeastOne | None = None  # pairs whose momentum features are contrasted with; null: no momentum copies


@dataclass(kw_only=True)
class ModelConfig(Section):
    """All that a model is built from."""

    seed: Seed = 0
    model: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    vision: VisionConfig
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    qformer: QFormerConfig | None = None  # BLIP has none; beside another connector it is what that is matched with
    text: TextConfig | None = None  # BLIP alone has one
    llm: LLMConfig | None = None  # BLIP and BLIP-2's first stage have none

    def has_qformer(self) -> bool:
        """Whether the model has one; the section `qformer` may also be what another connector is matched with."""
        return self.qformer is not None and self.connector.kind == "qformer"

    def absent_parts(self) -> set[PartName]:
        """Which of the parts that train by default it has not."""
        has: dict[PartName, bool] = {
            "qformer": self.has_qformer(),
            "connector": self.connector.kind != "qformer",
            "text": self.text is not None,
        }
        return {part for part, there in has.items() if not there}

    def said(self) -> str:
        """What the model is called in messages, as it is set."""
        if self.connector.kind == "qformer":
            return f"model={self.model.kind}"
        return f"connector={self.connector.kind}"

    def reads_prefixes(self) -> bool:
        """Whether captions are cut for prefix language modelling: BLIP-2's second stage with an encoder-decoder."""
        return self.model.kind == "blip2" and self.llm is not None and self.llm.kind == "encoder_decoder"

    def q_former(self) -> QFormerConfig:
        """The Q-Former, of a model that has one.

        Raises:
            UserError: it is missing.
        """
        if self.qformer is None:
            raise UserError(f"model={self.model.kind} needs a Q-Former; give qformer=NAME, one of configs/qformer")
        return self.qformer

    def text_model(self) -> TextConfig:
        """The text model, of a BLIP.

        Raises:
            UserError: it is missing.
        """
        if self.text is None:
            raise UserError(f"model={self.model.kind} needs a text model; give text=NAME, one of configs/text")
        return self.text

    def language_model(self) -> LLMConfig:
        """The language model, of a model that has one.

        Raises:
            UserError: it is missing.
        """
        if self.llm is None:
            raise UserError(f"model={self.model.kind} needs a language model; give llm=NAME, one of configs/llm")
        return self.llm


@dataclass(kw_only=True)
class MixtureDatasetConfig(Section):
    """One training dataset of a mixture."""

    name: str  # of its card, or the path of a card of one's own
    multiplier: PositiveFloat = 1.0


@dataclass(kw_only=True)
class MixtureConfig(Section):
    """What is trained on and how it is weighted."""

    name: str
    finetuning: bool = False  # may train on held-out datasets, which are zero-shot no more
    datasets: Annotated[list[MixtureDatasetConfig], Field(min_length=1)]
    weights: Weighting = "sqrt"
    temperature: PositiveFloat | None = None  # T of p_d ~ n_d ** (1 / T), for weights=temperature
    per: MixedPer = "sample"  # what comes from one dataset; image: several records of one image, as far as it has them
    image_records: AtLeastOne = 5  # so many, with per=image
    templates: str | None = None  # in place of those of the cards: a name in datasets/templates


@dataclass(kw_only=True)
class SuiteConfig(Section):
    """Which cards are evaluated: by name, or by the path of a card of one's own."""

    name: str
    held_in: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    missing: Missing = "stop"  # what a dataset that is not prepared does; skip: the others are evaluated without it


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
    sources: dict[PartFolder, SourcesConfig] = field(default_factory=dict)  # raw data that may be fetched, by dataset
    stream: bool = (
        False  # training reads shards from first to last, without their indexes; also tars that nobody prepared
    )
    workers: NotNegative = 0
    cache_features: bool = False
    transform: Transform = "resize_square"  # of training images
    text_processor: TextProcessor = "none"  # of the texts that training teaches; blip_caption: as the released code's
    prompt_processor: TextProcessor = (
        "none"  # of the prompts before them; blip_question: as the released BLIP's for VQA
    )
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
    # Of objectives over the whole batch. detached: what they compare a sample with has no gradient, as in the released code.
    gather: Gather = "gradient"
    soft_targets: Fraction = 0.4  # of distillation: share of the momentum copies' likelihoods in the targets
    soft_targets_ramp: NotNegative = 0  # steps of the phase over which that share grows from 0
    # Of matching: wrong pairs are drawn among so many samples in a row; None: among all of the global batch.
    negatives_among: AtLeastOne | None = None
    plateau_steps: AtLeastOne | None = None  # None: a cosine of every step; 3000: the released code's staircase
    plateau_decay: PositiveFloat | None = None  # factor from plateau to plateau, in place of the cosine


@dataclass(kw_only=True)
class RecipeConfig(Section):
    """Optimisation, and what is done on the way."""

    name: str
    phases: Annotated[dict[str, PhaseConfig], Field(min_length=1)]  # by name, in this order
    weight_decay: NotNegativeFloat = 0.05
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = field(default_factory=lambda: [0.9, 0.999])
    clip_norm: PositiveFloat | None = 1.0
    precision: Precision = "fp32"  # bf16: autocast over float32 weights of what trains
    # global: over the units of the global batch. micro_batch: over those of each micro-batch, then over micro-batches and
    # ranks, as the released code has it.
    loss_mean: LossMean = "global"
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
class AdapterConfig(Section):
    """Low-rank adapters of a part whose mode is lora."""

    rank: AtLeastOne = 16
    alpha: PositiveFloat = 32.0  # the adapter's product is multiplied by alpha / rank
    dropout: Decay = 0.05  # on what an adapter reads, in training
    # Linear layers of the part's blocks, by name or the end of it; all-linear. Empty: the usual ones, see docs/train.md.
    targets: OneOrMore = field(default_factory=list)


@dataclass(kw_only=True)
class AdaptersConfig(Section):
    """Low-rank adapters by part."""

    vision: AdapterConfig = field(default_factory=AdapterConfig)
    qformer: AdapterConfig = field(default_factory=AdapterConfig)
    text: AdapterConfig = field(default_factory=AdapterConfig)
    llm: AdapterConfig = field(default_factory=AdapterConfig)


@dataclass(kw_only=True)
class TrainedPartsConfig(Section):
    """What of the model trains: nothing of a part, all of it, or low-rank adapters on its layers."""

    vision: TrainMode = "frozen"
    qformer: TrainMode = "full"  # with its normalisation of image tokens and the projection into the LLM
    connector: WholeMode = "full"  # one that is no Q-Former, with its normalisation of image tokens
    text: TrainMode = "full"  # BLIP's text models and heads
    llm: TrainMode = "frozen"
    lora: AdaptersConfig = field(default_factory=AdaptersConfig)  # of the parts that are lora
    learning_rates: dict[PartName, PositiveFloat] = field(
        default_factory=dict
    )  # of a part: peak, in place of its phase's
    layer_decay: LayerDecay = 1.0  # of the vision encoder's learning rate, from each block to the one before

    def parts(self, model: ModelConfig) -> tuple[str, ...]:
        """The names of the parts that train, in full or by adapters, of those that the model has."""
        parts = [part for part in get_args(PartName) if part not in model.absent_parts()]
        return tuple(part for part in parts if getattr(self, part) != "frozen")

    def adapted(self, model: ModelConfig) -> tuple[str, ...]:
        """Of those the ones that train by adapters."""
        return tuple(part for part in self.parts(model) if getattr(self, part) == "lora")


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
    packed_attention: PackedAttention = "dense"  # by_length: kernels that take the samples' lengths in place of a mask
    # On a stream of their own, the next step's images: their copies, or also their passes through a frozen vision encoder.
    ahead: Ahead = "none"
    read_every: AtLeastOne = 1  # steps whose losses and sample ids are read from the devices together
    timeout: PositiveFloat = (
        600.0  # seconds that a process, a rank or a data worker, may be silent before the others end
    )


@dataclass(kw_only=True)
class LoggerConfig(Section):
    """Experiment trackers beside metrics.jsonl."""

    kind: LoggerKinds = field(default_factory=lambda: ["none"])  # one, or a list of several
    mode: LoggerMode = "offline"
    project: str = "instructblip"
    samples: NotNegative = 8  # pictures with their answers that a tracker gets of each dataset scored


@dataclass(kw_only=True)
class TrainConfig(ModelConfig):
    """Everything train.py reads."""

    name: str
    output: str = "outputs/train"
    device: Device = "auto"
    # Weights to start from at step 0: a run or one of its checkpoints, a transformers folder or hub id, a .pth of LAVIS.
    # Later ones lie over earlier ones.
    init_from: OneOrMore = field(default_factory=list)
    init_sha256: OneOrMore = field(default_factory=list)  # their fingerprints; a run writes them, others are refused
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
    adapter: str | None = None  # folder in peft's format, whose adapters the checkpoint gets
    split: str | None = None  # None takes each card's own
    mode: Mode | None = None  # None takes each card's own
    preset: Preset = "paper"  # lavis: what the released code computes; lmms_eval: what that harness asks
    precision: EvaluationPrecision = "fp32"  # of matrix products of what is held in float32; part of the protocol
    samples: AtLeastOne | None = None  # per dataset; None is all of them
    rerank: AtLeastOne | None = None  # in retrieval, how many of the nearest are matched; None takes each card's own
    normalize: Normalize | None = None  # of candidates' log-likelihoods; None takes each card's own, as the next does
    include_eos: bool | None = None
    answers: str | None = None  # the list of a card that ranks one (`candidates_from: answer_list`)
    withhold_images: bool = False
    blind_baseline: bool = False
    allow_untrained: bool = False  # evaluate a model of which a part was drawn and never trained
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
    seed: Seed = 0
    audit: list[str] | None = None
    cards: list[str] = field(
        default_factory=list
    )  # paths of own cards that show= and audit= know besides the official ones
    sources: dict[PartFolder, SourcesConfig] = field(default_factory=dict)


@dataclass(kw_only=True)
class FeaturesConfig(Section):
    """Everything `python -m instructblip.features` reads."""

    checkpoint: str
    images: str | None = None
    texts: str | None = None
    out: str = "features.safetensors"
    device: Device = "auto"
    batch_size: AtLeastOne = 64
    tolerance: NotNegative = 0  # damaged pictures that are left out
    vision_path: str | None = None
    qformer_path: str | None = None


@dataclass(kw_only=True)
class DemoLimitsConfig(Section):
    """What a visitor of the page may give at most."""

    bytes: AtLeastOne = 20_000_000  # of a picture's file
    pixels: AtLeastOne = 50_000_000  # of a picture
    characters: AtLeastOne = 2000  # of a prompt, a candidate, a text
    candidates: Annotated[int, Field(ge=2)] = 50
    new_tokens: AtLeastOne = 128
    beams: AtLeastOne = 8


@dataclass(kw_only=True)
class DemoConfig(Section):
    """Everything `python -m instructblip.demo` reads."""

    checkpoint: str  # a run or one of its checkpoints, a transformers folder or hub id, a .pth file of LAVIS
    llm: LLMConfig | None = None  # of a .pth file, or in place of the checkpoint's own
    adapter: str | None = None  # folder in peft's format, whose adapters the checkpoint gets
    beside: str | None = None  # a second checkpoint, asked the same
    beside_llm: LLMConfig | None = None
    beside_adapter: str | None = None
    vision_path: str | None = None
    qformer_path: str | None = None
    device: Device = "auto"
    examples: str | None = (
        None  # folder of pictures; None: of the data that a run was scored on, where they are at hand
    )
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] | None = None  # None: the first free one from 7860
    share: bool = False
    queue: AtLeastOne = 16  # requests that wait
    limits: DemoLimitsConfig = field(default_factory=DemoLimitsConfig)


@dataclass(kw_only=True)
class CapFiltConfig(Section):
    """Everything `python -m instructblip.capfilt` reads."""

    shards: str  # folder of prepared splits, or the card of tars that are not prepared
    captioner: str
    filter: str  # variant=blip: what matches pictures and texts; blip2: a CLIP
    out: str
    variant: CapFiltVariant = "blip"
    split: str = "train"
    prompt: str | None = None  # of a captioner that reads one
    captions: AtLeastOne | None = None  # drawn for each picture; None: 1, or 10 of variant=blip2
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_new_tokens: AtLeastOne | None = None  # these three: None is as the captioner was released
    min_new_tokens: NotNegative | None = None
    repetition_penalty: PositiveFloat | None = None
    threshold: Annotated[float, Field(ge=0, lt=1)] | None = None  # of variant=blip; None: 0.5
    kept: AtLeastOne | None = None  # of variant=blip2; None: 2
    text_processor: TextProcessor | None = (
        None  # of what the filter reads; None: blip_caption, or none of variant=blip2
    )
    seed: Seed = 0
    tolerance: NotNegative = 0  # damaged pictures, per shard, that are counted and left out
    llm: LLMConfig | None = None  # of a captioner that is a .pth file, or in place of its own
    vision_path: str | None = None
    qformer_path: str | None = None
    device: Device = "auto"
    batch_size: AtLeastOne = 64


@dataclass(kw_only=True)
class InspectConfig(Section):
    """Everything `python -m instructblip.training.inspect` reads."""

    mixture: MixtureConfig
    data: DataConfig = field(default_factory=DataConfig)
    seed: Seed = 0
    image_size: AtLeastOne = 224
    steps: AtLeastOne = 60_000  # of the run that is planned
    batch_size: AtLeastOne = 128
    micro_batch_size: AtLeastOne | None = None  # for mixture.per=batch
    samples: NotNegative = 8  # shown
    timed: AtLeastOne = 1024  # samples that the loader is timed over
    workers: NotNegative = 0


@dataclass(kw_only=True)
class StudyStageConfig(Section):
    """A training run that conditions of a study start from; nothing is scored in it."""

    train: list[str] = field(default_factory=list)  # overrides of train.py, after those of the study
    starts_from: str | None = None  # the stage or condition whose weights of the same seed it begins with
    forms: dict[StudyForm, list[str]] = field(default_factory=dict)  # further ones, in a form


@dataclass(kw_only=True)
class StudyConditionConfig(StudyStageConfig):
    """What a study compares: a training run a seed, or another way to evaluate that of another condition."""

    evaluates: str | None = None  # the condition whose run this one evaluates, in place of a run of its own
    evaluate: list[str] = field(default_factory=list)  # overrides of evaluate.py, after those of the study


@dataclass(kw_only=True)
class StudyFormConfig(Section):
    """How large a study is: the cost of its runs, and how many there are."""

    train: list[str] = field(default_factory=list)
    evaluate: list[str] = field(default_factory=list)
    seeds: AtLeastOne | None = None  # the first so many; None: all


@dataclass(kw_only=True)
class StudyConfig(Section):
    """A question, the conditions that answer it, and what they are compared by."""

    name: PartFolder
    question: str
    train: list[str]  # overrides of train.py, of all runs
    evaluate: list[str] = field(default_factory=list)  # of evaluate.py, of conditions with `evaluates`
    stages: dict[PartFolder, StudyStageConfig] = field(default_factory=dict)
    conditions: Annotated[dict[PartFolder, StudyConditionConfig], Field(min_length=2)]  # the first is the reference
    datasets: list[str] = field(default_factory=list)  # whose scores are compared; empty: all that have one
    seeds: Annotated[list[Seed], Field(min_length=1)]
    forms: dict[StudyForm, StudyFormConfig] = field(default_factory=dict)


@dataclass(kw_only=True)
class StudyCommandConfig(Section):
    """Everything `python -m instructblip.study` reads."""

    study: StudyConfig
    name: str
    output: str = "outputs/study"
    form: StudyForm = "reduced"
    seeds: list[Seed] | None = None  # in place of the study's
    train: list[str] = field(default_factory=list)  # further overrides of train.py, of all runs
    evaluate: list[str] = field(default_factory=list)
    jobs: AtLeastOne = 1  # runs at a time
    threads: AtLeastOne | None = None  # of each; None: as many cores as there are a job; on a cluster, its own
    plan: bool = False  # print the runs and what would start each, and end
