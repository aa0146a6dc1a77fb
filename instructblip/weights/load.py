"""One call for every kind of trained model: our runs, transformers' folders and hub ids, LAVIS's files."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
import string
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor

from instructblip.config.checks import BLIP_KINDS
from instructblip.config.schema import (
    CONFIGS,
    ArchitectureConfig,
    LLMConfig,
    LLMKind,
    ModelConfig,
    ModelKind,
    QFormerConfig,
    TextConfig,
    VisionConfig,
)
from instructblip.config.validate import read_config, read_model_config, unknown_choice
from instructblip.distributed import choose_device
from instructblip.errors import UserError
from instructblip.fetch.parts import Sources, part_folder
from instructblip.models.adapters import Adapter, without_adapters
from instructblip.models.base import Model
from instructblip.models.blip import BLIP
from instructblip.models.blip2 import BLIP2
from instructblip.models.facts import Skill
from instructblip.models.fingerprint import fingerprint, fingerprint_tensors
from instructblip.models.fp8 import check_device
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.vision_language import VisionLanguageModel
from instructblip.weights.adapters import attach
from instructblip.weights.blip import blip_checkpoint, blip_settings, is_blip, load_blip
from instructblip.weights.checkpoint import LoadedCheckpoint, checkpoint_folders, load_checkpoint, newest_whole
from instructblip.weights.gatekeeper import check_content, foreign_settings, refuse_other_model
from instructblip.weights.lavis import (
    LavisCheckpoint,
    architecture_settings,
    load_lavis,
    model_state,
    qformer_settings,
    read_lavis,
)
from instructblip.weights.names import check_tensors
from instructblip.weights.parts import MODELS, build_model, load_llm, model_class
from instructblip.weights.peft_format import ADAPTER_FOLDER, is_adapter_folder
from instructblip.weights.start import PLAIN, PROJECTION, Standing, Start, not_aligned
from instructblip.weights.transformers_blip import load_blip_folder
from instructblip.weights.transformers_layout import is_llava_folder, layout_of
from instructblip.weights.transformers_llava import load_llava_folder
from instructblip.weights.transformers_read import is_huggingface_folder, load_huggingface
from instructblip.weights.transformers_settings import read_transformers_config

logger = logging.getLogger(__name__)

LAVIS_QFORMER = "blip2"  # in configs/qformer
# In configs/vision, by the width of image tokens; any other width is of an EVA-CLIP that was shrunk.
_LAVIS_VISIONS, _LAVIS_VISION = {1024: "clip_vit_l"}, "eva_vit_g"

# The same of BLIP, and its text model in configs/text.
_BLIP_VISIONS, _BLIP_VISION = {1024: "vit_l16"}, "vit_b16"
BLIP_TEXT = "blip"

_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_HUB_FILES = ("*.json", "*.txt", "*.model", "*.jinja")

_SOME_OF_EVERYTHING = f"{string.printable} The left bus isn't 1,234.5 years older. Ein grünes Haus, 東京 \U0001f600"

# By whether it is that.
_WITHOUT_LLM = {
    True: "BLIP-2's first stage, which has no language model",
    False: "BLIP, which has no language model of its own",
}

Section = TypeVar("Section", VisionConfig, QFormerConfig, TextConfig, LLMConfig)


class FrozenPart(NamedTuple):
    """What a frozen part is called, and where its files came from: a path, a hub id, a wheel."""

    name: str
    source: str


class Source(NamedTuple):
    """A trained model that was found; nothing of its weights has been read yet.

    Attributes:
        format: `run`, `huggingface` or `lavis`.
        path: the checkpoint folder of a run, the transformers folder, the file.
        name: of the run, folder, hub repository or file.
        kind: of the model.
        llm_kind: `decoder` or `encoder_decoder`; None where there is no language model.
    """

    format: Literal["run", "huggingface", "lavis"]
    path: Path
    name: str
    kind: ModelKind
    llm_kind: LLMKind | None

    @property
    def skills(self) -> frozenset[Skill]:
        """What evaluation may ask of it."""
        return MODELS[self.kind].SKILLS


class LoadedModel(NamedTuple):
    """A trained model in evaluation mode.

    Attributes:
        model: on the wanted device.
        name: of the run, folder, hub repository or file it came from.
        source: that checkpoint folder, folder or file; of a run the checkpoint that was taken.
        step: optimiser steps that its checkpoint has seen; 0 where the source does not say.
        config: the sections it was built from; None for a transformers folder, which is its own configuration.
        parts: `vision`, and `llm` where there is one.
        standing: what it started from, and what of it was never trained or is aligned to another LLM.
        adapter: folder whose adapters were put onto it.
    """

    model: Model
    name: str
    source: str
    step: int
    config: ModelConfig | None
    parts: dict[str, FrozenPart]
    standing: Standing = PLAIN
    adapter: str | None = None


class Replacements(NamedTuple):
    """Frozen parts that are taken from elsewhere than a source says.

    Attributes:
        llm: name of a language model in configs/llm.
        llm_path: folder with its files.
        vision_path: folder or file with the ViT's weights.
        qformer_path: folder with BERT's config.json and tokenizer.
    """

    llm: str | LLMConfig | None = None
    llm_path: str | None = None
    vision_path: str | None = None
    qformer_path: str | None = None


def find_source(source: str | Path, llm: str | LLMConfig | None = None) -> Source:
    """Find a trained model and the kind of its language model; of what `load_model` does, the part that takes no time.

    Args:
        source, llm: as there. A hub id is fetched.

    Raises:
        UserError: nothing there that can be loaded, no whole checkpoint, or a `.pth` file without `llm`.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _find_lavis(path, llm)
    if folder := huggingface_source(source):
        return _find_huggingface(folder, path.absolute().name, llm)
    if path.is_dir():
        refuse_other_model(path)
        checkpoint = find_checkpoint(path)
        config = _replace_parts(read_model_config(checkpoint.parents[1] / "config.yaml"), Replacements(llm))
        own_kind = None if config.llm is None else config.llm.kind
        return Source("run", checkpoint, checkpoint.absolute().parents[1].name, config.model.kind, own_kind)
    raise UserError(f"{source} is no run, transformers folder, hub id or .pth file; give one that is there")


