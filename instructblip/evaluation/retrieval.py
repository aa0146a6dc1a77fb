"""Retrieval: each image looks for its captions among all of a split, each caption for its image.

All pairs are compared by the cosine of the text and the nearest query. Of each row the `rerank` best are ranked anew, by the
matching head's logit of a match plus that cosine (LAVIS, `models/blip2_models/blip2.py`, `compute_sim_matrix`). Equal scores
stand in the order of the split. What is right but not among the best of the first comparison counts as not found.

An image is encoded once, by one of the ranks. Its tokens lie in files beside the journal until the task ends, so memory
holds only the images of the pairs at hand.

Shape legend: N images, C captions, B pairs, P image tokens, U vision width, Q queries, E projected width, R rows.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from instructblip.data.feature_cache import ReadImage
from instructblip.distributed import Ranks
from instructblip.errors import DamagedSample, UserError
from instructblip.evaluation.journal import Journal
from instructblip.evaluation.outcomes import Prediction, Ranking
from instructblip.evaluation.protocol import EvaluationSample, Task
from instructblip.evaluation.work import BatchLimit, read_ahead
from instructblip.files import atomic_path, errors_for_users
from instructblip.models.pairs import similarities
from instructblip.progress import progress_bar

_IMAGES_PER_FILE = 64
_IMAGES_PER_CHUNK = 8  # whose rows are answered together; with their captions some 50 rows
_KEPT = 10  # best ones of a row that are kept; recall looks no further
_FOLDER = "images-"


def answer_pairs(
    model: Any,
    task: Task,
    read_image: ReadImage,
    journal: Journal,
    keys: Sequence[str],
    *,
    batch_size: int,
    show: bool,
) -> None:
    """Rank the captions and images of this rank's share of the task's images, into the journal.

    What is ranked together depends on the task alone, so neither interruptions nor the number of ranks change a score.

    Args:
        model: with `encode_images`, `encode_texts` and `encode_pairs`, in evaluation mode.
        keys: the journal's, of the task's samples.
        batch_size: pairs at a time.

    Raises:
        UserError: an image is damaged, has two entries, or its files do not come from another rank.
    """
    _refuse_repeated_images(task)
    if all(key in journal for key in keys):
        return
    limit = BatchLimit(batch_size)
    images = _EncodedImages(None if journal.folder is None else _images_folder(journal.folder, keys))
    try:
        images.fill(model, task, read_image, journal.ranks, limit, show=show)
    except UserError as error:
        journal.give_up(str(error))  # or the others, the first among them or not, would wait for these files
        raise
    starts = range(0, len(keys), _IMAGES_PER_CHUNK)
    chunks = [range(start, min(start + _IMAGES_PER_CHUNK, len(keys))) for start in starts]
    left = [chunk for chunk in journal.ranks.share(chunks) if any(keys[number] not in journal for number in chunk)]
    if not left:  # then the first rank may end, and remove the files, before this one has seen all of them
        return
    journal.wait_until_none(partial(images.missing, len(keys)), f"files of {task.card.name}'s images")
    gallery = _gallery(model, task, images, limit)
    with progress_bar("images", show=show) as progress:
        bar = progress.add_task(f"ranking {task.card.name}", total=sum(map(len, left)))
        for chunk in left:
            journal.ranks.poll_stop()
            found = _rank_chunk(model, gallery, chunk, task.protocol.rerank, limit)
            journal.append(
                Prediction(
                    keys[number],
                    task.samples[number].id,
                    gallery.texts[row.ranked[0]],
                    row.scores,
                    row.ranked,
                    row.rank,
                    captions,
                )
                for number, (row, captions) in zip(chunk, found, strict=True)
                if keys[number] not in journal
            )
            progress.advance(bar, len(chunk))


def remove_images(folder: Path) -> None:
    """Remove the encoded images of tasks that ended, or that were interrupted and asked otherwise since."""
    for path in folder.glob(f"{_FOLDER}*"):
        shutil.rmtree(path, ignore_errors=True)


def _images_folder(folder: Path, keys: Sequence[str]) -> Path:
    """Named by what decides the tokens: model and protocol, which the journal's keys stand for."""
    return folder / f"{_FOLDER}{hashlib.sha256(''.join(keys).encode()).hexdigest()[:16]}"


def _refuse_repeated_images(task: Task) -> None:
    seen: dict[str, str] = {}
    for sample in task.samples:
        if sample.image_key in seen:
            raise UserError(
                f"{task.card.name}: {seen[sample.image_key]} and {sample.id} have one image, which would look for itself; "
                "retrieval needs one record an image, with all its captions"
            )
        seen[sample.image_key] = sample.id


