"""A transformers language model with every weight from its files, and the `LLM` around it, measured."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from instructblip._transformers import quiet_transformers
from instructblip.errors import UserError
from instructblip.fetch.parts import cache_folder
from instructblip.files import exclusive, read_json, write_json
from instructblip.models.abilities import limits, measure
from instructblip.models.empty import empty_modules
from instructblip.models.llm import LLM, LLM_KINDS, LLMAbilities, body_name
from instructblip.weights.gatekeeper import check_vocabulary, reason

logger = logging.getLogger(__name__)
_MEASURED = 3  # to be raised when what is measured, or how, changes
_SAMPLED = 64  # values of each tensor that tell one model from another


def load_language_model(
    kind: str,
    settings: Any,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype,
    folder: Path,
    where: str = "",
    prefix: str = "",
) -> Any:
    """transformers' model, its text part alone where it has others.

    Args:
        kind: key of `LLM_KINDS`.
        settings: its configuration, of that kind.
        tensors: by name; None: those of the folder's files.
        dtype: to hold it in.
        folder: where its files lie.
        where: begins messages.
        prefix: of the tensors' names in the file that they came from, for messages.

    Raises:
        UserError: a file that cannot be read, a tensor that is missing, unknown or of another shape.
    """
    options = {"config": settings, "dtype": dtype, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # they are named below
    auto_class = LLM_KINDS[kind].auto_class
    try:
        with quiet_transformers():
            if tensors is None:
                model, found = auto_class.from_pretrained(folder, trust_remote_code=False, **options)
            else:
                class_ = language_model_class(kind, settings)
                model, found = class_.from_pretrained(None, state_dict=tensors, trust_remote_code=False, **options)
    except Exception as error:  # a class may stumble over settings and files in any way
        raise UserError(
            f"{where}{folder} cannot be loaded ({reason(error)}); it is damaged, or of another model"
        ) from None
    check_loaded(found, f"{where}{folder}", prefix)
    return _text_model(model) if kind == "decoder" else model


def language_model_class(kind: str, settings: Any) -> Any:
    """transformers' class of a configuration."""
    found = LLM_KINDS[kind].auto_class._model_mapping[type(settings)]
    return found[0] if isinstance(found, list | tuple) else found


def finished_llm(kind: str, model: Any, tokenizer: Any, conventions: Mapping[str, Any], where: str) -> LLM:
    """The `LLM` of a transformers model; what its class cannot do is measured, and said in one line.

    Args:
        kind: key of `LLM_KINDS`.
        model, tokenizer, conventions: arguments of that class.
        where: begins messages (`llm=vicuna_7b: `).

    Raises:
        UserError: the tokenizer of another model, a token that it does not know, or a model that gives wrong results
            whatever is done.
    """
    try:
        llm = LLM_KINDS[kind](model, tokenizer, **conventions)
    except ValueError as error:
        raise UserError(f"{where}{error}") from None
    check_vocabulary(tokenizer, len(llm.embeddings.weight), where)
    try:
        llm.abilities = _measured(llm)
    except UserError as error:
        raise UserError(f"{where}{error}") from None
    if lacking := limits(llm):
        logger.warning("%s%s allows no shortcuts here: %s", where, type(model).__name__, ", ".join(lacking))
    return llm


def check_loaded(found: Mapping[str, Any], where: str, prefix: str) -> None:
    """Refuse weights that are not those of the model that transformers put them into.

    Args:
        found: what transformers' loading found.
        where: begins the message.
        prefix: of the tensors' names in the file.

    Raises:
        UserError: names the first that is missing, unknown or of another shape.
    """
    problems = [
        *(f"lacks the tensor {prefix}{name}" for name in sorted(found["missing_keys"])),
        *(
            f"has {prefix}{name} of {tuple(theirs)}, the model needs {tuple(ours)}"
            for name, theirs, ours in sorted(found["mismatched_keys"])
        ),
        *(f"has the unknown tensor {prefix}{name}" for name in sorted(found["unexpected_keys"])),
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{where} {problems[0]}{more}; it is of another model, or incomplete")


def _text_model(model: Any) -> Any:
    """The causal language model inside a multimodal one (which has a `text_config`); any other as it is."""
    settings = model.config.get_text_config()
    if settings is model.config:
        return model
    with empty_modules():
        text = AutoModelForCausalLM.from_config(settings, dtype=model.dtype, trust_remote_code=False)
    setattr(text, body_name(text), model.get_decoder())
    text.set_output_embeddings(model.get_output_embeddings())
    for name, tensor in text.state_dict().items():
        if tensor.is_meta:
            raise UserError(f"{type(model).__name__} has no weights for {name} of its text model")
    return text


# --- abilities -------------------------------------------------------------------------------------------------------


def _measured(llm: LLM) -> LLMAbilities:
    """Its abilities, from the cache where it was measured before (`abilities/<digest>.json`)."""
    file = cache_folder() / "abilities" / f"{_digest(llm)}.json"
    with contextlib.ExitStack() as stack:
        if (found := _stored(file)) is not None:
            return found
        with contextlib.suppress(UserError):  # a cache that cannot be written saves no time, and is no error
            # Of several processes on a machine one measures.
            stack.enter_context(exclusive(file.with_suffix(".lock"), "measuring the language model", show=False))
        if (found := _stored(file)) is None:
            found = measure(llm)
            with contextlib.suppress(UserError):
                write_json(file, asdict(found))
    return found


def _stored(file: Path) -> LLMAbilities | None:
    try:
        found = read_json(file)
    except (UserError, OSError):
        return None
    wanted = {name: type(value) for name, value in asdict(LLMAbilities()).items()}
    if not isinstance(found, dict) or {name: type(value) for name, value in found.items()} != wanted:
        return None  # damaged, or of other code: it is measured anew
    return LLMAbilities(**found)


def _digest(llm: LLM) -> str:
    """SHA-256 of what the abilities depend on: libraries, configuration, names, shapes and types of tensors.

    Of the weights themselves a few values of each tensor count: to hash all of them takes longer than to measure.
    """
    settings = llm.model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
    versions = [_MEASURED, torch.__version__, transformers.__version__, type(llm.model).__name__]
    versions.append(llm.model.config._attn_implementation)  # which the settings leave out
    digest = hashlib.sha256(json.dumps([versions, settings], sort_keys=True, default=str).encode())
    for name, tensor in sorted(llm.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        few = tensor.detach().flatten()[:_SAMPLED].cpu().contiguous()
        digest.update(few.view(torch.uint8).numpy().data)
    return digest.hexdigest()