def _find_lavis(path: Path, llm: str | LLMConfig | None) -> Source:
    known = ", ".join(sorted(file.stem for file in (CONFIGS / "llm").glob("*.yaml")))
    try:
        check_content(path)
    except UserError as error:
        if llm is not None:
            raise
        # Most such files need a name, too: who mends this one would fail a second time.
        raise UserError(
            f"{error}; where it was trained with a language model, say which: llm= one of {known}"
        ) from None
    refuse_other_model(path)
    state = model_state(path)
    kind = blip_checkpoint(path, state).kind if is_blip(path, state) else read_lavis(path).kind
    if kind == "blip2_stage1" or kind in BLIP_KINDS:
        if llm is not None:
            raise UserError(f"{path} is of {_WITHOUT_LLM[kind == 'blip2_stage1']}; leave llm= out")
        return Source("lavis", path, path.stem, kind, None)
    if llm is None:
        raise UserError(f"{path} has no language model in it; say which one it was trained with: llm= one of {known}")
    return Source("lavis", path, path.stem, kind, llm_config(llm, None).kind)


def _find_huggingface(folder: Path, name: str, llm: str | LLMConfig | None) -> Source:
    kind, config = layout_of(folder).kind, read_transformers_config(folder)
    if kind == "blip2_stage1" or kind in BLIP_KINDS:
        if llm is not None:
            raise UserError(f"{folder} is {_WITHOUT_LLM[kind == 'blip2_stage1']}; leave llm= out")
        return Source("huggingface", folder, name, kind, None)
    # LLaVA's configuration does not say it: its language model is always one.
    decodes = getattr(config, "use_decoder_only_language_model", True)
    own_kind: LLMKind = "decoder" if decodes else "encoder_decoder"
    return Source("huggingface", folder, name, kind, own_kind if llm is None else llm_config(llm, None).kind)


