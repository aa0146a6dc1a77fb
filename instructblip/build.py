"""From a validated configuration to a model: three parts by name, put together in the open.

The only place that reads the `vision`, `qformer` and `llm` sections.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from instructblip.config import LLMConfig, QFormerConfig, SourcesConfig, TrainConfig, VisionConfig, read_config
from instructblip.errors import UserError
from instructblip.model.frozen import fingerprint
from instructblip.model.instructblip import InstructBLIP
from instructblip.model.llm import DecoderLLM
from instructblip.model.qformer import QFormer
from instructblip.model.vision import ChannelNorm, VisionEncoder
from instructblip.training.checkpoint import checkpoint_folders, load_checkpoint, newest_whole
from instructblip.weights.assets import Sources, WheelSource, part_folder
from instructblip.weights.bert import qformer_state_from_bert

VISION_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,  # torch's default eps of 1e-5, as released
    "channel": ChannelNorm,
}


class LoadedRun(NamedTuple):
    """A model restored from a run, the run's configuration, and where it came from."""

    model: InstructBLIP
    config: TrainConfig
    checkpoint: Path
    step: int


def build_model(vision: VisionConfig, qformer: QFormerConfig, llm: LLMConfig, *, seed: int) -> InstructBLIP:
    """Fetch the three parts and assemble them; what is new starts from `seed`.

    Raises:
        UserError: a part cannot be fetched, or its settings do not fit its files.
    """
    frozen_vision = load_vision(vision)
    frozen_llm = load_llm(llm)
    torch.manual_seed(seed)
    trainable, tokenizer = load_qformer(qformer, vision_width=frozen_vision.width)
    if vision.norm not in VISION_NORMS:
        raise UserError(f"vision.norm={vision.norm} is none of {', '.join(VISION_NORMS)}")
    return InstructBLIP(
        vision=frozen_vision,
        vision_norm=VISION_NORMS[vision.norm](frozen_vision.width),
        qformer=trainable,
        qformer_tokenizer=tokenizer,
        llm=frozen_llm,
        max_instruction_tokens=qformer.max_instruction_tokens,
    )


def load_vision(config: VisionConfig) -> VisionEncoder:
    """The frozen image encoder with its weights."""
    folder = part_folder(sources(config.name, config.sources), setting="vision.sources.path")
    try:
        encoder = VisionEncoder(
            backbone=config.backbone,
            image_size=config.image_size,
            mean=config.mean,
            std=config.std,
            layers=config.layers,
            grid=config.grid,
        )
    except ValueError as error:
        raise UserError(f"vision={config.name}: {error}") from None
    weights = load_file(folder / "model.safetensors")
    load_exactly(encoder.backbone, weights, f"{folder}/model.safetensors", surplus_ok=("classifier.", "head."))
    return encoder


def load_qformer(config: QFormerConfig, *, vision_width: int) -> tuple[QFormer, Any]:
    """The trainable Q-Former, started from BERT weights, and its tokenizer."""
    folder = part_folder(sources(config.name, config.sources), setting="qformer.sources.path")
    bert = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    qformer = QFormer(
        vocab_size=bert["vocab_size"],
        width=bert["hidden_size"],
        layers=bert["num_hidden_layers"],
        heads=bert["num_attention_heads"],
        hidden_width=bert["intermediate_size"],
        vision_width=vision_width,
        queries=config.queries,
        cross_attention_every=config.cross_attention_every,
        max_text_tokens=bert["max_position_embeddings"],
        dropout=config.dropout,
        norm_eps=bert["layer_norm_eps"],
        instruction_aware=config.instruction_aware,
    )
    state = qformer_state_from_bert(load_file(folder / "model.safetensors"), qformer)
    qformer.load_state_dict(state, strict=False)  # cross-attention and query tokens are new
    if config.instruction_aware:
        qformer.word_embeddings.requires_grad_(config.train_text_embeddings)
        qformer.position_embeddings.requires_grad_(config.train_text_embeddings)
    return qformer, AutoTokenizer.from_pretrained(folder, truncation_side="left")


