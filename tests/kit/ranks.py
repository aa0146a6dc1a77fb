"""A function on several ranks: real processes that meet over gloo, as torchrun's would, and the values that they return."""

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from instructblip.distributed import start_ranks

SECONDS = 400  # processes that take longer hang


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What each rank's `function(ranks, *arguments)` returns: a module's function, and values that can be pickled."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    context = multiprocessing.get_context("forkserver")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_run, args=(rank, count, port, end, function, arguments))
        for rank, (_, end) in enumerate(pipes)
    ]
    for process, (_, end) in zip(processes, pipes, strict=True):
        process.start()
        end.close()  # so that a process which ends without an answer is noticed
    try:
        return [_received(start) for start, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _received(pipe: Connection) -> Any:
    assert pipe.poll(SECONDS), f"no answer after {SECONDS} s"
    value, error = pickle.loads(pipe.recv_bytes())
    if error is not None:
        raise error
    return value


def _run(
    rank: int, count: int, port: str, end: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ.update(place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    torch.set_num_threads(1)
    try:
        with start_ranks(torch.device("cpu"), timeout=60.0) as ranks:
            end.send_bytes(pickle.dumps((function(ranks, *arguments), None)))  # not as torch would: by shared memory
            ranks.gather(None)  # none leaves while another still speaks
    except Exception as error:
        end.send_bytes(pickle.dumps((None, error)))
