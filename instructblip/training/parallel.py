"""How a model is laid over processes, from outside and in a fixed order: activation checkpointing, compile, FSDP2, DDP.

What trains is small (0.2 B parameters) and is held by every process in float32; its gradients are summed over all. What
is frozen is large: every process holds it (`ddp`), or a share of each block, gathered when the block runs (`fsdp`). Nothing
here changes a result beyond rounding.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from instructblip.distributed import Ranks
from instructblip.errors import UserError
from instructblip.models.instructblip import InstructBLIP, Loss

_RECOMPILE_LIMIT = 64


@dataclass(frozen=True)
class StepContext:
    """How a step is carried out.

    Attributes:
        ranks: this process among the run's.
        wrapped: the model inside DDP, where there are several processes.
        autocast: dtype that matrix products of the trainable part are computed in; None leaves float32.
        equal_passes: every rank must make equally many forward passes, since blocks are gathered in each.
        skip_non_finite: pass over a step whose loss or gradient is not finite, instead of ending the run.
        stop_signal: number of the signal that asked this process to stop, else 0.
    """

    ranks: Ranks = field(default_factory=Ranks)
    wrapped: DistributedDataParallel | None = None
    autocast: torch.dtype | None = None
    equal_passes: bool = False
    skip_non_finite: bool = False
    stop_signal: Callable[[], int] = lambda: 0

    def forward(self, model: InstructBLIP, *inputs: Any, **options: Any) -> Loss:
        """The model's loss, through DDP where it is wrapped."""
        device = model.projection.weight.device.type
        with torch.autocast(device, self.autocast) if self.autocast else contextlib.nullcontext():
            loss: Loss = (self.wrapped or model)(*inputs, **options)
        return loss

    def accumulate(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a micro-batch's forward and backward pass: gradients are exchanged in the last one only."""
        return contextlib.nullcontext() if self.wrapped is None or last else self._no_sync()

    @contextlib.contextmanager
    def _no_sync(self) -> Iterator[None]:
        assert self.wrapped is not None
        with self.wrapped.no_sync():
            yield


def parallelize(
    model: InstructBLIP,
    ranks: Ranks,
    *,
    kind: str,
    shard_size: int | None = None,
    activation_checkpointing: bool = False,
    compile_blocks: bool = False,
) -> DistributedDataParallel | None:
    """Lay a built model, its weights in place, over the processes; return its DDP wrapper where there are several.

    Args:
        model: on its device, but for a language model that is to be sharded. The same object goes on being used for
            everything but the loss.
        kind: with one process all are the same.
        shard_size: processes that hold the frozen parts once together: all of them when None. A node's number of GPUs keeps
            the gathering inside nodes (hybrid sharding).
        activation_checkpointing: recompute blocks of the language model and of the Q-Former in the backward pass.
        compile_blocks: compile each transformer block.

    Raises:
        UserError: `single` with several processes, or a shard size that does not divide them.
    """
    check_layout(kind, shard_size, ranks.world_size)
    language, qformer, vision = blocks_of(model.llm.model), list(model.qformer.layers), blocks_of(model.vision.backbone)
    if activation_checkpointing:
        for block in (*language, *qformer):
            _recompute(block)
    if compile_blocks:
        # Blocks of all kinds, first and last ones, each for fixed and for changing lengths, with and without gradient, may
        # come through one function; past the limit, 8 by default, torch leaves what comes next uncompiled.
        torch._dynamo.config.recompile_limit = max(_RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
        for block in (*language, *qformer, *vision):
            block.compile()
    if ranks.world_size == 1:
        return None
    if kind == "fsdp":
        mesh = _shard_mesh(ranks, shard_size, model.projection.weight.device.type)
        _shard_frozen(model, language, vision, mesh)
    return _replicate(model)


def is_sharded(kind: str, world_size: int) -> bool:
    """Whether the frozen blocks are shared out; one process has nobody to share with."""
    return kind == "fsdp" and world_size > 1


def check_layout(kind: str, shard_size: int | None, world_size: int) -> None:
    """Refuse a layout that so many processes cannot have.

    Raises:
        UserError: `single` with several processes, or a shard size that does not divide them.
    """
    if kind == "single" and world_size > 1:
        raise UserError(f"parallel=single, but there are {world_size} processes; use parallel=ddp or fsdp")
    if is_sharded(kind, world_size) and shard_size is not None and world_size % shard_size:
        raise UserError(
            f"parallel.shard_size={shard_size} does not divide {world_size} processes; give a node's number of GPUs"
        )


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer or CNN: members of its outermost lists of two and more modules of one class."""
    found: list[nn.Module] = []
    for child in module.children():
        members = list(child.children())
        is_list = isinstance(child, nn.ModuleList | nn.Sequential)
        if is_list and len(members) > 1 and len({type(member) for member in members}) == 1:
            found += members
        else:
            found += blocks_of(child)
    return found


def _recompute(block: nn.Module) -> None:
    """Keep only the block's inputs for the backward pass; its parameters and their names stay as they are."""
    inner = block.forward

    def forward(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*inputs, **options)
        return checkpoint(inner, *inputs, use_reentrant=False, **options)

    block.forward = forward


def _shard_mesh(ranks: Ranks, shard_size: int | None, device: str) -> DeviceMesh:
    """The processes that hold the frozen parts once together, this one among them.

    Between these groups nothing is exchanged: what is frozen is never reduced.
    """
    size = shard_size or ranks.world_size
    if size == ranks.world_size:
        assert dist.group.WORLD is not None
        return DeviceMesh.from_group(dist.group.WORLD, device)
    bound = timedelta(seconds=ranks.timeout)  # a mesh's own groups would have the library's
    groups = [
        dist.new_group(list(range(first, first + size)), timeout=bound) for first in range(0, ranks.world_size, size)
    ]
    return DeviceMesh.from_group(groups[ranks.rank // size], device)


def _shard_frozen(model: InstructBLIP, language: list[nn.Module], vision: list[nn.Module], mesh: DeviceMesh) -> None:
    """Shard the frozen blocks. Tables, norms and heads stay whole: they are small, and read outside forward passes.

    Blocks of the language model may come from the CPU: each is moved when it is sharded, so that no device ever holds all.
    """
    for block in (*language, *vision):
        fully_shard(block, mesh=mesh, ignored_params=_tables(block))
    # A root above the blocks lets each be gathered while the one before it runs.
    for root in {id(root): root for root in _language_roots(model)}.values():
        sharded = fully_shard(root, mesh=mesh, ignored_params=_unsharded(root))
        root.register_forward_hook(partial(_end_without_gradient, sharded))
    backbone = fully_shard(model.vision.backbone, mesh=mesh, ignored_params=_unsharded(model.vision.backbone))
    register_fsdp_forward_method(backbone, "forward_features")
    # Its passes never have a gradient. One that ends as soon as it has the layers it wants leaves a block gathered.
    model.vision.register_forward_hook(lambda *_: backbone.reset_iter_state())
    model.llm.to(model.projection.weight.device)  # tables, norms and heads


def _end_without_gradient(root: FSDPModule, *_: object) -> None:
    """A forward hook: FSDP keeps notes of a pass until its backward pass; where none comes they would grow without bound."""
    if not torch.is_grad_enabled():
        root.reset_iter_state()


def _language_roots(model: InstructBLIP) -> list[nn.Module]:
    """What is called in one forward pass: the decoder, or encoder and decoder one after the other."""
    language = model.llm.model
    if language.config.is_encoder_decoder:
        return [language.get_encoder(), language.get_decoder()]
    return [language.base_model]


def _unsharded(root: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in root.parameters() if not isinstance(parameter, DTensor)}


def _tables(block: nn.Module) -> set[nn.Parameter]:
    tables = [module for module in block.modules() if isinstance(module, nn.Embedding)]
    return {parameter for table in tables for parameter in table.parameters()}


def _replicate(model: InstructBLIP) -> DistributedDataParallel:
    """Sum gradients of what trains over all processes while the backward pass still runs."""
    device = model.projection.weight.device
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    # One gradient of shape (1, Q, D) has other strides than its place in the bucket, which costs nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        forward_sync_buffers=False,  # there are none that change
        init_sync=False,  # every process started from the same files and seed; see `check_equal`
        gradient_as_bucket_view=True,
    )
    # A mean over ranks would have to be undone: the loss is divided by the number of tokens in the global batch.
    wrapped.register_comm_hook(None, _sum_gradients)
    return wrapped


def _sum_gradients(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
