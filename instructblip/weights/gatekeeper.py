"""What is wrong with a foreign folder of transformers, said in one line with the way out, before anything of it is opened.

Language models and whole models pass the same gate. No code that comes with weights is ever run: every call to transformers
says `trust_remote_code=False`, and a folder that cannot do without its code is refused here.
"""

import json
import re
import struct
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from instructblip.errors import UserError
from instructblip.files import read_json
from instructblip.models.llm import LLM_KINDS
from instructblip.weights.lavis import read_pth

MODEL_TYPES = ("instructblip", "blip-2")  # of whole models, as a config.json of transformers says them
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json")  # GPTQ's and AWQ's, beside older weights
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
_LFS_POINTER = b"version https://git-lfs"
_HTML = re.compile(rb"\s*<(!doctype\s+html|html)", re.IGNORECASE)
_LONGEST_HEADER = 100_000_000  # bytes, the bound of safetensors itself

# What training frameworks put before the names of a wrapped model's tensors, and what to save in its place.
_WRAPPERS = {
    "base_model.model.": "by peft; merge its adapter (merge_and_unload) and save the merged model",
    "_orig_mod.": "by torch.compile; save the model that was compiled (model._orig_mod)",
    "module.": "by DistributedDataParallel or DeepSpeed; save the model inside (model.module)",
}


def check_language_model(folder: Path, where: str) -> None:
    """Refuse a folder that is no whole, plain model of transformers with its tokenizer.

    Args:
        folder: what was given.
        where: begins the message (`llm=vicuna_7b: `).

    Raises:
        UserError: what `check_settings`, `open_tokenizer` and `check_weights` refuse.
    """
    try:
        check_settings(folder)
        _check_tokenizer(folder)
        check_weights(folder)
    except UserError as error:
        raise UserError(f"{where}{error}") from None


def check_settings(folder: Path) -> None:
    """Refuse a folder for what it says of itself; weights are not looked at.

    Raises:
        UserError: an adapter, quantised weights, a model that needs its own code or that transformers does not know.
    """
    _refuse_adapter(folder)
    raw = config_json(folder)
    _check_quantisation(folder, raw)
    _check_implementations(folder, raw)
    _check_model_type(folder, raw)


def check_weights(folder: Path) -> None:
    """Refuse weights by the beginnings of their files.

    Raises:
        UserError: a file that is missing, cut short, a pointer of Git LFS or a web page, or tensors of a wrapped model.
    """
    for file in weight_files(folder):
        _check_weight_file(file)


def config_json(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        UserError: there is none, or it is something else.
    """
    file = folder / "config.json"
    if not file.is_file():
        if found := sorted(folder.glob("*.gguf")):
            raise UserError(f"{folder} holds {found[0].name} and no config.json; a GGUF file is given by its own path")
        raise UserError(f"{folder} has no config.json of a transformers model; give the folder that has one")
    _check_content(file)
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise UserError(f"{file} holds no object of settings; fetch it again")
    return raw


def refuse_other_model(path: Path) -> None:
    """Say what a path holds, where it is a model but not one that is loaded as a whole; else do nothing.

    Raises:
        UserError: an adapter, a language model, another model of transformers, a GGUF file.
    """
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        raise UserError(f"{path} is a language model alone; give it as llm_path= beside the model it belongs to")
    if not path.is_dir():
        return
    _refuse_adapter(path)
    if (path / "config.json").is_file():
        kind = config_json(path).get("model_type")
        raise UserError(
            f"{path} holds a model of type {kind}, wanted is {' or '.join(MODEL_TYPES)}; a language model is given as "
            "llm_path="
        )


def open_config(folder: Path, where: str = "") -> Any:
    """transformers' configuration of a folder that passed the gate.

    Raises:
        UserError: settings that its class refuses.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}{folder}/config.json: {first_line(error)}") from None