def load_model(
    source: str | Path | Source,
    *,
    llm: str | LLMConfig | None = None,
    llm_path: str | None = None,
    vision_path: str | None = None,
    qformer_path: str | None = None,
    adapter: str | Path | None = None,
    device: str = "auto",
) -> LoadedModel:
    """Load a trained model.

    Args:
        source: folder of a run (its newest whole checkpoint is taken) or one of its checkpoints; a transformers folder or
            the hub id of one, `OWNER/NAME` or `OWNER/NAME@REVISION`; a `.pth` file of LAVIS, which needs `llm` but for
            BLIP-2's first stage and BLIP, whose own repository's files are read, too. Or what `find_source` found.
        llm: a name in configs/llm, the path of such a YAML, or a configuration. Projection and Q-Former were aligned to one
            language model; with another they work badly, or where its width differs not at all, until they are trained: a
            warning says so.
        llm_path: folder with that language model's files, in place of the configured sources.
        vision_path: folder or file with the frozen ViT's weights, likewise; LAVIS's `eva_vit_g.pth` will do.
        qformer_path: folder with BERT's config.json and tokenizer, likewise; for BLIP's text model, too.
        adapter: folder in peft's format, whose adapters come onto the model: see `weights.adapters.attach`. None: those that
            a transformers folder has beside its weights, in `adapter`, if any.
        device: `auto` takes a GPU where there is one.

    Raises:
        UserError: nothing there that can be loaded, or files that do not fit.
    """
    replaced = Replacements(llm, llm_path, vision_path, qformer_path)
    place = choose_device(device)
    load = {"run": _load_run, "huggingface": _load_huggingface, "lavis": _load_lavis}
    found = source if isinstance(source, Source) else find_source(source, llm)
    with foreign_settings(found.path) if found.format == "huggingface" else contextlib.nullcontext():
        loaded = load[found.format](found, replaced)
    if adapter is not None:
        attach(loaded.model, adapter)
        loaded = loaded._replace(adapter=str(adapter))
    elif found.format == "huggingface" and is_adapter_folder(own := found.path / ADAPTER_FOLDER):
        if llm is None:
            attach(loaded.model, own)
        else:  # of which they cannot be
            logger.warning("%s was trained with the model's own language model, and is left out", own)
    check_device(loaded.model, place)
    return loaded._replace(model=loaded.model.to(place).eval())


def huggingface_source(source: str | Path) -> Path | None:
    """The folder of a transformers model: the one given, or that of a hub id, which is fetched; None for other sources.

    Raises:
        UserError: a hub id that cannot be reached.
    """
    path = Path(source).expanduser()
    if is_huggingface_folder(path):
        return path
    if path.exists() or path.suffix in (".pth", ".pt") or not is_hub_id(str(source)):
        return None
    return hub_folder(str(source))


def is_hub_id(source: str) -> bool:
    """Whether a text has the form of a hub id: `OWNER/NAME`, or `OWNER/NAME@REVISION` for another than the newest."""
    return _HUB_ID.fullmatch(source) is not None


def hub_folder(place: str) -> Path:
    """The files of a transformers model on the hub, fetched once.

    Files that would have to be unpickled are fetched only where there are no others.

    Args:
        place: `OWNER/NAME`, or `OWNER/NAME@REVISION`: a commit, tag or branch.

    Raises:
        UserError: it cannot be reached, or holds no weights.
    """
    match = _HUB_ID.fullmatch(place)
    assert match is not None  # `is_hub_id` was asked
    name, repository, revision = place.replace("/", "--"), match["repository"], match["revision"]
    asked: dict[str, Any] = {"hub": repository, "hub_revision": revision}
    try:
        folder = part_folder(Sources(name, hub_files=(*_HUB_FILES, "*.safetensors"), **asked))
        if not any(folder.glob("*.safetensors")):
            folder = part_folder(Sources(f"{name}-bin", hub_files=(*_HUB_FILES, "*.bin"), **asked))
    except UserError as error:
        raise UserError(f"there is no folder {place} here, and it could not be had from the hub: {error}") from None
    return folder