# --- images ----------------------------------------------------------------------------------------------------------


class _EncodedImages:
    """Tokens and projected queries of a task's images, in files of `_IMAGES_PER_FILE`, or in memory without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._files: dict[int, Any] = {}  # in memory: tensors by name; on disk: open files, read row by row

    def fill(
        self, model: Any, task: Task, read_image: ReadImage, ranks: Ranks, limit: BatchLimit, *, show: bool
    ) -> None:
        """Encode this rank's share."""
        starts = range(0, len(task.samples), _IMAGES_PER_FILE)
        parts = [task.samples[start : start + _IMAGES_PER_FILE] for start in starts]
        own = [number for number in ranks.share(range(len(parts))) if not self._holds(number)]
        with progress_bar("images", show=show) as progress:
            bar = progress.add_task(f"encoding {task.card.name}", total=sum(len(parts[number]) for number in own))
            for number, pixels in zip(own, read_ahead([parts[number] for number in own], read_image), strict=True):
                ranks.poll_stop()
                read = [_read(sample, pixels[sample.image_key].result) for sample in parts[number]]
                self._keep(number, _encode(model, read, limit))
                progress.advance(bar, len(read))

    def missing(self, images: int) -> int:
        """Files that are not there yet, of so many images."""
        return sum(not self._holds(number) for number in range(-(-images // _IMAGES_PER_FILE)))

    def tokens(self, numbers: Sequence[int]) -> Tensor:
        """Image tokens (B, P, U) as `model.image_tokens` gave them."""
        places = (divmod(number, _IMAGES_PER_FILE) for number in numbers)
        return torch.stack([self._file(file)["tokens"][row] for file, row in places])

    def projected(self, count: int) -> Tensor:
        """Projected queries (N, Q, E) of all images."""
        return torch.cat([self._file(number)["projected"][:] for number in range(-(-count // _IMAGES_PER_FILE))])

    def _holds(self, number: int) -> bool:
        return number in self._files if self.folder is None else self._path(self.folder, number).is_file()

    def _keep(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        if self.folder is None:
            self._files[number] = tensors
            return
        path = self._path(self.folder, number)
        with errors_for_users(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as partial:
                save_file(dict(tensors), str(partial))

    def _file(self, number: int) -> Any:
        if number not in self._files:
            assert self.folder is not None
            file = safe_open(str(self._path(self.folder, number)), framework="pt")
            self._files[number] = {name: file.get_slice(name) for name in ("tokens", "projected")}
        return self._files[number]

    @staticmethod
    def _path(folder: Path, number: int) -> Path:
        return folder / f"{number:06d}.safetensors"


def _read(sample: EvaluationSample, result: Callable[[], Tensor]) -> Tensor:
    """The frames of a picture.

    Raises:
        UserError: it is damaged. A picture cannot be left out: every caption is ranked against it.
    """
    try:
        frames = result()
    except DamagedSample as error:
        raise UserError(f"{sample.id}: {error}; retrieval compares all pictures, so prepare the split again") from None
    if len(frames) != 1:
        raise UserError(f"{sample.id} has {len(frames)} frames; retrieval is for pictures")
    return frames


@torch.inference_mode()
def _encode(model: Any, images: Sequence[Tensor], limit: BatchLimit) -> dict[str, Tensor]:
    def encode(batch: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        tokens_BPU = model.image_tokens(torch.stack(list(batch)))
        projected_BQE = model.encode_images(tokens_BPU).projected_BQE
        return list(zip(tokens_BPU.cpu(), projected_BQE.float().cpu(), strict=True))

    pairs = limit.run(images, encode)
    return {
        "tokens": torch.stack([tokens for tokens, _ in pairs]),
        "projected": torch.stack([projected for _, projected in pairs]),
    }


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gallery:
    """All that is looked for.

    Attributes:
        images: see there.
        texts, token_ids: C captions, one image's after the other's.
        same: for each caption the first with the same tokens, which is computed in its place, so that equals are equal.
        first: number of each image's first caption, and C at the end.
        projected_NQE, projected_CE: unit length, on the model's device.
    """

    images: _EncodedImages
    texts: Sequence[str]
    token_ids: Sequence[Tensor]
    same: Sequence[int]
    first: Sequence[int]
    projected_NQE: Tensor
    projected_CE: Tensor


def _gallery(model: Any, task: Task, images: _EncodedImages, limit: BatchLimit) -> _Gallery:
    texts = task.vocabulary
    ids_CT, mask_CT = model.tokenize(task.processed(texts), max_tokens=task.protocol.max_text_tokens)
    token_ids = [ids[mask.bool()] for ids, mask in zip(ids_CT, mask_CT, strict=True)]
    seen: dict[tuple[int, ...], int] = {}
    same = [seen.setdefault(tuple(ids.tolist()), number) for number, ids in enumerate(token_ids)]
    return _Gallery(
        images,
        texts,
        token_ids,
        same,
        list(accumulate((len(sample.record.captions) for sample in task.samples), initial=0)),
        images.projected(len(task.samples)).to(model.device),
        _encode_texts(model, token_ids, same, limit),
    )


@torch.inference_mode()
def _encode_texts(model: Any, token_ids: Sequence[Tensor], same: Sequence[int], limit: BatchLimit) -> Tensor:
    """Projected texts (C, E), those of like length together."""
    order = sorted(set(same), key=lambda number: (len(token_ids[number]), number))

    def encode(numbers: Sequence[int]) -> list[Tensor]:
        return list(model.encode_texts(*_padded([token_ids[number] for number in numbers])).projected_BE.float())

    encoded = limit.run(order, encode)
    rows = dict(zip(order, encoded, strict=True))
    return torch.stack([rows[number] for number in same])


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) padded on the right, and their mask."""
    masks = [torch.ones_like(ids) for ids in rows]
    return pad_sequence(list(rows), batch_first=True), pad_sequence(masks, batch_first=True)


@torch.inference_mode()
def _rank_chunk(
    model: Any, gallery: _Gallery, chunk: range, rerank: int, limit: BatchLimit
) -> list[tuple[Ranking, tuple[Ranking, ...]]]:
    """The row of each image of a chunk, and those of its captions."""
    captions = range(gallery.first[chunk.start], gallery.first[chunk.stop])
    projected_NQE, projected_CE = gallery.projected_NQE, gallery.projected_CE
    of_images = _best(similarities(projected_NQE[chunk.start : chunk.stop], projected_CE), rerank)
    of_captions = _best(similarities(projected_NQE, projected_CE[captions.start : captions.stop]).T, rerank)
    pairs = {(image, text) for image, row in zip(chunk, of_images, strict=True) for text in row}
    pairs |= {(image, text) for text, row in zip(captions, of_captions, strict=True) for image in row}
    logits = _match(model, gallery, sorted(pairs), limit)
    found = []
    for image, row in zip(chunk, of_images, strict=True):
        own = range(gallery.first[image], gallery.first[image + 1])
        scores = {text: logits[image, text] + cosine for text, cosine in row.items()}
        rows = [of_captions[text - captions.start] for text in own]
        found.append(
            (
                _ranking(scores, own),
                tuple(
                    _ranking({other: logits[other, text] + cosine for other, cosine in row.items()}, [image])
                    for text, row in zip(own, rows, strict=True)
                ),
            )
        )
    return found


def _best(cosines_RC: Tensor, count: int) -> list[dict[int, float]]:
    """Column -> cosine of each row's best, the first of equals."""
    values, columns = (found[:, :count] for found in cosines_RC.sort(dim=1, descending=True, stable=True))
    return [
        dict(zip(row, cosines, strict=True)) for row, cosines in zip(columns.tolist(), values.tolist(), strict=True)
    ]


def _ranking(scores: Mapping[int, float], right: Sequence[int]) -> Ranking:
    """Best first, the first of equals, and the place of the first that is right."""
    order = sorted(scores, key=lambda number: (-scores[number], number))
    rank = next((place for place, number in enumerate(order) if number in right), None)
    kept = order[:_KEPT]
    return Ranking(tuple(kept), tuple(scores[number] for number in kept), rank)


def _match(
    model: Any, gallery: _Gallery, pairs: Sequence[tuple[int, int]], limit: BatchLimit
) -> dict[tuple[int, int], float]:
    """The matching head's logit of a match for pairs of image and caption.

    Pairs of one image stand together, for an image is read once a batch; among them captions of like length.
    """
    different = {(image, gallery.same[text]) for image, text in pairs}
    order = sorted(different, key=lambda pair: (pair[0], len(gallery.token_ids[pair[1]]), pair[1]))

    def match(batch: Sequence[tuple[int, int]]) -> list[float]:
        images = sorted({image for image, _ in batch})
        tokens_NPU = model.normalised(gallery.images.tokens(images).to(model.device))
        rows = torch.tensor([images.index(image) for image, _ in batch], device=model.device)
        texts = _padded([gallery.token_ids[text] for _, text in batch])
        found: list[float] = model.encode_pairs(tokens_NPU, *texts, rows).logits_B2[:, 1].float().tolist()
        return found

    logits = dict(zip(order, limit.run(order, match), strict=True))
    return {(image, text): logits[image, gallery.same[text]] for image, text in pairs}