def open_tokenizer(folder: Path, where: str = "", **options: Any) -> Any:
    """The tokenizer of a folder.

    Raises:
        UserError: there is none, or it cannot be opened.
    """
    try:
        _check_tokenizer(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except UserError as error:
        raise UserError(f"{where}{error}") from None
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{where}{folder} has no tokenizer that opens ({first_line(error)}); fetch it again") from None


def check_kind(settings: Any, kind: str, where: str) -> None:
    """Refuse a model that transformers has no language model of this kind for.

    Args:
        settings: its configuration.
        kind: key of `LLM_KINDS`.
        where: begins the message.

    Raises:
        UserError: names the kind that it is, if any.
    """
    if _is_of_kind(settings, kind):
        return
    others = [other for other in LLM_KINDS if other != kind and _is_of_kind(settings, other)]
    way_out = f"set llm.kind={others[0]}" if others else "give a language model's folder"
    name = type(settings).__name__
    raise UserError(f"{where}a model of type {settings.model_type} ({name}) is no {kind} language model; {way_out}")


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights, as its index names them where it has one; all of them exist.

    Raises:
        UserError: there are none, or one is missing.
    """
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise UserError(f"{folder} has no weights: no file named {', '.join(WEIGHT_FILES[1::2])} or index of several")
    if not name.endswith(".index.json"):
        return [folder / name]
    _check_content(folder / name)
    files = [folder / file for file in sorted(set(read_json(folder / name)["weight_map"].values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing; fetch the whole model")
    return files


def first_line(error: Exception) -> str:
    """The first line of an error's text."""
    return str(error).partition("\n")[0]


def _is_of_kind(settings: Any, kind: str) -> bool:
    return type(settings) in LLM_KINDS[kind].auto_class._model_mapping


def _refuse_adapter(folder: Path) -> None:
    found = next((name for name in _ADAPTER_FILES if (folder / name).is_file()), None)
    if found is not None:
        alone = "alone" if not any((folder / name).is_file() for name in WEIGHT_FILES) else "beside a model's weights"
        raise UserError(
            f"{folder} holds an adapter {alone} ({found}), which would be left out; merge it into its base model first "
            "(peft's merge_and_unload), save that, and give its folder"
        )


def _check_quantisation(folder: Path, raw: dict[str, Any]) -> None:
    parts = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    found = [part["quantization_config"] for part in parts if part.get("quantization_config")]
    if not found and not any((folder / name).is_file() for name in _QUANTISED_FILES):
        return
    method = found[0].get("quant_method") if found and isinstance(found[0], dict) else None
    raise UserError(
        f"{folder} holds quantised weights{f' ({method})' if method else ''}; use the unquantised model, and "
        "llm.quantization=int8 or nf4 to hold it in less memory"
    )


def _check_implementations(folder: Path, raw: dict[str, Any]) -> None:
    """transformers takes `attn_implementation: OWNER/NAME` for compiled code on the hub, fetches it and runs it."""
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for key, value in part.items():
            values = value.values() if isinstance(value, dict) else [value]
            if key.endswith("_implementation") and any("/" in str(one) for one in values):
                raise UserError(
                    f"{folder}/config.json: {key} {value!r} names code on the hub, and code that comes with weights is "
                    "never run; remove that key"
                )


def _check_model_type(folder: Path, raw: dict[str, Any]) -> None:
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return  # an auto_map beside it is ignored: transformers' own class is taken
    if "auto_map" in raw:
        raise UserError(
            f"{folder} needs Python code of its own for model_type {kind!r}, and code that comes with weights is never "
            f"run; use a model that transformers {transformers.__version__} has itself"
        )
    raise UserError(
        f"{folder}/config.json: model_type {kind!r} is none that transformers {transformers.__version__} has; "
        "use another model, or a newer transformers"
    )


def _check_tokenizer(folder: Path) -> None:
    found = [name for name in _TOKENIZER_FILES if (folder / name).is_file()] + list(folder.glob("*.tiktoken"))
    if not found:
        raise UserError(f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json); fetch it too")
    for name in {"tokenizer_config.json", *found}:
        if (folder / name).is_file():
            _check_content(folder / name)


def _check_weight_file(file: Path) -> None:
    _check_content(file)
    if file.suffix == ".safetensors":
        names: Collection[str] = _safetensors_names(file)
    else:
        with open(file, "rb") as opened:
            zipped = opened.read(2) == b"PK"
        if zipped and not zipfile.is_zipfile(file):
            raise UserError(f"{file} is cut short; fetch it again")
        names = read_pth(file)
    _check_names(names, file)


def _check_content(file: Path) -> None:
    """Refuse what stands in place of a file: nothing, a pointer of Git LFS, a page that says why it was not sent."""
    with open(file, "rb") as opened:
        start = opened.read(512)
    if not start:
        raise UserError(f"{file} is empty; fetch it again")
    if start.startswith(_LFS_POINTER):
        raise UserError(f"{file} is a pointer of Git LFS and not the file itself; run git lfs pull in its folder")
    if _HTML.match(start):
        raise UserError(f"{file} is a web page and not the file itself; fetch it again, logged in where that is needed")


def _safetensors_names(file: Path) -> Collection[str]:
    """Names of a file's tensors, by its header; the file must be as long as that says."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = struct.unpack("<Q", opened.read(8).ljust(8, b"\xff"))[0]
        if length > _LONGEST_HEADER:
            raise UserError(f"{file} is no file of safetensors; fetch it again")
        header = opened.read(length)
    try:
        tensors = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
        end = max((value["data_offsets"][1] for value in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        reason = "is cut short" if size < 8 + length else "is no file of safetensors"
        raise UserError(f"{file} {reason}; fetch it again") from None
    if size < 8 + length + end:
        raise UserError(f"{file} is cut short: {size} of {8 + length + end} bytes; fetch it again")
    return tensors.keys()


def _check_names(names: Iterable[str], file: Path) -> None:
    for name in names:
        for wrapper, way_out in _WRAPPERS.items():
            if name.startswith(wrapper):
                raise UserError(f"{file}: tensors are named {wrapper}*, wrapped {way_out}")
        if ".lora_" in name:
            raise UserError(f"{file} holds a LoRA adapter ({name}); merge it into its base model first, and save that")
