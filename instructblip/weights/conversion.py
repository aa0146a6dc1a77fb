"""The work of `python -m instructblip.weights`: convert, and compare source and result stage by stage."""

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from instructblip.config.schema import ModelConfig
from instructblip.errors import UserError
from instructblip.files import atomic_folder, atomic_path
from instructblip.models.base import Model
from instructblip.models.blip import BLIP
from instructblip.models.blip2 import BLIP2
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llava import LLaVA
from instructblip.startup import print_all_signs
from instructblip.weights.blip import blip_checkpoint, load_blip, save_blip
from instructblip.weights.lavis import LN_VISION_EPS, load_lavis, model_state, read_lavis, refuse_adapters, save_lavis
from instructblip.weights.load import LoadedModel, find_source, huggingface_source, llm_config, load_model, load_run
from instructblip.weights.model_card import write_model_card
from instructblip.weights.names import SIDECAR
from instructblip.weights.native import (
    CONFIG,
    blip_parts_config,
    llava_parts_config,
    parts_config,
    save_blip_parts,
    save_llava_parts,
    save_native,
    save_parts,
    write_config,
)
from instructblip.weights.parity import (
    KnownModel,
    Trace,
    Traces,
    model_dtype,
    rounding_bounds,
    stage_differences,
    traces_native,
)
from instructblip.weights.parity_transformers import traces_huggingface
from instructblip.weights.publish import check_push, push
from instructblip.weights.transformers_settings import read_settings
from instructblip.weights.transformers_write import save_huggingface

EXIT_DIFFERS, EXIT_USER_ERROR = 1, 2


class _DiffersError(Exception):
    """The result computes something else than the source."""


class Row(NamedTuple):
    """A stage of a certificate."""

    stage: str
    difference: float
    bound: float

    @property
    def within(self) -> bool:
        """NaN is no parity either."""
        return self.difference <= self.bound


class Certificate(NamedTuple):
    """How far apart source and result compute in one type."""

    dtype: torch.dtype
    rows: list[Row]

    @classmethod
    def of(cls, dtype: torch.dtype, source: Trace, target: Trace, bounds: Mapping[str, float]) -> "Certificate":
        """Compare two traces, stage by stage."""
        found = stage_differences(source, target)
        return cls(dtype, [Row(stage, found[stage], bounds.get(stage, 0.0)) for stage in found])


def convert(options: argparse.Namespace) -> int:
    """Convert, show the certificate, write and send as the command's options say; return its exit status."""
    print_all_signs()
    console = Console()
    try:
        _check_publishing(options)
        with _target(Path(options.target), options.to, overwrite=options.overwrite) as partial:
            certificates = _compare(*_convert(options, partial), options.bound)
            for certificate in certificates:
                console.print(_table(certificate))
            if not all(row.within for certificate in certificates for row in certificate.rows):
                raise _DiffersError
    except UserError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        return EXIT_USER_ERROR
    except _DiffersError:
        console.print(
            f"above the bound: {options.target} was not written; --bound allows larger differences", markup=False
        )
        return EXIT_DIFFERS
    console.print(f"wrote {options.target}", markup=False, soft_wrap=True)
    return _push(options, console) if options.push else 0


def _check_publishing(options: argparse.Namespace) -> None:
    if options.to != "huggingface" and (options.card or options.push):
        raise UserError("--card and --push are of what others can open; they go with --to huggingface")
    if not options.card and (options.results or options.licence):
        raise UserError("--results and --licence are of the card; give --card")
    if options.public and not options.push:
        raise UserError("--public is of what is sent; give --push USER/NAME")
    if options.push:
        check_push(options.push, replace=options.overwrite)


def _push(options: argparse.Namespace, console: Console) -> int:
    try:
        address = push(Path(options.target), options.push, public=options.public)
    except UserError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        return EXIT_USER_ERROR
    console.print(f"sent to {address}", markup=False, soft_wrap=True)
    return 0


@contextlib.contextmanager
def _target(target: Path, kind: str, *, overwrite: bool) -> Iterator[Path]:
    """Where to write; it takes TARGET's place when everything went well."""
    if kind == "lavis":
        if target.exists() and not overwrite:
            raise UserError(f"{target} exists already; choose another file, or give --overwrite")
        with atomic_path(target) as partial:
            yield partial
    else:
        mark = {"huggingface": SIDECAR, "native": CONFIG}[kind]
        with atomic_folder(target, overwrite_if=mark if overwrite else None) as partial:
            yield partial


