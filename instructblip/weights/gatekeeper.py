"""What is wrong with a foreign folder of transformers, said in one line with the way out, before anything of it is opened.

Language models and whole models pass the same gate. No code that comes with weights is ever run: every call to transformers
says `trust_remote_code=False`, and a folder that cannot do without its code is refused here.
"""

import contextlib
import copy
import functools
import json
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from instructblip.errors import UserError
from instructblip.files import read_json
from instructblip.models.llm import LLM_KINDS
from instructblip.weights.lavis import read_pth

MODEL_TYPES = ("instructblip", "blip-2", "blip", "llava")  # of whole models, as a config.json of transformers says them
WEIGHT_FILES = (  # in the order in which transformers takes them
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_QUANTISED_SETTINGS = ("quantization_config", "compression_config")
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json")  # GPTQ's and AWQ's, beside older weights
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab*", "*.spm", "*.tiktoken", "tekken.json")
_BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_LFS_POINTER = b"version https://git-lfs"
_WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml|!--)", re.IGNORECASE)
_LONGEST_HEADER = 100_000_000  # bytes, the bound of safetensors itself
_NEVER_RUN = (
    "and code that comes with weights is never run; use a model that transformers "
    f"{transformers.__version__} has itself"
)
_LONGEST_REASON = 300  # characters

# A matrix in one of these types holds numbers as they are; any other is rounded, and needs scales that are elsewhere.
_PLAIN_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MATRIX = re.compile(r"weight(_packed)?$")

