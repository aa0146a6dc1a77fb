"""How a run is laid over processes, as far as its configuration says it; `parallel.py` does it."""

import torch

from instructblip.errors import UserError

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}


def is_sharded(kind: str, world_size: int) -> bool:
    """Whether blocks are shared out; one process has nobody to share with."""
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