def _convert(options: argparse.Namespace, partial: Path) -> tuple[torch.dtype, Traces, Traces]:
    """Write the result to `partial` and open it again.

    Returns:
        The coarsest type of the source's parts, what the source computes, and what the result computes.
    """
    folder = huggingface_source(options.source)
    source = None if folder is None or options.llm or options.adapter else traces_huggingface(folder)
    loaded, model = _load(options)
    dtype, config = model_dtype(model), None
    if options.to == "huggingface":
        save_huggingface(model, partial, merge=options.adapters == "merged")
    elif options.to == "lavis":
        _save_lavis(loaded, model, partial)
    else:
        config = _save_native(loaded, model, folder, options, partial)
    if options.card:
        _write_card(options, loaded, partial)
    source = source or traces_native(model)
    del loaded, model  # two models would not fit where one does
    if options.to == "huggingface":
        return dtype, source, traces_huggingface(partial, pad_as_saved=True)
    if config is None:
        return dtype, source, traces_native(_with_lavis(partial, _load(options)[1]))
    target = traces_native(_known(load_run(partial, device="cpu").model))
    write_config(config, partial)
    return dtype, source, target


def _write_card(options: argparse.Namespace, loaded: LoadedModel, partial: Path) -> None:
    write_model_card(
        partial,
        loaded,
        find_source(options.source, options.llm),
        name=options.push or options.target,
        origin=options.source,
        results=options.results,
        licence=options.licence,
    )


def _load(options: argparse.Namespace) -> tuple[LoadedModel, KnownModel]:
    loaded = load_model(
        options.source,
        llm=options.llm,
        llm_path=options.llm_path,
        vision_path=options.vision_path,
        qformer_path=options.qformer_path,
        adapter=options.adapter,
        device="cpu",
    )
    return loaded, _known(loaded.model)


def _save_lavis(loaded: LoadedModel, model: KnownModel, path: Path) -> None:
    if isinstance(model, BLIP):
        refuse_adapters(model)
        save_blip(model, path)
        return
    if isinstance(model, LLaVA):
        raise UserError(
            "LAVIS's files have no place for a connector that is no Q-Former; take --to huggingface or native"
        )
    llm = None if loaded.config is None else loaded.config.llm
    save_lavis(model, path, projection=None if llm is None else llm.lavis_projection)


def _known(model: Model) -> KnownModel:
    assert isinstance(model, InstructBLIP | LLaVA | BLIP2 | BLIP)
    return model


def _save_native(
    loaded: LoadedModel,
    model: KnownModel,
    folder: Path | None,
    options: argparse.Namespace,
    partial: Path,
) -> ModelConfig:
    """Write a run whose paths lead to `partial`; return the configuration whose paths lead to TARGET."""
    if folder is None:
        assert loaded.config is not None
        save_native(model, loaded.config, partial, loaded.standing)
        return loaded.config
    if isinstance(model, BLIP):
        save_blip_parts(model, partial)
        here, there = (
            blip_parts_config(model, place, loaded.name) for place in (partial, Path(options.target).absolute())
        )
        save_native(model, here, partial, loaded.standing)
        return there
    llm = None if options.llm is None else llm_config(options.llm, options.llm_path)
    if isinstance(model, LLaVA):
        save_llava_parts(model, partial, with_llm=llm is None)
        here, there = (
            llava_parts_config(model, place, loaded.name, llm=llm)
            for place in (partial, Path(options.target).absolute())
        )
        save_native(model, here, partial, loaded.standing)
        return there
    settings = read_settings(folder)
    save_parts(model, settings, partial, with_llm=llm is None)
    here, there = (
        parts_config(model, settings, place, loaded.name, llm=llm)
        for place in (partial, Path(options.target).absolute())
    )
    save_native(model, here, partial, loaded.standing)
    return there


def _with_lavis(path: Path, model: KnownModel) -> KnownModel:
    """The written file between the source's frozen parts, which such a file does not hold; BLIP's holds all."""
    if isinstance(model, BLIP):
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)  # whatever the file lacks will show
        load_blip(blip_checkpoint(path, model_state(path)), model)
        return model
    assert not isinstance(model, LLaVA)  # which was not written
    for tensor in model.held_state().values():
        tensor.fill_(float("nan"))  # whatever the file lacks will show
    if isinstance(model.vision_norm, nn.LayerNorm):
        model.vision_norm.eps = LN_VISION_EPS
    load_lavis(read_lavis(path), model)
    return model


def _compare(dtype: torch.dtype, source: Traces, target: Traces, bound: float) -> list[Certificate]:
    exact = Certificate.of(torch.float32, source.float32, target.float32, dict.fromkeys(source.float32, bound))
    if dtype == torch.float32:
        return [exact]
    return [Certificate.of(dtype, source.loaded, target.loaded, rounding_bounds(source.loaded, dtype)), exact]


def _table(certificate: Certificate) -> Table:
    name = str(certificate.dtype).removeprefix("torch.")
    table = Table(title="parity of source and result", caption=f"{name}, fixed random input")
    for heading in ("stage", "largest difference", "bound", ""):
        table.add_column(heading, justify="left" if heading in ("stage", "") else "right")
    for row in certificate.rows:
        table.add_row(row.stage, f"{row.difference:.3g}", f"{row.bound:.3g}", "within" if row.within else "ABOVE")
    return table