# What training frameworks put into the names of a wrapped model's tensors, and what to save in its place.
_WRAPPERS = {
    "base_model.model": "by peft; merge its adapter (merge_and_unload) and save the merged model",
    "_orig_mod": "by torch.compile; save the model that was compiled (model._orig_mod)",
    "_fsdp_wrapped_module": "by FSDP; save its full state dict under the model's own names",
    "_checkpoint_wrapped_module": "by activation checkpointing; save the model before it is wrapped",
    "module": "by DistributedDataParallel or DeepSpeed; save the model inside (model.module)",
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
        check_weight_file(file)


def config_json(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        UserError: there is none, or it is something else.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no config.json of a transformers model; give the folder that has one")
    return _json_object(file)


def refuse_other_model(path: Path) -> None:
    """Say what a path holds, where it is a model but not one that is loaded as a whole; else do nothing.

    Raises:
        UserError: an adapter, a language model, another model of transformers, a GGUF file, what stands in place of a file.
    """
    if path.is_file():
        check_content(path)
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
    file = folder / "config.json"
    try:
        return copy.deepcopy(_read_config(folder, file.read_bytes() if file.is_file() else None))
    except Exception as error:  # each class checks its own settings in its own way
        raise UserError(f"{where}{file}: {reason(error)}") from None


@functools.lru_cache(maxsize=8)
def _read_config(folder: Path, content: bytes | None) -> Any:
    """As `content` of the folder's config.json has it; several parts of a model ask for it, and may change theirs."""
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # It would name other files of weights than those that were looked at.
    vars(settings).pop("transformers_weights", None)
    return settings


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
        settings = folder / "tokenizer_config.json"
        if settings.is_file() and b'"auto_map"' in settings.read_bytes():
            raise UserError(f"{where}{folder}: its tokenizer needs Python code of its own, {_NEVER_RUN}") from None
        raise UserError(f"{where}{folder} has no tokenizer that opens ({reason(error)}); fetch it again") from None


def check_vocabulary(tokenizer: Any, rows: int, where: str) -> None:
    """Refuse the tokenizer of another model: more tokens, those left out that were added to it, than the table has rows.

    Raises:
        UserError: names both numbers.
    """
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{where}the tokenizer has {tokenizer.vocab_size} tokens and the model's token table {rows} rows: it is of "
            "another model; give the model's own"
        )


@contextlib.contextmanager
def foreign_settings(folder: Path) -> Iterator[None]:
    """Whatever is built within the block is built from a foreign folder's settings, which may be of any type and size.

    Raises:
        UserError: they do not fit together.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(
            f"{folder} has settings that do not fit together, or not its weights ({reason(error)}); fetch the model again"
        ) from error


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
        UserError: there are none, one is missing, or an index that names none.
    """
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise UserError(f"{folder} has no weights: no file named {', '.join(WEIGHT_FILES[::2])} or index of several")
    if not name.endswith(".index.json"):
        return [folder / name]
    names = _indexed_files(folder / name)
    files = [folder / file for file in sorted(names)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing; fetch the whole model")
    return files


def check_content(file: Path) -> None:
    """Refuse what stands in place of a file: nothing, a pointer of Git LFS, a page that says why it was not sent.

    Raises:
        UserError: says which.
    """
    try:
        with open(file, "rb") as opened:
            start = opened.read(512)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); mend its rights, or fetch it again") from None
    if not start:
        raise UserError(f"{file} is empty; fetch it again")
    if start.startswith(_LFS_POINTER):
        raise UserError(f"{file} is a pointer of Git LFS and not the file itself; run git lfs pull in its folder")
    if _WEB_PAGE.match(start):
        raise UserError(f"{file} is a web page and not the file itself; fetch it again, logged in where that is needed")


def reason(error: Exception) -> str:
    """A foreign error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    named = f"{type(error).__name__}: {text}" if isinstance(error, KeyError | AttributeError | TypeError) else text
    return named if len(named) <= _LONGEST_REASON else f"{named[:_LONGEST_REASON]}..."


def _json_object(file: Path) -> dict[str, Any]:
    check_content(file)
    found = read_json(file)
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no object of settings; fetch it again")
    return found


def _indexed_files(index: Path) -> set[str]:
    """The file names of an index, all of its own folder."""
    places = _json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} is no index of weights: its weight_map names no files; fetch it again")
    names = set(places.values())
    if outside := sorted(name for name in names if Path(name).name != name):
        raise UserError(f"{index} names {outside[0]}, which is no file beside it; fetch the model again")
    return names


def _is_of_kind(settings: Any, kind: str) -> bool:
    return type(settings) in LLM_KINDS[kind].auto_class._model_mapping


def _refuse_adapter(folder: Path) -> None:
    found = next((name for name in _ADAPTER_FILES if (folder / name).is_file()), None)
    if found is not None:
        alone = "alone" if not any((folder / name).is_file() for name in WEIGHT_FILES) else "beside a model's weights"
        raise UserError(
            f"{folder} holds an adapter {alone} ({found}), which would be left out; merge it into its base model first "
            "(peft's merge_and_unload), save that, and give its folder; or give the base, and adapter= beside it"
        )


def _check_quantisation(folder: Path, raw: dict[str, Any]) -> None:
    parts = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    found = [part[name] for part in parts for name in _QUANTISED_SETTINGS if part.get(name)]
    if not found and not any((folder / name).is_file() for name in _QUANTISED_FILES):
        return
    method = found[0].get("quant_method") if found and isinstance(found[0], dict) else None
    raise _quantised(folder, f" ({method})" if method else "")


def _quantised(place: Path, how: str) -> UserError:
    return UserError(
        f"{place} holds quantised weights{how}; use the unquantised model, and llm.quantization=int8 or nf4 to hold it in "
        "less memory"
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
        raise UserError(f"{folder} needs Python code of its own for model_type {kind!r}, {_NEVER_RUN}")
    raise UserError(
        f"{folder}/config.json: model_type {kind!r} is none that transformers {transformers.__version__} has; "
        "use another model, or a newer transformers"
    )


def _check_tokenizer(folder: Path) -> None:
    found = [file for pattern in _TOKENIZER_FILES for file in sorted(folder.glob(pattern))]
    if not found:
        raise UserError(f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json); fetch it too")
    for file in [*found, *(folder / name for name in _BESIDE_TOKENIZER)]:
        if file.is_file():
            check_content(file)


def check_weight_file(file: Path) -> None:
    """Refuse a file of weights by its beginning and the names and types of its tensors.

    Raises:
        UserError: as `check_weights`.
    """
    check_content(file)
    types = _safetensors_types(file) if file.suffix == ".safetensors" else _pickled_types(file)
    for name, plain in types.items():
        for wrapper, way_out in _WRAPPERS.items():
            inside = wrapper.startswith("_") and wrapper in name.split(".")
            if inside or name.startswith(f"{wrapper}."):
                raise UserError(f"{file}: tensors are named {wrapper}.*, wrapped {way_out}")
        if ".lora_" in name:
            raise UserError(f"{file} holds a LoRA adapter ({name}); merge it into its base model first, and save that")
        if not plain and _MATRIX.search(name):
            raise _quantised(file, f" ({name})")


def _safetensors_types(file: Path) -> dict[str, bool]:
    """For each tensor whether its numbers are plain ones, by the header; the file must be as long as that says."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = struct.unpack("<Q", opened.read(8).ljust(8, b"\xff"))[0]
        if length > _LONGEST_HEADER:
            raise UserError(f"{file} is no file of safetensors; fetch it again")
        header = opened.read(length)
    try:
        tensors = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
        end = 8 + length + max((value["data_offsets"][1] for value in tensors.values()), default=0)
        types = {name: value["dtype"] in _PLAIN_TYPES for name, value in tensors.items()}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        wrong = "is cut short" if size < 8 + length else "is no file of safetensors"
        raise UserError(f"{file} {wrong}; fetch it again") from None
    if size != end:
        wrong = "is cut short" if size < end else "is longer than its header says"
        raise UserError(f"{file} {wrong}: {size} of {end} bytes; fetch it again")
    return types


def _pickled_types(file: Path) -> dict[str, bool]:
    """The same of a file of torch, which must be a state dict."""
    with open(file, "rb") as opened:
        zipped = opened.read(2) == b"PK"
    if zipped and not zipfile.is_zipfile(file):
        raise UserError(f"{file} is cut short; fetch it again")
    found = read_pth(file)
    if not isinstance(found, Mapping):
        raise UserError(f"{file} is no state dict; save one, with torch.save(model.state_dict(), ...)")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{file} holds more than weights ({name}, of type {type(value).__name__}); save the state dict alone, with "
                "torch.save(model.state_dict(), ...)"
            )
    return {str(name): value.dtype in _PLAIN_TYPES.values() for name, value in found.items()}