def load_llm(config: LLMConfig) -> DecoderLLM:
    """The frozen language model with its tokenizer and text conventions."""
    folder = part_folder(sources(config.name, config.sources), setting="llm.sources.path")
    dtype = getattr(torch, config.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"llm.dtype={config.dtype} is no torch dtype; use float32, bfloat16 or float16")
    transformers_logging.disable_progress_bar()
    try:
        return DecoderLLM(
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
            AutoTokenizer.from_pretrained(folder),
            eos_token=config.eos_token,
            pad_token=config.pad_token,
            bos_token=config.bos_token,
            image_prefix=config.image_prefix,
            prompt_prefix=config.prompt_prefix,
            answer_prefix=config.answer_prefix,
            max_prompt_tokens=config.max_prompt_tokens,
            max_target_tokens=config.max_target_tokens,
        )
    except ValueError as error:
        raise UserError(f"llm={config.name}: {error}") from None


def load_run(source: Path, *, device: str = "auto") -> LoadedRun:
    """Restore the model of a run folder or of one of its checkpoints.

    Raises:
        UserError: no whole checkpoint there, or other frozen weights than it was trained with.
    """
    checkpoint: Path | None = source
    if not (source / "state.json").is_file():
        if not checkpoint_folders(source / "checkpoints"):
            raise UserError(
                f"there is no checkpoint at {source}; give the folder of a run, such as outputs/train/demo, "
                "or one of its checkpoints/step_XXXXXXXX"
            )
        checkpoint, complaints = newest_whole(source / "checkpoints")
        if checkpoint is None:
            raise UserError(f"no checkpoint of {source} is whole: {'; '.join(complaints)}")
    assert checkpoint is not None
    loaded = load_checkpoint(checkpoint)
    config = read_config(checkpoint.parents[1] / "config.yaml", TrainConfig)
    model = build_model(config.vision, config.qformer, config.llm, seed=config.seed)
    check_frozen(model, loaded.state["frozen"], checkpoint)
    restore_trainable(model, loaded.model, checkpoint)
    return LoadedRun(model.to(choose_device(device)).eval(), config, checkpoint, loaded.step)


def frozen_fingerprints(model: InstructBLIP) -> dict[str, str]:
    """What a checkpoint remembers of the weights that it does not hold."""
    return {"vision": fingerprint(model.vision), "llm": fingerprint(model.llm)}


def check_frozen(model: InstructBLIP, expected: Mapping[str, str], checkpoint: Path) -> None:
    """Refuse a checkpoint that was trained beside other frozen weights."""
    for part, found in frozen_fingerprints(model).items():
        if expected.get(part) != found:
            raise UserError(
                f"the frozen {part} weights are not those {checkpoint} was trained with; "
                f"use the same {part}= and the same files, or train anew under another name="
            )


def restore_trainable(model: InstructBLIP, state: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Load trainable weights; every one must be there, with the right shape."""
    own = model.trainable_state()
    _check_keys({name: tensor.shape for name, tensor in own.items()}, state, str(checkpoint), ())
    model.load_state_dict(dict(state), strict=False)


def load_exactly(module: nn.Module, state: dict[str, Tensor], where: str, *, surplus_ok: tuple[str, ...] = ()) -> None:
    """Load a state dict and stop on a missing, surplus or misshapen tensor, naming it."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    _check_keys(shapes, state, where, surplus_ok)
    module.load_state_dict({name: state[name] for name in shapes})


def _check_keys(
    shapes: Mapping[str, torch.Size], state: Mapping[str, Tensor], where: str, surplus_ok: tuple[str, ...]
) -> None:
    for name, shape in shapes.items():
        if name not in state:
            raise UserError(f"{where} lacks the tensor {name}; it is of another model")
        if state[name].shape != shape:
            raise UserError(f"{where}: {name} is {tuple(state[name].shape)}, the model needs {tuple(shape)}")
    surplus = [name for name in state if name not in shapes and not name.startswith(surplus_ok or ("\0",))]
    if surplus:
        raise UserError(f"{where} has the unknown tensor {surplus[0]}; it is of another model")


def sources(name: str, config: SourcesConfig) -> Sources:
    """The configuration of a part's sources as `weights/assets.py` takes it."""
    wheel = None
    if config.wheel is not None:
        wheel = WheelSource(
            project=config.wheel.project,
            version=config.wheel.version,
            sha256=config.wheel.sha256,
            bytes=config.wheel.bytes,
            files=dict(config.wheel.files),
        )
    patterns = {} if config.hub_files is None else {"hub_files": tuple(config.hub_files)}
    return Sources(
        name=name,
        path=config.path,
        hub=config.hub,
        wheel=wheel,
        hub_revision=config.hub_revision,
        convert=config.convert,
        **patterns,
    )


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name} is none; use auto, cpu or cuda") from None
