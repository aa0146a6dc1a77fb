"""What a run can start from that is not its own: runs, transformers' folders and hub ids, files of LAVIS.

Whatever the format, `read_start` gives tensors under this code's names, and what the source says of the language model
that they were trained beside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from instructblip.config.checks import BLIP_KINDS
from instructblip.config.schema import ModelConfig
from instructblip.config.validate import read_model_config
from instructblip.errors import UserError
from instructblip.files import atomic_path
from instructblip.models.adapters import Adapter, without_adapters
from instructblip.models.fingerprint import fingerprint_tensors
from instructblip.weights.blip import blip_checkpoint, is_blip, meeting_tensors, whole
from instructblip.weights.checkpoint import MODEL_FILE, load_checkpoint
from instructblip.weights.gatekeeper import check_settings, open_config, refuse_other_model
from instructblip.weights.lavis import model_state, read_tensors
from instructblip.weights.load import find_checkpoint, hub_folder, is_hub_id
from instructblip.weights.names import LLM_PREFIX, native_names
from instructblip.weights.partner import Partner
from instructblip.weights.peft_format import ADAPTER_FOLDER, is_adapter_folder
from instructblip.weights.start import PROJECTION, Start
from instructblip.weights.transformers_blip import load_blip_folder
from instructblip.weights.transformers_layout import layout_of
from instructblip.weights.transformers_read import is_huggingface_folder, read_side_tensors, read_weights

# The last layers of connectors, whose rows are as many as the LLM's width.
CONNECTOR_OUTPUT = "connector.output.weight"
_LAST_LAYERS = ("projection.weight", CONNECTOR_OUTPUT)
TEXT_BRANCH_FILE = "text_branch.safetensors"

_PTH = (".pth", ".pt", ".bin")


class StartSource(NamedTuple):
    """Weights to start from that were found; nothing of them has been read yet.

    Attributes:
        given: as the user wrote it.
        format: `run`, `transformers` or `lavis`.
        path: the checkpoint folder of a run, the transformers folder, the file.
        name: of the run, folder, hub repository or file.
    """

    given: str
    format: Literal["run", "transformers", "lavis"]
    path: Path
    name: str


@dataclass(frozen=True)
class StartWeights:
    """Weights that were read.

    Attributes:
        source: where they were found.
        tensors: under this code's names; an LLM's only where the source is a run that trained it. Of BLIP under LAVIS's, in
            which its models meet.
        sha256: fingerprint of the tensors.
        partner: the language model they were trained beside; None for a model without one.
        frozen: fingerprints of the vision encoder and the LLM that they were trained with, where a run names them by that.
        untrained: parts among them that were drawn and never trained.
        adapters: of the parts that a run adapted; their tensors are among these.
        config: of the model, where the source is a run.
        heads: of each part, where a transformers folder says them.
    """

    source: StartSource
    tensors: dict[str, Tensor]
    sha256: str
    partner: Partner | None
    frozen: dict[str, str] = field(default_factory=dict)
    untrained: tuple[str, ...] = ()
    adapters: dict[str, Adapter] = field(default_factory=dict)
    config: ModelConfig | None = None
    heads: dict[str, list[int]] = field(default_factory=dict)


def find_start(given: str) -> StartSource:
    """Find weights to start from. A hub id is fetched.

    Raises:
        UserError: nothing there that can be started from.
    """
    path = Path(given).expanduser()
    if path.is_file() and path.suffix in _PTH:
        return StartSource(given, "lavis", path, path.stem)
    if is_huggingface_folder(path):
        return StartSource(given, "transformers", path, path.absolute().name)
    if path.exists():
        refuse_other_model(path)
    if path.is_dir():
        checkpoint = find_checkpoint(path)
        return StartSource(given, "run", checkpoint, checkpoint.absolute().parents[1].name)
    if path.exists() or path.suffix in _PTH or not is_hub_id(given):
        raise UserError(
            f"init_from={given} is no run, transformers folder, hub id or .pth file; give one that is there"
        )
    return StartSource(given, "transformers", hub_folder(given), given)


def find_partner(source: StartSource) -> Partner | None:
    """The language model that weights were trained beside, as far as it is known before they are read.

    Raises:
        UserError: no configuration beside them, or weights that cannot be opened.
    """
    if source.format == "run":
        llm = read_model_config(source.path.parents[1] / "config.yaml").llm
        return None if llm is None else Partner(llm.name, width=_projection_width(source.path / MODEL_FILE))
    if source.format == "transformers":
        text = open_config(source.path).text_config
        return Partner(width=text.hidden_size)
    tensors, projection = read_tensors(source.path)  # mapped into memory, where they stay on the disk
    return None if projection is None else Partner(projection=projection, width=len(tensors["projection.weight"]))


def read_start(source: StartSource) -> StartWeights:
    """Read the tensors of a source.

    Raises:
        UserError: a file that is missing or broken, a tensor that no model here has.
    """
    read = {"run": _read_run, "transformers": _read_transformers, "lavis": _read_lavis}
    return read[source.format](source)


def check_pinned(weights: Sequence[StartWeights], sha256: Sequence[str]) -> None:
    """Refuse weights that are not those that `init_sha256` names, where it names any.

    Raises:
        UserError: says which, and their own fingerprint.
    """
    if sha256 and len(sha256) != len(weights):
        raise UserError(
            f"init_sha256 has {len(sha256)} entries for {len(weights)} of init_from; give one each, or none"
        )
    for found, wanted in zip(weights, sha256, strict=False):
        if found.sha256 != wanted:
            raise UserError(
                f"init_from={found.source.given} has the fingerprint {found.sha256}, and init_sha256 wants {wanted}; "
                "give the weights that it names, or leave init_sha256 out"
            )


def save_text_branch(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Keep what a run's own model has no place for beside its checkpoints, for those that start from it.

    Raises:
        UserError: a full disk, or no right to write.
    """
    with atomic_path(folder / TEXT_BRANCH_FILE) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)


