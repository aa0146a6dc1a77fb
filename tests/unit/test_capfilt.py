"""`python -m instructblip.capfilt`: what is kept, counted and written, and that captions depend on the picture alone."""

import dataclasses
import json
import re
import shutil
import threading
from collections import Counter
from collections.abc import Mapping
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from instructblip.capfilt.captioning import Captioning
from instructblip.capfilt.job import Job
from instructblip.capfilt.models import ClipJudge, find_models
from instructblip.capfilt.pictures import Part, Seen
from instructblip.capfilt.settings import settle
from instructblip.capfilt.shards import _left_to
from instructblip.capfilt.texts import Scored, choose_texts, texts_to_judge
from instructblip.config.schema import CapFiltConfig
from instructblip.data.cards import load_card
from instructblip.data.mixture import Mixture, MixtureEntry, seeded_generator
from instructblip.data.mixture_dataset import MixtureDataset, TrainingSet, decoded
from instructblip.data.prepare.convert import check_prepared, prepare_dataset
from instructblip.data.prepare.show import write_samples
from instructblip.data.readers.web_capfilt import file_of_url
from instructblip.data.records import Record
from instructblip.data.shards import PreparedSplit, open_split
from instructblip.data.templates import load_templates
from instructblip.data.text_processors import blip_caption
from instructblip.distributed import Ranks
from instructblip.errors import UserError
from instructblip.evaluation.journal import Journal
from instructblip.evaluation.outcomes import Failure, Prediction
from instructblip.images import center_crop, decode_image
from instructblip.weights.clip import find_clip, load_clip
from tests.kit.blip import tiny_caption, tiny_retrieval
from tests.kit.tiny import COLORS, tiny_model
from tests.kit.web import (
    caption_web,
    colour_filter,
    colour_pictures,
    files_of,
    tiny_captioner,
    web_pictures,
    write_clip,
    write_web,
)

