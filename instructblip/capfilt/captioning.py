"""Captions are drawn, and scored beside the web's texts.

Shape legend: B pictures, H and W pixels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from instructblip.capfilt.models import Models
from instructblip.capfilt.pictures import Fit, Seen
from instructblip.capfilt.settings import Settings
from instructblip.capfilt.texts import Text, one_line, texts_to_judge
from instructblip.data.mixture import seeded_generator
from instructblip.data.text_processors import TEXT_PROCESSORS
from instructblip.errors import UserError
from instructblip.evaluation.work import BatchLimit


class Answer(NamedTuple):
    """The captions that were drawn for a picture, and the scores of its texts in the order of `texts_to_judge`."""

    captions: list[str]
    scores: list[float]


class Captioning:
    """Answers pictures.

    Args:
        models, settings: see there.
        batch_size: captions, or pairs, at a time.
    """

    def __init__(self, models: Models, settings: Settings, batch_size: int) -> None:
        self.models = models
        self.settings = settings
        self.pictures = max(1, batch_size // settings.captions)  # of a chunk
        self._drawing, self._judging = BatchLimit(self.pictures), BatchLimit(batch_size)

    @torch.inference_mode()
    def answer(self, pictures: Sequence[Seen]) -> list[Answer]:
        """Draw and score the captions of pictures.

        Raises:
            UserError: scores that are not finite numbers.
        """
        captions = self._drawing.run(pictures, self._draw)
        texts = [
            texts_to_judge(own, picture.web, self.settings.text_processor)[0]
            for own, picture in zip(captions, pictures, strict=True)
        ]
        scores = iter(self._score(pictures, texts))
        return [Answer(own, [next(scores) for _ in judged]) for own, judged in zip(captions, texts, strict=True)]

    def _draw(self, pictures: Sequence[Seen]) -> list[list[str]]:
        captioner, settings = self.models.captioner, self.settings
        pixels_B3HW = _stacked(pictures, ("resize_square", captioner.vision.image_size))
        tokens = captioner.image_tokens(pixels_B3HW[:, None]).repeat_interleave(settings.captions, dim=0)
        noise = [self._noise(picture.name, number) for picture in pictures for number in range(settings.captions)]
        texts = captioner.generate(
            tokens,
            None if settings.prompt is None else [settings.prompt] * len(tokens),
            do_sample=True,
            num_beams=1,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.min_new_tokens,
            repetition_penalty=settings.repetition_penalty,
            noise=torch.from_numpy(np.stack(noise)),
        )
        lines = [one_line(text) for text in texts]
        return [lines[start : start + settings.captions] for start in range(0, len(lines), settings.captions)]

    def _noise(self, picture: str, number: int) -> np.ndarray:
        stream = seeded_generator(self.settings.seed, "caption", picture, number)
        return stream.random(self.settings.max_new_tokens)

    def _score(self, pictures: Sequence[Seen], texts: Sequence[Sequence[Text]]) -> list[float]:
        """Of all texts of all pictures, one picture's after the other's."""
        judge, process = self.models.judge, TEXT_PROCESSORS[self.settings.text_processor]
        encoded = judge.encode(_stacked(pictures, judge.fit))
        pairs = [(row, process(item.text)) for row, own in enumerate(texts) for item in own]

        def score(batch: Sequence[tuple[int, str]]) -> list[float]:
            rows = torch.tensor([row for row, _ in batch], device=encoded.device)
            return judge.score(encoded[rows], [text for _, text in batch]).float().tolist()

        scores = self._judging.run(pairs, score)
        if not all(map(math.isfinite, scores)):
            raise UserError("the filter's scores are not finite numbers; its weights are damaged: fetch them again")
        return scores


def _stacked(pictures: Sequence[Seen], fit: Fit) -> Tensor:
    return torch.stack([picture.pixels[fit] for picture in pictures])