def _read_run(source: StartSource) -> StartWeights:
    loaded = load_checkpoint(source.path).averaged()
    folder = source.path.parents[1]
    config = read_model_config(folder / "config.yaml")
    adapters = {part: Adapter.from_json(stored) for part, stored in loaded.state.get("adapters", {}).items()}
    if config.model.kind in BLIP_KINDS:
        if adapters:
            raise UserError(
                f"init_from={source.given} has adapters on its {' and '.join(adapters)}, which no other BLIP takes over; "
                f"write them into the weights first: python -m instructblip.weights {source.given} FOLDER --to huggingface"
            )
        return replace(_blip_start(source, meeting_tensors(loaded.model), loaded.state), config=config)
    llm = config.llm
    tensors = loaded.model | _text_branch(folder, Start.from_json(loaded.state.get("start")).text_branch)
    width = next((tensors[name].shape[0] for name in _LAST_LAYERS if name in tensors), None)
    own = {name: tensor for name, tensor in without_adapters(tensors).items() if name.startswith(LLM_PREFIX)}
    untrained = tuple(loaded.state.get("untrained", ()))
    partner = None
    if llm is not None and PROJECTION not in untrained:
        partner = Partner(llm.name, width=width, weights=own)
    frozen = {part: sha256 for part, sha256 in loaded.state["frozen"].items() if part in ("vision", "llm")}
    return StartWeights(
        source, tensors, fingerprint_tensors(tensors), partner, frozen, untrained, adapters, config=config
    )


def _text_branch(folder: Path, sha256: str | None) -> dict[str, Tensor]:
    """What a run that reads no text keeps for those that start from it."""
    if sha256 is None:
        return {}
    file = folder / TEXT_BRANCH_FILE
    if not file.is_file():
        raise UserError(f"{file} is missing, which the run kept for those that start from it; copy the whole run")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy the whole run again") from None
    if fingerprint_tensors(tensors) != sha256:
        raise UserError(f"{file} is not what the run wrote; copy the whole run again")
    return tensors


def _read_transformers(source: StartSource) -> StartWeights:
    check_settings(source.path)
    if is_adapter_folder(adapters := source.path / ADAPTER_FOLDER):
        raise UserError(
            f"init_from={source.given} has adapters in {adapters}, which a start takes from runs alone; make one of it: "
            f"python -m instructblip.weights {source.given} TARGET --to native"
        )
    if layout_of(source.path).kind in BLIP_KINDS:
        tensors = meeting_tensors(load_blip_folder(source.path).state_dict())
        return replace(_blip_start(source, tensors), heads=_heads_of_folder(source.path, {"text": "text_config"}))
    weights = read_weights(source.path)
    names = native_names(weights, layout_of(source.path).names, str(source.path))
    tensors = {native: weights[name] for name, native in names.items()} | read_side_tensors(source.path)
    llm = {name: tensors.pop(name) for name in list(tensors) if name.startswith(LLM_PREFIX)}
    width = next((tensors[name].shape[0] for name in _LAST_LAYERS if name in tensors), None)
    partner = Partner(width=width, weights=llm) if llm else None
    heads = _heads_of_folder(source.path, {"qformer": "qformer_config"})
    return StartWeights(source, tensors, fingerprint_tensors(tensors), partner, heads=heads)


def _heads_of_folder(folder: Path, parts: Mapping[str, str]) -> dict[str, list[int]]:
    """By part, the heads that a section of a transformers configuration says; `parts` besides the vision encoder."""
    config, sections = open_config(folder), {"vision": "vision_config", **parts}
    return {
        part: [section.num_attention_heads]
        for part, name in sections.items()
        if (section := getattr(config, name, None)) is not None
    }


def _blip_start(
    source: StartSource, tensors: dict[str, Tensor], state: Mapping[str, Any] | None = None
) -> StartWeights:
    """BLIP's tensors under LAVIS's names; `state` is a checkpoint's."""
    frozen = {} if state is None else {part: sha256 for part, sha256 in state["frozen"].items() if part == "vision"}
    untrained = () if state is None else tuple(state.get("untrained", ()))
    return StartWeights(source, tensors, fingerprint_tensors(tensors), None, frozen, untrained)


def _read_lavis(source: StartSource) -> StartWeights:
    state = model_state(source.path)
    if is_blip(source.path, state):
        return _blip_start(source, whole(blip_checkpoint(source.path, state)))
    tensors, projection = read_tensors(source.path)
    partner = None
    if projection is not None:
        partner = Partner(projection=projection, width=tensors["projection.weight"].shape[0])
    return StartWeights(source, tensors, fingerprint_tensors(tensors), partner)


def _projection_width(file: Path) -> int | None:
    """Rows of the connector's last layer in a checkpoint, by the file's header."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
            last = next((name for name in _LAST_LAYERS if name in names), None)
            return None if last is None else opened.get_slice(last).get_shape()[0]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); use another checkpoint of the run") from None