def frozen_parts(vision: VisionConfig, llm: LLMConfig | None) -> dict[str, FrozenPart]:
    """The frozen parts as they are configured."""
    parts: dict[str, VisionConfig | LLMConfig | None] = {"vision": vision, "llm": llm}
    return {name: _frozen_part(part) for name, part in parts.items() if part is not None}


def part_config(group: str, name: str, schema: type[Section]) -> Section:
    """A part's configuration by its name in configs/.

    Raises:
        UserError: there is none of that name.
    """
    file = CONFIGS / group / f"{name}.yaml"
    if not file.is_file():
        raise UserError(unknown_choice(group, name, CONFIGS))
    return read_config(file, schema)


def llm_config(llm: str | LLMConfig, path: str | None) -> LLMConfig:
    """A language model by its name in configs/llm, the path of its YAML, or as configured; its files from `path`, if given.

    Raises:
        UserError: there is none of that name, or no such file.
    """
    return _with_path(_named_llm(llm) if isinstance(llm, str) else llm, path)


def _named_llm(name_or_path: str) -> LLMConfig:
    if not name_or_path.endswith((".yaml", ".yml")):
        return part_config("llm", name_or_path, LLMConfig)
    file = Path(name_or_path).expanduser()
    if not file.is_file():
        raise UserError(f"llm={name_or_path} is not there; give the path of a YAML as in configs/llm, or a name there")
    return read_config(file, LLMConfig)


def _load_run(found: Source, replaced: Replacements) -> LoadedModel:
    config = read_model_config(found.path.parents[1] / "config.yaml")
    run = load_run(found.path, device="cpu", config=_replace_parts(config, replaced))
    parts = frozen_parts(run.config.vision, run.config.llm)
    return LoadedModel(run.model, found.name, str(found.path), run.step, run.config, parts, run.standing)


def _load_huggingface(found: Source, replaced: Replacements) -> LoadedModel:
    folder, name = found.path, found.name
    if replaced.vision_path or replaced.qformer_path or (replaced.llm_path and not replaced.llm):
        raise UserError(
            f"{folder} has its own ViT, Q-Former and LLM; only llm= (with llm_path=) can take another's place"
        )
    vision = {"vision": FrozenPart(f"ViT of {name}", str(folder))}
    if found.llm_kind is None:
        model: Model = load_blip_folder(folder) if found.kind in BLIP_KINDS else load_huggingface(folder)
        return LoadedModel(model, name, str(folder), 0, None, vision)
    language = read_transformers_config(folder).text_config
    parts = vision | {"llm": FrozenPart(f"{language.model_type} of {name}", str(folder))}
    llava = is_llava_folder(folder)
    load = load_llava_folder if llava else load_huggingface
    if replaced.llm is None:
        return LoadedModel(load(folder), name, str(folder), 0, None, parts)
    config = llm_config(replaced.llm, replaced.llm_path)
    beside = load(folder, llm=load_llm(config))
    assert isinstance(beside, VisionLanguageModel)  # what has no language model was refused when it was found
    fits = language.hidden_size == beside.llm.width
    standing = _beside(f"the LLM of {name}", config.name, projection_fits=fits, qformer=not llava)
    return LoadedModel(beside, name, str(folder), 0, None, parts | {"llm": _frozen_part(config)}, standing)