SPLIT = "web_capfilt/train"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures in three shards."""
    return write_web(tmp_path_factory.mktemp("web"), web_pictures())


@pytest.fixture(scope="module")
def blip(web: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes of them."""
    return caption_web(web, tmp_path_factory.mktemp("blip") / "out")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a CLIP."""
    return write_clip(tmp_path_factory.mktemp("clip"))


def records_of(split: PreparedSplit) -> dict[str, list[Record]]:
    """Image key -> its records."""
    return {key: shard.read_records(row) for shard in split.shards for row, key in enumerate(shard.keys)}


def report_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


# --- one caption, kept where it matches ------------------------------------------------------------------------------


@pytest.mark.slow
def test_texts_that_match_are_kept_with_their_scores_and_the_others_counted(web: Path, blip: Path) -> None:
    model, source, kept = tiny_captioner(), open_split(web / "cc3m/train"), records_of(open_split(blip / SPLIT))
    counts: Counter[tuple[str, str]] = Counter()
    for shard in source.shards:
        for row, key in enumerate(shard.keys):
            frames, (record,) = shard.read(row)
            picture = decode_image(frames[0], key)
            noise = seeded_generator(0, "caption", f"cc3m/train/{key}", 0).random(6)
            (caption,) = model.generate(
                [picture],
                do_sample=True,
                top_p=0.9,
                max_new_tokens=6,
                min_new_tokens=2,
                noise=torch.from_numpy(noise)[None],
            )
            texts = {"web": record.answers[0], "synthetic": caption}
            scores = model.match([picture] * 2, [blip_caption(text) for text in texts.values()]).tolist()
            expected = []
            for (name, text), score in zip(texts.items(), scores, strict=True):
                counts[name, "kept" if score > 0.5 else "does not match: at most 0.5"] += 1
                expected += [(text, name, score)] if score > 0.5 else []
            found = kept.get(key, [])
            assert [(item.answers, item.tags["source"]) for item in found] == [((t,), n) for t, n, _ in expected]
            for item, (_, _, score) in zip(found, expected, strict=True):
                assert float(item.tags["score"]) == pytest.approx(score, abs=1e-4)
                assert item.tags.get("url") == record.tags.get("url")
    report = report_of(blip)
    assert {(name, what): n for name in ("web", "synthetic") for what, n in report[name].items()} == counts
    assert counts["synthetic", "kept"] and counts["web", "kept"]  # or the test would show nothing
    assert len(counts) == 4
    refused = counts["synthetic", "does not match: at most 0.5"]
    assert report["noise_percent"]["synthetic"] == pytest.approx(100 * refused / 11, abs=0.01)
    assert check_prepared(blip) == []


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"batch_size": 1}, {"batch_size": 64}, {"device": "cpu"}])
def test_the_batch_size_changes_no_byte(web: Path, blip: Path, tmp_path: Path, keys: Mapping[str, Any]) -> None:
    assert files_of(caption_web(web, tmp_path / "out", **keys)) == files_of(blip)


def test_other_shards_of_the_same_pictures_have_the_same_captions(blip: Path, tmp_path: Path) -> None:
    again = write_web(tmp_path, web_pictures(), images_per_shard=7)
    out = caption_web(again, tmp_path / "out")
    assert (out / "captions.json").read_bytes() == (blip / "captions.json").read_bytes()


def test_another_seed_draws_other_captions_and_keeps_what_the_web_says(web: Path, blip: Path, tmp_path: Path) -> None:
    other = caption_web(web, tmp_path / "out", seed=1)
    assert report_of(other)["web"] == report_of(blip)["web"]
    first, second = (
        {item["caption"] for item in json.loads((folder / "captions.json").read_text()) if item["source"] != "web"}
        for folder in (blip, other)
    )
    assert first.isdisjoint(second)


def test_a_filter_that_knows_the_answers_drops_the_wrong_half_exactly(tmp_path: Path) -> None:
    names = list(COLORS)
    wrong = set(names[::2])
    texts = {name: f"A {names[row - 1] if name in wrong else name} thing" for row, name in enumerate(names)}
    shards = write_web(tmp_path, colour_pictures(texts), images_per_shard=3)
    out = caption_web(shards, tmp_path / "out", judge=colour_filter())
    assert {record.answers[0] for found in records_of(open_split(out / SPLIT)).values() for record in found} == {
        f"A {name} thing" for name in names if name not in wrong
    }
    report = report_of(out)
    assert report["web"] == {"kept": 4, "does not match: at most 0.5": 4}
    assert report["pictures"] == {"kept": 4, "no text is kept": 4}
    assert report["noise_percent"] == {"web": 50.0, "synthetic": 100.0}


@pytest.mark.slow
def test_a_shard_of_which_nothing_is_kept_is_left_out(tmp_path: Path) -> None:
    names = list(COLORS)
    texts = {name: "nothing" if row in (2, 3) else f"a {name} thing" for row, name in enumerate(names)}
    shards = write_web(tmp_path, colour_pictures(texts), images_per_shard=2)
    split = open_split(caption_web(shards, tmp_path / "out", judge=colour_filter()) / SPLIT)
    assert [entry["name"] for entry in split.manifest["shards"]] == [f"shard-{number:06d}.tar" for number in (0, 2, 3)]
    assert len(split.records()) == 6
    with pytest.raises(UserError, match=r"no text of any picture was kept.*report\.json says why"):
        caption_web(shards, tmp_path / "none", judge=colour_filter(), threshold=0.95)


# --- the best two of ten ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blip2(web: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `variant=blip2` writes."""
    out = tmp_path_factory.mktemp("blip2") / "out"
    return caption_web(web, out, variant="blip2", filter=str(clip), batch_size=20)


