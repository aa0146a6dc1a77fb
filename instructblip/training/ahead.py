"""The next step's images: on their way to the device, or also through a frozen vision encoder, while a step is computed.

On a GPU that happens on a stream of its own, from pinned memory. On a CPU it is the same work done earlier.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from instructblip.data.batching import Batch
from instructblip.data.loader import LoadedStep
from instructblip.devices import to_device
from instructblip.models.base import Model
from instructblip.training.parallel import StepContext


class _Begun(NamedTuple):
    """A step whose images are on their way, and what is recorded behind them on their stream."""

    loaded: LoadedStep
    arrived: torch.cuda.Event | None


class Ahead:
    """Yields steps as they come, each once the images of the one behind it have been begun.

    Args:
        model: on its device.
        context: how its passes are carried out.
        encodes: the vision encoder, which is frozen, runs too.
    """

    def __init__(self, model: Model, context: StepContext, *, encodes: bool) -> None:
        self._model, self._context, self._encodes = model, context, encodes
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None

    def steps(self, loaded: Iterator[LoadedStep]) -> Iterator[LoadedStep]:
        """The same steps with images on the device, or with image tokens beside them."""
        before: _Begun | None = None
        for step in loaded:
            begun = self._begin(step)
            if before is not None:
                yield self._end(before)
            before = begun
        if before is not None:
            yield self._end(before)

    def _begin(self, step: LoadedStep) -> _Begun:
        if self._stream is None:
            return _Begun(self._placed(step), None)
        with torch.cuda.stream(self._stream):
            placed = self._placed(step)
            arrived = torch.cuda.Event()
            arrived.record()
        return _Begun(placed, arrived)

    def _end(self, begun: _Begun) -> LoadedStep:
        if begun.arrived is not None:
            stream = torch.cuda.current_stream(self._model.device)
            stream.wait_event(begun.arrived)
            for batch in begun.loaded.batches:
                for tensor in (batch.images, *batch.encoded):
                    if tensor.is_cuda:
                        tensor.record_stream(stream)  # its memory is not given away before that stream has read it
        return begun.loaded

    def _placed(self, step: LoadedStep) -> LoadedStep:
        return step._replace(batches=[self._with_images(batch) for batch in step.batches])

    def _with_images(self, batch: Batch) -> Batch:
        if not self._encodes:
            return batch._replace(images=to_device(batch.images, self._model.device))
        with torch.no_grad(), self._context.autocasting(self._model):
            return batch._replace(encoded=(self._model.image_tokens(batch.images, batch.pixel_ids),))