def _load_lavis(found: Source, replaced: Replacements) -> LoadedModel:
    if found.kind in BLIP_KINDS:
        return _load_lavis_blip(found, replaced)
    checkpoint = read_lavis(found.path)
    config = _replace_parts(_lavis_config(checkpoint, replaced.llm), replaced._replace(llm=None))
    config.qformer = dataclasses.replace(
        config.q_former(), init="scratch", query_init="normal", **qformer_settings(checkpoint)
    )
    model = build_model(config)
    assert isinstance(model, InstructBLIP | BLIP2)
    fits, standing, llm = load_lavis(checkpoint, model), PLAIN, config.llm
    if llm is not None and (checkpoint.projection != llm.lavis_projection or not fits):
        trained_with = f"an LLM of width {checkpoint.llm_width} (LAVIS's {checkpoint.projection})"
        standing = _beside(trained_with, llm.name, projection_fits=fits)
    return LoadedModel(model, found.name, str(found.path), 0, config, frozen_parts(config.vision, llm), standing)


def _load_lavis_blip(found: Source, replaced: Replacements) -> LoadedModel:
    checkpoint = blip_checkpoint(found.path, model_state(found.path))
    if replaced.vision_path is not None:
        raise UserError(f"{found.path} has its own ViT; leave vision_path= out")
    vision = part_config("vision", _BLIP_VISIONS.get(checkpoint.vision_width, _BLIP_VISION), VisionConfig)
    text = part_config("text", BLIP_TEXT, TextConfig)
    config = ModelConfig(
        model=ArchitectureConfig(kind=checkpoint.kind, **blip_settings(checkpoint)),
        vision=dataclasses.replace(vision, init="scratch", image_size=checkpoint.image_size),
        text=dataclasses.replace(text, init="scratch", layers=checkpoint.layers),
    )
    config = _replace_parts(config, replaced)
    model = build_model(config)
    assert isinstance(model, BLIP)
    load_blip(checkpoint, model)
    parts = {"vision": FrozenPart(config.vision.name, str(found.path))}
    return LoadedModel(model, found.name, str(found.path), 0, config, parts)


def _lavis_config(checkpoint: LavisCheckpoint, llm: str | LLMConfig | None) -> ModelConfig:
    """What a checkpoint says, and LAVIS's own configuration where it does not."""
    name = _LAVIS_VISIONS.get(checkpoint.vision_width, _LAVIS_VISION)
    vision = part_config("vision", name, VisionConfig)
    if checkpoint.image_size is not None:
        vision = dataclasses.replace(vision, image_size=checkpoint.image_size)
    return ModelConfig(
        model=ArchitectureConfig(kind=checkpoint.kind, **architecture_settings(checkpoint)),
        vision=vision,
        qformer=part_config("qformer", LAVIS_QFORMER, QFormerConfig),
        llm=None if llm is None else llm_config(llm, None),
    )


def _beside(
    trained_with: str, llm: str, *, projection_fits: bool, start: Start = PLAIN.start, qformer: bool = True
) -> Standing:
    """A model beside another language model than its connector was trained with, which is warned about."""
    logger.warning(not_aligned(trained_with, llm, projection_fits=projection_fits, qformer=qformer))
    return Standing(start, trained_with, () if projection_fits else (PROJECTION,))


def _replace_parts(config: ModelConfig, replaced: Replacements) -> ModelConfig:
    llm = config.llm
    if llm is not None:
        own = replaced.llm is None or replaced.llm == llm.name
        llm = llm_config(llm if own or replaced.llm is None else replaced.llm, replaced.llm_path)
    elif replaced.llm or replaced.llm_path:
        raise UserError(f"model={config.model.kind} has no language model to replace; leave llm= and llm_path= out")
    if replaced.qformer_path and not (config.has_qformer() or config.text):
        raise UserError(f"{config.said()} has no Q-Former; leave qformer_path= out")
    return dataclasses.replace(
        config,
        vision=_with_path(config.vision, replaced.vision_path),
        qformer=None if config.qformer is None else _with_path(config.qformer, replaced.qformer_path),
        text=None if config.text is None else _with_path(config.text, replaced.qformer_path),
        llm=llm,
    )