@pytest.mark.slow
def test_the_best_two_by_transformers_clip_stand_in_one_record(web: Path, clip: Path, blip2: Path) -> None:
    theirs, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    processor = CLIPImageProcessor.from_pretrained(clip)
    source, kept = open_split(web / "cc3m/train"), records_of(open_split(blip2 / SPLIT))
    sources = set()
    for shard in source.shards:
        for row, key in enumerate(shard.keys):
            frames, (before,) = shard.read(row)
            picture = decode_image(frames[0], key)
            noise = [seeded_generator(0, "caption", f"cc3m/train/{key}", number).random(6) for number in range(10)]
            drawn = tiny_captioner().generate(
                [picture] * 10,
                do_sample=True,
                max_new_tokens=6,
                min_new_tokens=2,
                noise=torch.from_numpy(np.stack(noise)),
            )
            texts = list(dict.fromkeys([before.answers[0], *drawn]))
            rows = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
            with torch.no_grad():
                pixels = as_transformers_has_them(processor, picture)
                logits = theirs(**rows, pixel_values=pixels).logits_per_image[0] / theirs.logit_scale.exp()
            best = sorted(zip(logits.tolist(), texts, strict=True), reverse=True)[:2]
            (record,) = kept[key]
            assert record.captions == tuple(text for _, text in best)
            scores = [float(score) for score in record.tags["score"].split(", ")]
            assert scores == pytest.approx([score for score, _ in best], abs=1e-4)
            sources |= set(record.tags["source"].split(", "))
    assert sources == {"web", "synthetic"}
    report = report_of(blip2)
    assert "noise_percent" not in report
    both = Counter(report["web"]) + Counter(report["synthetic"])
    assert (both["kept"], both["not among the best 2"] + both["repeats another text"]) == (22, 99)
    listed = json.loads((blip2 / "captions.json").read_text())
    assert [item["caption"] for item in listed] == [text for found in kept.values() for text in found[0].captions]


