"""The recall that training of BLIP-2's first stage watches: its value where it is known, and the same on any ranks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from instructblip.evaluation.pairs import caption_pairs, pair_recall
from torch import Tensor

from instructblip.data.records import Record
from instructblip.distributed import Ranks
from instructblip.errors import DamagedSample, UserError
from tests.kit.ranks import on_ranks
from tests.kit.stage1 import tiny_stage1
from tests.kit.tiny import tiny_images


def pair(row: int, caption: str = "", picture: str | None = None) -> Any:
    record = Record(str(row), "caption", captions=(caption or f"text {row}",))
    return SimpleNamespace(id=f"set/{row}", shard=None, row=row, image_key=picture or str(row), record=record)


def knowing(image_NQE: Tensor, text_NE: Tensor) -> Any:
    """A model that has these features, of pictures by their number and of texts by theirs."""
    return SimpleNamespace(
        image_tokens=lambda images: images,
        encode_images=lambda tokens: SimpleNamespace(projected_BQE=image_NQE[tokens[:, 0]]),
        tokenize=lambda texts: (torch.tensor([int(text.split()[1]) for text in texts]), None),
        encode_texts=lambda ids, mask: SimpleNamespace(projected_BE=text_NE[ids]),
    )


def recall(image_NQE: Tensor, text_NE: Tensor) -> float:
    pairs = [pair(row) for row in range(len(text_NE))]
    return pair_recall(knowing(image_NQE, text_NE), pairs, lambda shard, row: torch.tensor([row]), batch_size=2)


def test_known_features_have_known_recall() -> None:
    own = torch.eye(5)
    nearest = torch.stack([own, own.roll(1, dims=0)], dim=1)  # the second query points elsewhere
    assert recall(own[:, None], own) == 100
    assert recall(own.roll(1, dims=0)[:, None], own) == 0
    assert recall(nearest, own) == 0  # a tie is a miss
    assert recall(nearest * torch.tensor([1.0, 0.5])[:, None], own) == 100
    one_sided = torch.cat([own[:4], own[3:4]])[:, None]  # the last picture finds the fourth's text
    assert recall(one_sided, own) == pytest.approx(100 * (4 + 3) / 10)


def test_random_features_are_at_chance() -> None:
    torch.manual_seed(0)
    found = recall(torch.randn(400, 2, 16), torch.randn(400, 16))
    assert found < 2  # 1 in 400


def test_more_pairs_than_are_compared_at_once() -> None:
    torch.manual_seed(0)
    text_NE = torch.nn.functional.normalize(torch.randn(150, 32), dim=1)
    assert recall(text_NE[:, None], text_NE) == 100


def test_a_picture_counts_once_and_a_set_without_captions_is_refused() -> None:
    asked = [pair(0, "one"), pair(1, "another", picture="0"), pair(2)]
    task: Any = SimpleNamespace(samples=asked, card=SimpleNamespace(name="easy_vqa_shape"))
    assert [sample.record.captions for sample in caption_pairs(task)] == [("one",), ("text 2",)]
    task.samples = [SimpleNamespace(record=Record("0", "shape", question="what?"), image_key="0")]
    with pytest.raises(UserError, match=r"suite\.held_in names easy_vqa_shape, which has no captions"):
        caption_pairs(task)


def test_a_damaged_picture_is_named() -> None:
    def damaged(shard: object, row: int) -> Tensor:
        raise DamagedSample("cut short")

    with pytest.raises(UserError, match="set/0: cut short; prepare the dataset again"):
        pair_recall(tiny_stage1(), [pair(0)], damaged, batch_size=1)


def shared(ranks: Ranks) -> list[float]:
    """The recall among seven pairs, and among two: too few for three ranks."""
    model, images = tiny_stage1().eval(), tiny_images(7)
    sets = [[pair(row) for row in range(count)] for count in (7, 2)]
    return [pair_recall(model, pairs, lambda shard, row: images[row], batch_size=2, ranks=ranks) for pairs in sets]


def test_ranks_find_what_one_process_finds() -> None:
    assert on_ranks(3, shared) == [shared(Ranks())] * 3