def _frozen_part(config: VisionConfig | LLMConfig) -> FrozenPart:
    sources = config.sources
    if sources.path is not None:
        return FrozenPart(config.name, sources.path)
    if sources.wheel is not None:
        return FrozenPart(config.name, f"{sources.wheel.project} {sources.wheel.version}")
    revision = "" if sources.hub_revision is None else f"@{sources.hub_revision}"
    return FrozenPart(config.name, f"{sources.hub}{revision}")


def _with_path(section: Section, path: str | None) -> Section:
    if path is None:
        return section
    return dataclasses.replace(section, sources=dataclasses.replace(section.sources, path=path))


class LoadedRun(NamedTuple):
    """A model restored from a run, what it was built from, and where it came from."""

    model: Model
    config: ModelConfig
    checkpoint: Path
    step: int
    standing: Standing


# --- checkpoints -----------------------------------------------------------------------------------------------------


def load_run(source: Path, *, device: str = "auto", config: ModelConfig | None = None) -> LoadedRun:
    """Restore the model of a run folder or of one of its checkpoints.

    Args:
        source: the folder.
        device: `auto` is a GPU where there is one.
        config: parts in place of the run's own. Another language model than the one that the checkpoint was trained with is
            warned about; where its width differs the projection starts anew.

    Raises:
        UserError: no whole checkpoint there, or other frozen weights than it was trained with.
    """
    checkpoint = find_checkpoint(source)
    loaded = load_checkpoint(checkpoint).averaged()
    own = read_model_config(checkpoint.parents[1] / "config.yaml")
    config = config or own
    # Every trainable tensor comes from the checkpoint: whatever the run started from need not be there any more.
    whole = without_adapters(loaded.model)
    built = _filled_from_outside(config, vision=any(name.startswith("vision.") for name in whole))
    state, frozen = dict(loaded.model), dict(loaded.state["frozen"])
    # What a checkpoint does not hold it names by a fingerprint.
    kind = model_class(config)
    adapters = {part: Adapter.from_json(stored) for part, stored in loaded.state.get("adapters", {}).items()}
    trained = kind.PARTS.keys() - kind.FOLLOWERS - frozen.keys() | adapters.keys()
    start = Start.from_json(loaded.state.get("start"))
    # Steps align what they train to the run's own LLM.
    aligned_to = start.aligned_to if loaded.step == 0 else None
    standing = Standing(start, aligned_to, tuple(loaded.state.get("untrained", ())))
    if own.llm is not None and config.language_model().name != own.llm.name:
        trained -= {"llm"}
        adapters.pop("llm", None)
        kept = {name: tensor for name, tensor in state.items() if not name.startswith("llm.")}
        if len(kept) < len(state):
            logger.warning("what %s trained of its language model, %s, is left out", checkpoint, own.llm.name)
        state = kept
        model: Model = build_model(built, trained=trained, adapters=adapters)
        assert isinstance(model, VisionLanguageModel)
        frozen["llm"] = fingerprint(model.llm)
        fits = _fit_projection(model, state)
        other = config.language_model().name
        standing = _beside(own.llm.name, other, projection_fits=fits, start=start, qformer=config.has_qformer())
    else:
        model = build_model(built, trained=trained, adapters=adapters)
    restore_model(model, loaded._replace(model=state, state={**loaded.state, "frozen": frozen}))
    check_device(model, place := choose_device(device))
    return LoadedRun(model.to(place).eval(), config, checkpoint, loaded.step, standing)


def _filled_from_outside(config: ModelConfig, *, vision: bool) -> ModelConfig:
    """A configuration that draws what a checkpoint holds, whose files need not be there; with `vision` that part, too."""
    qformer, text = config.qformer, config.text
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, init="scratch") if vision else config.vision,
        qformer=None if qformer is None else dataclasses.replace(qformer, init="scratch", query_init="normal"),
        text=None if text is None else dataclasses.replace(text, init="scratch"),
    )


def _fit_projection(model: VisionLanguageModel, state: dict[str, Tensor]) -> bool:
    """Whether a checkpoint's connector leads into this model's LLM; what does not is the model's own then."""
    own = model.part_state(model.connector_part)
    names = [name for name in own if name.startswith(("projection.", "connector.")) and name in state]
    misfit = {name: own[name] for name in names if state[name].shape != own[name].shape}
    state |= misfit
    return not misfit