def as_transformers_has_them(processor: Any, picture: Image.Image) -> Tensor:
    """A picture normalised by transformers, fitted here; which is what transformers makes of it up to rounding."""
    fitted = Image.fromarray(center_crop(picture, 28).permute(1, 2, 0).numpy())
    found: Tensor = processor(fitted, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    whole = processor(picture, return_tensors="pt")["pixel_values"]
    assert float((found - whole).abs().max()) < 0.1  # a few of 255 levels
    return found


@pytest.mark.slow
def test_a_mixture_draws_one_of_the_two_by_the_position(blip2: Path) -> None:
    first, again = mixture_of_captions(blip2), mixture_of_captions(blip2)
    drawn: dict[str, set[str]] = {}
    for position in range(88):
        sample, _ = first[position]
        assert sample.target == again[position][0].target
        assert sample.target in sample.record.captions
        drawn.setdefault(sample.record.id, set()).add(sample.target)
    assert len(drawn) == 11
    assert sum(len(texts) == 2 for texts in drawn.values()) >= 9  # of 8 draws each


def mixture_of_captions(out: Path) -> MixtureDataset:
    templates = load_templates("captioning")
    captions = TrainingSet("web_capfilt", open_split(out / SPLIT), (), templates, True)
    mixture = Mixture([MixtureEntry("web_capfilt", len(captions), shards=captions.shard_records)], seed=5)
    return MixtureDataset(mixture, [captions], decoded("blip_image_train", 16))


def test_long_and_odd_texts_have_cosines_of_their_own_beside_any_others(clip: Path) -> None:
    judge = ClipJudge(load_clip(find_clip(str(clip)), "cpu"))
    texts = ["a", "is there a circle in the image? " * 9, "Ein grünes Haus, 東京"]
    encoded = judge.encode(torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8))
    together = judge.score(encoded, texts)
    alone = torch.cat([judge.score(encoded[row : row + 1], [text]) for row, text in enumerate(texts)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert len(set(together.tolist())) == 3


# --- what reads the results ------------------------------------------------------------------------------------------


def test_the_list_is_read_by_the_reader_of_web_capfilt(web: Path, blip: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "images").mkdir(parents=True)
    shutil.copy(blip / "captions.json", raw)
    source, wanted = open_split(web / "cc3m/train"), {}
    for shard in source.shards:
        for row in range(len(shard)):
            frames, (record,) = shard.read(row)
            name = record.id.removeprefix("cc3m/")
            place = file_of_url(record.tags["url"]) if "url" in record.tags else f"{name}.jpg"
            (raw / "images" / place).parent.mkdir(exist_ok=True)
            (raw / "images" / place).write_bytes(frames[0])
    for found in records_of(open_split(blip / SPLIT)).values():
        for record in found:
            wanted.setdefault(record.answers[0], 0)
    prepare_dataset(load_card("web_capfilt"), raw, tmp_path / "shards", progress=False)
    split = open_split(tmp_path / "shards/web_capfilt/train")
    assert split.manifest["lost"] == []
    read = [record.answers[0] for found in records_of(split).values() for record in found]
    assert sorted(read) == sorted(wanted)
    assert len(split.shards[0]) == report_of(blip)["pictures"]["kept"]
    # And captioned once more, its pictures are called as in the list.
    again = caption_web(tmp_path / "shards", tmp_path / "again", threshold=0.0)
    assert names_in(again) == names_in(blip)


def names_in(out: Path) -> set[tuple[str, str]]:
    """What the pictures of the list are called."""
    return {
        (key, item[key])
        for item in json.loads((out / "captions.json").read_text())
        for key in ("url", "image")
        if key in item
    }


@pytest.mark.slow
def test_the_page_of_samples_shows_them(blip: Path, blip2: Path, tmp_path: Path) -> None:
    for number, out in enumerate((blip, blip2)):
        shown = shutil.copytree(out, tmp_path / str(number))
        page = unescape(write_samples(shown, samples=3, seed=0, image_size=32).read_text())
        captions = [item["caption"] for item in json.loads((out / "captions.json").read_text())]
        assert page.count("data:image/jpeg") == 3
        assert sum(text in page for text in captions) >= 3


# --- what is not caption or picture ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_pictures_that_cannot_be_read_stop_it_or_are_counted_and_named(tmp_path: Path) -> None:
    shards, out = write_web(tmp_path, web_pictures(9)), tmp_path / "out"
    shard = open_split(shards / "cc3m/train").shards[1]
    whole = shard.path.read_bytes()
    damage(shard.path, int(shard.arrays["frame_offset"][2]), b"no picture")
    with pytest.raises(UserError, match=r"000000006.* cannot be decoded .*; or give tolerance=1, to leave so many"):
        caption_web(shards, out)
    copy = shutil.copytree(out, tmp_path / "copy")
    report = report_of(caption_web(shards, copy, tolerance=1))
    assert report["pictures"]["cannot be read"] == 1
    (loss,) = report["lost"]
    assert "000000006" in loss["examples"][0]
    assert sum(report["web"].values()) == sum(report["synthetic"].values()) == 8
    shard.path.write_bytes(whole)  # mended, it is looked at again
    assert sum(report_of(caption_web(shards, out))["web"].values()) == 9
    assert files_of(out) == files_of(caption_web(shards, tmp_path / "never damaged"))


def test_what_was_damaged_counts_when_it_is_looked_at_again(tmp_path: Path) -> None:
    shards, out = write_web(tmp_path, web_pictures(4)), tmp_path / "out"
    shard = open_split(shards / "cc3m/train").shards[0]
    offsets = [int(offset) for offset in shard.arrays["frame_offset"]]
    damage(shard.path, offsets[0], b"no picture")
    partly = shard.path.read_bytes()
    damage(shard.path, offsets[3], b"no picture")
    with pytest.raises(UserError, match="or give tolerance=2"):
        caption_web(shards, out, batch_size=1, tolerance=1)
    shard.path.write_bytes(partly)  # the last one is mended
    assert report_of(caption_web(shards, out, batch_size=1, tolerance=1))["pictures"]["cannot be read"] == 1


def damage(tar: Path, offset: int, content: bytes) -> None:
    with open(tar, "r+b") as file:
        file.seek(offset)
        file.write(content)


def test_texts_that_say_nothing_or_repeat_are_not_judged() -> None:
    texts, left_out = texts_to_judge(["a dog", "!!", "a cat", ""], ["A dog", "a cat", " "], "blip_caption")
    assert [tuple(item) for item in texts] == [("A dog", "web"), ("a cat", "web"), ("a dog", "synthetic")]
    assert sorted(left_out) == [
        ("synthetic", "empty"),
        ("synthetic", "empty"),
        ("synthetic", "repeats another text"),
        ("web", "empty"),
    ]


def test_of_equal_scores_the_first_is_kept() -> None:
    settings = settle(config(variant="blip2", kept=1), "blip2_stage1")
    texts = [Scored("a", "web", 0.2), Scored("b", "synthetic", 0.3), Scored("c", "synthetic", 0.3)]
    assert choose_texts(texts, settings) == [texts[1]]
    exactly = [Scored("a", "web", 0.5), Scored("b", "web", 0.51)]
    assert choose_texts(exactly, settle(config(), "blip2_stage1")) == exactly[1:]


def test_a_captioner_draws_as_it_was_released_where_nothing_else_is_said() -> None:
    """BLIP's limits of 5 and 20 tokens count "[DEC] a picture of"."""
    drawn = {
        kind: (found.max_new_tokens, found.min_new_tokens, found.repetition_penalty, found.top_p)
        for kind in ("blip_caption", "blip2_stage1", "instructblip")
        for found in [settle(config(), kind)]
    }
    assert drawn == {
        "blip_caption": (16, 1, 1.1, 0.9),
        "blip2_stage1": (29, 9, 1.0, 0.9),
        "instructblip": (30, 1, 1.0, 0.9),
    }
    assert settle(config(max_new_tokens=5, min_new_tokens=0), "blip_caption").max_new_tokens == 5
    with pytest.raises(UserError, match="writes 9 tokens at least and 5 at most"):
        settle(config(max_new_tokens=5), "blip2_stage1")


def test_captions_are_drawn_as_the_settings_say() -> None:
    asked: list[dict[str, Any]] = []

    def generate(tokens: Tensor, prompts: list[str], **options: Any) -> list[str]:
        asked.append(options)
        return prompts

    captioner = SimpleNamespace(
        vision=SimpleNamespace(image_size=4), image_tokens=torch.Tensor.float, generate=generate
    )
    settings = settle(
        config(top_p=0.7, max_new_tokens=6, min_new_tokens=2, repetition_penalty=1.3, prompt="a", captions=3),
        "instructblip",
    )
    seen = Seen("x", [], {("resize_square", 4): torch.zeros(3, 4, 4)})
    assert Captioning(SimpleNamespace(captioner=captioner), settings, 8)._draw([seen]) == [["a"] * 3]  # type: ignore[arg-type]
    noise = asked[0].pop("noise")
    assert (noise.shape, len(noise.unique())) == ((3, 6), 18)
    said = {"top_p": 0.7, "max_new_tokens": 6, "min_new_tokens": 2, "repetition_penalty": 1.3}
    assert asked == [{"do_sample": True, "num_beams": 1, **said}]


def config(**keys: Any) -> CapFiltConfig:
    return CapFiltConfig(shards="s", captioner="A", filter="B", out="o", **keys)


# --- the same command again, and mistakes ----------------------------------------------------------------------------


def test_the_same_command_again_draws_nothing_and_other_settings_are_refused(
    web: Path, blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(blip, tmp_path / "out")
    (out / ".work").mkdir()  # as a run leaves it that is killed at the very end
    monkeypatch.setattr(Captioning, "answer", None)
    caption_web(web, out, console=Console())
    printed = capsys.readouterr().out
    assert "11 pictures: " in printed
    assert "25% by nucleus sampling, 19% by beam search" in printed
    for path in (f"{SPLIT}/manifest.json", "captions.json", "report.json"):
        assert f"wrote {out / path}" in printed
    assert files_of(out) == files_of(blip)
    with pytest.raises(UserError, match=r"out holds captions of another seed; give another out=, or delete"):
        caption_web(web, out, seed=1)
    with pytest.raises(UserError, match=r"holds captions of another captioner; give"):
        caption_web(web, out, captioner=colour_filter(), judge=tiny_captioner())
    assert files_of(out) == files_of(blip)


def test_mistakes_are_one_line(web: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    for line, keys in {
        r"shards=.*none is no folder": {"shards": tmp_path / "none"},
        r"has no prepared split val; it has train: set split=": {"split": "val"},
        r"lie within each other; give another out=": {"out": web / "new"},
        r"filter=none/of/these is no folder and no hub id": {"variant": "blip2", "filter": "none/of/these"},
        r"wanted is a CLIP": {"variant": "blip2", "filter": str(other_model(tmp_path))},
        r"captioner=A captions without a prompt": {"prompt": "a photo of"},
    }.items():
        given = {"shards": web, "out": out, **keys}
        with pytest.raises(UserError, match=line):
            caption_web(given.pop("shards"), given.pop("out"), **given)
    out.mkdir()
    (out / "report.json").write_text("[]")
    with pytest.raises(UserError, match=r"report\.json is no report of capfilt, and would be overwritten"):
        caption_web(web, out)
    (out / "report.json").unlink()
    (out / SPLIT).mkdir(parents=True)
    with pytest.raises(UserError, match="was not made by capfilt, and would be overwritten"):
        caption_web(web, out)
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(UserError, match="prepare web pictures first"):
        caption_web(bare, tmp_path / "other")


def test_two_splits_whose_pictures_would_have_the_same_names_are_refused(web: Path, tmp_path: Path) -> None:
    for place in ("a", "b"):
        shutil.copytree(web / "cc3m", tmp_path / "shards" / place / "cc3m")
    with pytest.raises(
        UserError, match=r"a/cc3m/train and .*b/cc3m/train are both cc3m/train; give shards= that hold one"
    ):
        caption_web(tmp_path / "shards", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_finished_folder_of_which_something_is_gone_is_said_to_lack_it(web: Path, blip: Path, tmp_path: Path) -> None:
    for gone in (f"{SPLIT}/shard-000000.tar", f"{SPLIT}/manifest.json", "captions.json"):
        out = shutil.copytree(blip, tmp_path / gone.replace("/", "_"))
        (out / gone).unlink()
        with pytest.raises(UserError, match=rf"is finished, and {re.escape(str(out / gone))} is gone; put it back, or"):
            caption_web(web, out)


def test_nothing_is_made_before_the_first_rank_has_said_what(tmp_path: Path) -> None:
    """A shard that was there already would be another's."""
    settings = settle(CapFiltConfig(shards="", captioner="", filter="", out=""), "blip_caption")
    job = Job(tmp_path, settings, {"seed": 0}, {}, tolerance=0)
    other = threading.Thread(target=job.claim, args=(Ranks(1, 2),))
    other.start()
    other.join(0.2)
    assert other.is_alive() and not list(tmp_path.iterdir())
    job.claim(Ranks(0, 2))
    other.join(10)
    assert not other.is_alive()
    with pytest.raises(UserError, match="holds captions of another seed"):
        dataclasses.replace(job, plan={"seed": 1}).claim(Ranks(1, 2))


def test_who_waits_for_no_other_looks_again_at_what_was_damaged(tmp_path: Path) -> None:
    """Another rank would still write to the journal of a shard that is put together, and removed."""
    chunks = [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]]
    keys, part = [key for chunk in chunks for key in chunk], cast(Part, SimpleNamespace(number=1))
    answered = [Prediction(key, key, "a text") for key in "abcefg"]
    Journal(tmp_path, keys).append(answered, [Failure("d", "d", "damaged")])
    left = [_left_to(ranks, part, chunks, Journal(tmp_path, keys, ranks)) for ranks in (Ranks(0, 2), Ranks(1, 2))]
    assert left == [[3], [1]]
    assert _left_to(Ranks(), part, chunks, Journal(tmp_path, keys)) == [1, 3]


def other_model(folder: Path) -> Path:
    (folder / "bert").mkdir()
    (folder / "bert/config.json").write_text('{"model_type": "bert"}')
    return folder / "bert"


@pytest.mark.slow
def test_models_that_cannot_do_their_part_are_refused_before_they_are_loaded(
    untrained_run: Path, untrained_stage1: Path
) -> None:
    writes, matches = str(untrained_run), str(untrained_stage1)
    for line, keys in {
        r"filter=.* is of model=instructblip, which does not match; give one of .*blip2_stage1": (
            matches,
            writes,
            None,
        ),
        r"captioner=.* reads a prompt; give one": (writes, matches, None),
        r"captioner=.* captions without a prompt; leave": (matches, matches, "A photo of"),
    }.items():
        with pytest.raises(UserError, match=line):
            find_models(asked(*keys))
    assert find_models(asked(writes, matches, "A photo of")).captioner.kind == "instructblip"


def asked(captioner: str, judge: str, prompt: str | None) -> CapFiltConfig:
    return CapFiltConfig(shards="s", out="o", captioner=captioner, filter=judge, prompt=prompt)


def test_a_kind_of_model_that_answers_questions_is_no_captioner(web: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"captioner=A is of model=blip_vqa, which does not caption; give one of "):
        caption_web(web, tmp_path / "out", kind="blip_vqa")


def test_scores_that_are_not_finite_stop_it(web: Path, tmp_path: Path) -> None:
    broken: Any = colour_filter()
    broken.match = lambda tokens, texts: torch.full((len(texts),), float("nan"))
    with pytest.raises(UserError, match="the filter's scores are not finite numbers"):
        caption_web(web, tmp_path / "out", judge=broken)


@pytest.mark.slow
def test_instructblip_captions_by_its_prompt(web: Path, tmp_path: Path) -> None:
    model = tiny_model()
    out = caption_web(
        web,
        tmp_path / "out",
        captioner=model,
        judge=tiny_captioner(),
        kind="instructblip",
        prompt="A short caption:",
        threshold=0.0,
    )
    shard, kept = open_split(web / "cc3m/train").shards[0], records_of(open_split(out / SPLIT))
    for row, key in enumerate(shard.keys):
        frames, _ = shard.read(row)
        noise = seeded_generator(0, "caption", f"cc3m/train/{key}", 0).random(6)
        (caption,) = model.generate(
            [decode_image(frames[0], key)],
            ["A short caption:"],
            do_sample=True,
            top_p=0.9,
            max_new_tokens=6,
            min_new_tokens=2,
            noise=torch.from_numpy(noise)[None],
        )
        assert " ".join(caption.split()) in [record.answers[0] for record in kept[key]]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 64])
def test_blip_captions_and_filters_as_released(web: Path, tmp_path: Path, batch_size: int) -> None:
    captioner, judge = tiny_caption(), tiny_retrieval()
    keys = {"max_new_tokens": None, "min_new_tokens": None, "batch_size": batch_size, "threshold": 0.0}
    out = caption_web(web, tmp_path / "out", captioner=captioner, judge=judge, kind="blip_caption", **keys)
    kept = records_of(open_split(out / SPLIT))
    for shard in open_split(web / "cc3m/train").shards:
        for row, key in enumerate(shard.keys):
            noise = seeded_generator(0, "caption", f"cc3m/train/{key}", 0).random(16)
            picture = decode_image(shard.read(row)[0][0], key)
            (caption,) = captioner.generate([picture], do_sample=True, top_p=0.9, noise=torch.from_numpy(noise)[None])
            record = next(item for item in kept[key] if item.tags["source"] == "synthetic")
            assert record.answers == (" ".join(caption.split()),)
            probability = float(judge.match([picture], [blip_caption(record.answers[0])]))
            assert float(record.tags["score"]) == pytest.approx(probability, abs=1e-4)
