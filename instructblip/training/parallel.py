"""How a model is laid over processes, from outside and in a fixed order: activation checkpointing, compile, FSDP2, DDP.

The Q-Former is small (0.2 B parameters): every process holds it, and its gradients are summed over all. Vision encoder and
LLM are large: every process holds them (`ddp`), or a share of each block, gathered when the block runs (`fsdp`), whether
they are frozen or trained. Nothing here changes a result beyond rounding.
"""

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator
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
from instructblip.models.adapters import is_adapter
from instructblip.models.base import Inputs, Model, Outputs, PartStructure
from instructblip.training.layout import check_layout

_RECOMPILE_LIMIT = 64


@dataclass(frozen=True)
class StepContext:
    """How a step is carried out.

    Attributes:
        ranks: this process among the run's.
        wrapped: the model inside DDP, where there are several processes.
        autocast: dtype that matrix products of the trainable part are computed in; None leaves float32.
        micro_batch_means: the loss is a mean over micro-batches of their own means, not one over the global batch.
        equal_passes: every rank must make equally many forward passes, since blocks are gathered in each.
        skip_non_finite: pass over a step whose loss or gradient is not finite, instead of ending the run.
        stop_signal: number of the signal that asked this process to stop, else 0.
    """

    ranks: Ranks = field(default_factory=Ranks)
    wrapped: DistributedDataParallel | None = None
    autocast: torch.dtype | None = None
    micro_batch_means: bool = False
    equal_passes: bool = False
    skip_non_finite: bool = False
    stop_signal: Callable[[], int] = lambda: 0

    def forward(
        self,
        model: Model,
        inputs: Inputs,
        wanted: Collection[str],
        *,
        packed: bool = False,
        through_wrapper: bool = True,
    ) -> Outputs:
        """The model's named outputs, through DDP where it is wrapped; a pass without gradient need not go through it."""
        with self.autocasting(model):
            called = (self.wrapped if through_wrapper else None) or model
            outputs: Outputs = called(inputs, wanted, packed=packed)
        return outputs

    def autocasting(self, model: Model) -> contextlib.AbstractContextManager[object]:
        """Where the model's passes are computed."""
        return torch.autocast(model.device.type, self.autocast) if self.autocast else contextlib.nullcontext()

    def accumulate(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a micro-batch's forward and backward pass: gradients are exchanged in the last one only."""
        return contextlib.nullcontext() if self.wrapped is None or last else self._no_sync()

    @contextlib.contextmanager
    def _no_sync(self) -> Iterator[None]:
        assert self.wrapped is not None
        with self.wrapped.no_sync():
            yield


def parallelize(
    model: Model,
    ranks: Ranks,
    *,
    kind: str,
    shard_size: int | None = None,
    activation_checkpointing: bool = False,
    compile_blocks: bool = False,
    some_unused: bool = True,
) -> DistributedDataParallel | None:
    """Lay a built model, its weights in place, over the processes; return its DDP wrapper where there are several.

    Sharding replaces parameters: make the optimiser afterwards.

    Args:
        model: on its device, but for parts that are to be sharded. The same object goes on being used for everything
            but training passes.
        kind: with one process all are the same.
        shard_size: processes that hold the sharded parts once together: all of them when None. A node's number of GPUs
            keeps the gathering inside nodes (hybrid sharding).
        activation_checkpointing: recompute, in the backward pass, blocks that gradients pass through.
        compile_blocks: compile each transformer block.
        some_unused: a pass may leave weights out that train, which DDP then looks for in each.

    Raises:
        UserError: `single` with several processes, or a shard size that does not divide them.
    """
    check_layout(kind, shard_size, ranks.world_size)
    parts = model.structure()
    if activation_checkpointing:
        for part, structure in parts.items():
            if structure.recompute or part in model.trained_parts:
                for block in structure.blocks:
                    _recompute(block)
    if compile_blocks:
        # Blocks of all kinds, first and last ones, each for fixed and for changing lengths, with and without gradient, may
        # come through one function; past the limit, 8 by default, torch leaves what comes next uncompiled.
        torch._dynamo.config.recompile_limit = max(_RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
        for structure in parts.values():
            for block in structure.blocks:
                block.compile()
    if ranks.world_size == 1:
        return None
    if kind == "fsdp":
        for part, structure in parts.items():
            if structure.roots:
                trains = part in model.full_parts  # adapters stay whole, and DDP sums their gradients
                _shard(structure, _shard_mesh(ranks, shard_size, model.device.type, reduces=trains), trains=trains)
                for module in model.part_modules(part):
                    module.to(model.device)  # tables, norms and heads
    return _replicate(model, some_unused=some_unused)


def _recompute(block: nn.Module) -> None:
    """Keep only the block's inputs for the backward pass; its parameters and their names stay as they are."""
    inner = block.forward

    def forward(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*inputs, **options)
        return checkpoint(inner, *inputs, use_reentrant=False, **options)

    block.forward = forward


def _shard_mesh(ranks: Ranks, shard_size: int | None, device: str, *, reduces: bool) -> DeviceMesh:
    """The processes that hold a part once together, this one among them; with `reduces` also those that hold it again.

    What is frozen is never reduced, so nothing is exchanged between groups that each hold it whole.
    """
    size = shard_size or ranks.world_size
    if size == ranks.world_size:
        assert dist.group.WORLD is not None
        return DeviceMesh.from_group(dist.group.WORLD, device)
    bound = timedelta(seconds=ranks.timeout)  # a mesh's own groups would have the library's
    places = torch.arange(ranks.world_size).view(-1, size)
    own = [
        dist.new_group(members, timeout=bound)  # every rank makes every group, in the same order
        for groups in (places, places.T)
        for members in groups.tolist()
    ]
    shard, replicate = own[ranks.rank // size], own[len(places) + ranks.rank % size]
    if not reduces:
        return DeviceMesh.from_group(shard, device)
    return DeviceMesh.from_group([replicate, shard], device, places, mesh_dim_names=("replicate", "shard"))


def _shard(part: PartStructure, mesh: DeviceMesh, *, trains: bool) -> None:
    """Shard a part's blocks. Tables, norms, heads and adapters stay whole: they are small, or read outside forward passes.

    Blocks may come from the CPU: each is moved when it is sharded, so that no device ever holds all.
    """
    sharded: list[FSDPModule] = [
        fully_shard(block, mesh=mesh, ignored_params=_kept_whole(block)) for block in part.blocks
    ]
    # A root above the blocks lets each be gathered while the one before it runs.
    for root in {id(root): root for root in part.roots}.values():
        top = fully_shard(root, mesh=mesh, ignored_params=_unsharded(root))
        sharded.append(top)
        if part.entry != "forward":
            register_fsdp_forward_method(root, part.entry)
        root.register_forward_hook(partial(_end_without_gradient, top))
        if part.ends_early:  # an exception ends such a pass: no hook of the root runs, and a block stays gathered
            _after_each_call(root, part.entry, top)
    if trains:
        for module in sharded:
            # A mean over ranks would have to be undone: the loss is divided by the units of the global batch.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def _end_without_gradient(root: FSDPModule, *_: object) -> None:
    """A forward hook: FSDP keeps notes of a pass until its backward pass; where none comes they would grow without bound."""
    if not torch.is_grad_enabled():
        root.reset_iter_state()


def forget_gathered(model: nn.Module) -> None:
    """Give back the blocks that are gathered: after a change of weights from outside, passes must gather them anew."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _after_each_call(root: nn.Module, entry: str, sharded: FSDPModule) -> None:
    inner = getattr(root, entry)

    def call(*inputs: Any, **options: Any) -> Any:
        try:
            return inner(*inputs, **options)
        finally:
            _end_without_gradient(sharded)

    setattr(root, entry, call)


def _unsharded(root: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in root.parameters() if not isinstance(parameter, DTensor)}


def _kept_whole(block: nn.Module) -> set[nn.Parameter]:
    tables = [module for module in block.modules() if isinstance(module, nn.Embedding)]
    adapters = {parameter for name, parameter in block.named_parameters() if is_adapter(name)}
    return adapters | {parameter for table in tables for parameter in table.parameters()}


def _replicate(model: Model, *, some_unused: bool) -> DistributedDataParallel:
    """Sum gradients of what trains and is held whole over all processes while the backward pass still runs."""
    device = model.device
    # What is frozen has no gradient; what is sharded is reduced by FSDP.
    others = [name for name, value in model.named_parameters() if not value.requires_grad or isinstance(value, DTensor)]
    # One gradient of shape (1, Q, D) has other strides than its place in the bucket, which costs nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, others)
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        forward_sync_buffers=False,  # there are none that change
        init_sync=False,  # every process started from the same files and seed; see `check_equal`
        gradient_as_bucket_view=True,
        find_unused_parameters=some_unused,
    )
    # A mean over ranks would have to be undone: the loss is divided by the number of tokens in the global batch.
    wrapped.register_comm_hook(None, _sum_gradients)
    return wrapped


def _sum_gradients(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future