def find_checkpoint(source: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest whole one of a run.

    Raises:
        UserError: there is none.
    """
    if (source / "state.json").is_file():
        return source
    if not checkpoint_folders(source / "checkpoints"):
        raise UserError(
            f"there is no checkpoint at {source}; give the folder of a run, such as outputs/train/demo, "
            "or one of its checkpoints/step_XXXXXXXX"
        )
    checkpoint, complaints = newest_whole(source / "checkpoints")
    if checkpoint is None:
        raise UserError(f"no checkpoint of {source} is whole: {'; '.join(complaints)}")
    for line in complaints:
        logger.warning(line)
    return checkpoint


def frozen_fingerprints(model: Model, parts: Collection[str] | None = None) -> dict[str, str]:
    """What a checkpoint remembers of the weights that do not train; `parts` limits it to some of them.

    Adapters do not count: what they lie over has the fingerprint that it has without them.
    """
    found = {}
    frozen = model.PARTS.keys() - model.full_parts - model.FOLLOWERS
    for part in sorted(frozen if parts is None else frozen & set(parts), reverse=True):
        modules = model.part_modules(part)
        state = modules[0].state_dict() if len(modules) == 1 else model.part_state(part)
        found[part] = fingerprint_tensors(without_adapters(state))
    return found


def tokenizer_fingerprints(model: Model) -> dict[str, str]:
    """What a checkpoint remembers of the tokenizers: their vocabulary, and how they cut a text with some of everything."""
    found = {}
    for part, tokenizer in model.tokenizers().items():
        known = [sorted(tokenizer.get_vocab().items()), tokenizer(_SOME_OF_EVERYTHING)["input_ids"]]
        found[part] = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    return found


def other_frozen(own: Mapping[str, str], expected: Mapping[str, str], held: Collection[str]) -> str | None:
    """The first frozen part that a checkpoint was not trained beside, of those that it does not hold.

    Args:
        own: `frozen_fingerprints` of a model.
        expected: those of a checkpoint.
        held: parts that the checkpoint holds.
    """
    return next((part for part in own if part not in held and expected.get(part) != own[part]), None)


def check_frozen(own: Mapping[str, str], expected: Mapping[str, str], held: Collection[str], checkpoint: Path) -> None:
    """Refuse a checkpoint that was trained beside other frozen weights; arguments as `other_frozen`."""
    if part := other_frozen(own, expected, held):
        raise UserError(
            f"the frozen {part} weights are not those {checkpoint} was trained with; "
            f"use the same {part}= and the same files, or train anew under another name="
        )


def held_by(model: Model, checkpoint: LoadedCheckpoint) -> set[str]:
    """The parts of which a checkpoint has the weights, and not adapters alone."""
    return {model.part_of(name) for name in without_adapters(checkpoint.model)}


def restore_model(model: Model, checkpoint: LoadedCheckpoint, own_frozen: Mapping[str, str] | None = None) -> Start:
    """Put a checkpoint's weights into a model that was built as its run's was; what it holds beyond, the model holds then.

    Args:
        own_frozen: the model's `frozen_fingerprints`, where they are known.

    Raises:
        UserError: other frozen weights than it was trained with, or other trained ones.
    """
    model.held_parts |= held_by(model, checkpoint)
    own = frozen_fingerprints(model) if own_frozen is None else own_frozen
    check_frozen(own, checkpoint.state["frozen"], model.held_parts, checkpoint.path)
    restore_trainable(model, checkpoint.model, checkpoint.path)
    return Start.from_json(checkpoint.state.get("start"))


def restore_trainable(model: Model, state: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Load trainable weights; every one must be there, with the right shape."""
    check_tensors({name: tensor.shape for name, tensor in model.held_state().items()}, state, str(checkpoint))
    model.load_state_dict(dict(state), strict=False)
