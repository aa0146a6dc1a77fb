"""What answering questions and ranking pairs share: batches that memory holds, and images read ahead."""

import gc
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from instructblip.data.feature_cache import ReadImage
from instructblip.errors import UserError
from instructblip.evaluation.protocol import EvaluationSample

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")
Key = TypeVar("Key", bound=Hashable)

_READERS = 4  # threads that read and decode the next chunk's images meanwhile


class BatchLimit:
    """A batch size that is halved whenever memory runs out, and never raised again."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]], *, given: int = 1
    ) -> list[Result]:
        """Apply `work` to all items, as many at a time as memory holds.

        Args:
            items: all of them.
            work: gives a result for each.
            given: so many batches are handed to `work` in one call; it takes `size` of their items at a time itself.

        Raises:
            UserError: memory does not hold a single item.
        """
        done: list[Result] = []
        while len(done) < len(items):
            batch = items[len(done) : len(done) + self.size * given]
            results = self._try(batch, work)
            together = min(len(batch), self.size)
            if results is not None:
                done += results
            elif together == 1:
                raise UserError(
                    "one question alone does not fit into the GPU's memory; use a smaller model or another GPU"
                )
            else:
                self.size = together // 2
                logger.warning("out of memory with a batch of %d; going on with %d", together, self.size)
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        return done

    @staticmethod
    def _try(batch: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> Sequence[Result] | None:
        try:
            return work(batch)
        except torch.OutOfMemoryError:
            return None  # its tensors are freed with its stack frame


def read_ahead(
    chunks: Sequence[Sequence[EvaluationSample]], read_image: ReadImage
) -> Iterator[dict[str, Future[Tensor]]]:
    """The images of each chunk of samples by key, the next chunk's being read meanwhile."""
    keyed = [{sample.image_key: sample for sample in chunk} for chunk in chunks]
    return read_chunks(keyed, lambda sample: read_image(sample.shard, sample.row))


def read_chunks(
    chunks: Sequence[Mapping[Key, Item]], read: Callable[[Item], Result]
) -> Iterator[dict[Key, Future[Result]]]:
    """What `read` gives for the items of each chunk, by key, the next chunk's being read meanwhile."""
    with ThreadPoolExecutor(_READERS) as pool:

        def start(chunk: Mapping[Key, Item]) -> dict[Key, Future[Result]]:
            return {key: pool.submit(read, item) for key, item in chunk.items()}

        try:
            following = start(chunks[0]) if chunks else {}
            for number in range(len(chunks)):
                current, following = following, start(chunks[number + 1]) if number + 1 < len(chunks) else {}
                yield current
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
