"""Evaluation protocols: which samples are chosen, what is hashed, what is refused."""

import dataclasses
import io
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from instructblip.data.cards import Card, load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.data.records import Record
from instructblip.data.shards import MANIFEST_FORMAT, ShardWriter, shard_path
from instructblip.errors import UserError
from instructblip.evaluation.protocol import as_json, blind_task, majority_answers, make_task, released_lengths
from instructblip.evaluation.runner import read_pixels
from instructblip.evaluation.suite import takes_cached_images
from instructblip.files import sha256_file, write_json
from tests.kit.synthetic_tasks import PICTURE, synthetic_task
from tests.kit.tiny import write_easy_vqa


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """easy-VQA with 12 test images in shards of 5, so that the split has several."""
    folder = tmp_path_factory.mktemp("prepared")
    write_easy_vqa(folder / "raw", images=24)
    prepare_dataset(load_card("easy_vqa"), folder / "raw", folder / "shards", images_per_shard=5, progress=False)
    return folder / "shards"


@pytest.fixture(scope="module")
def yes_no() -> Card:
    return load_card("easy_vqa_yes_no")


def write_records(folder: Path, records: list[Record], picture: bytes = PICTURE) -> None:
    """A prepared split with one picture for each record."""
    with ShardWriter.open(shard_path(folder, 0)) as writer:
        for number, record in enumerate(records):
            writer.add(f"image_{number}", {"png": picture}, str(number), [record])
    shard = shard_path(folder, 0)
    manifest = {
        "format": MANIFEST_FORMAT,
        "dataset": folder.parent.name,
        "split": folder.name,
        "records_by_kind": dict(Counter(record.kind for record in records)),
        "shards": [{"name": shard.name, "sha256": sha256_file(shard)}],
    }
    write_json(folder / "manifest.json", manifest)


def ids(card: Card, shards: Path, samples: int | None) -> list[str]:
    return [sample.id for sample in make_task(card, shards, samples=samples).samples]


def test_a_larger_subset_contains_the_smaller_and_keeps_the_stored_order(yes_no: Card, shards: Path) -> None:
    everything = ids(yes_no, shards, None)
    assert len(everything) == 48
    chosen: set[str] = set()
    for samples in (1, 7, 20, 47, 48, 1000):
        larger = ids(yes_no, shards, samples)
        assert len(larger) == min(samples, 48)
        assert chosen <= set(larger)
        assert larger == [sample_id for sample_id in everything if sample_id in set(larger)]
        chosen = set(larger)
    assert ids(yes_no, shards, 7) != everything[:7]


def test_the_subset_does_not_depend_on_the_cutting_into_shards(yes_no: Card, shards: Path, tmp_path: Path) -> None:
    write_easy_vqa(tmp_path / "raw", images=24)
    prepare_dataset(load_card("easy_vqa"), tmp_path / "raw", tmp_path / "shards", images_per_shard=100, progress=False)
    assert ids(yes_no, tmp_path / "shards", 9) == ids(yes_no, shards, 9)


def test_a_dataset_to_train_on_is_not_evaluated(yes_no: Card, shards: Path) -> None:
    with pytest.raises(UserError, match="easy_vqa_yes_no is a dataset to train on: its card has no evaluation"):
        make_task(dataclasses.replace(yes_no, evaluation=None), shards)


def test_samples_are_what_the_card_asks(yes_no: Card, shards: Path) -> None:
    task = make_task(yes_no, shards, samples=5)
    for sample in task.samples:
        assert sample.id == f"easy_vqa_yes_no/{sample.record.id}"
        assert sample.record.kind in ("present", "absent")
        assert sample.prompt == sample.record.question
        assert sample.record in sample.shard.read(sample.row)[1]
    shown = make_task(yes_no, shards).samples
    assert len({sample.image_key for sample in shown}) == 12


def test_everything_that_decides_a_score_is_in_the_hash(yes_no: Card, shards: Path) -> None:
    task = make_task(yes_no, shards, samples=5)
    hashes = {
        task.protocol.sha256(),
        blind_task(task).protocol.sha256(),
        make_task(yes_no, shards, samples=6).protocol.sha256(),
        make_task(yes_no, shards, samples=5, mode="generate").protocol.sha256(),
        make_task(yes_no, shards, samples=5, split="validation").protocol.sha256(),
        make_task(load_card("easy_vqa_shape"), shards, samples=5).protocol.sha256(),
        *(
            make_task(dataclasses.replace(yes_no, evaluation=other), shards, samples=5).protocol.sha256()
            for other in (
                dataclasses.replace(yes_no.evaluation, prompt="Q: {question}"),
                dataclasses.replace(yes_no.evaluation, normalize="mean"),
                dataclasses.replace(yes_no.evaluation, include_eos=not yes_no.evaluation.include_eos),
                dataclasses.replace(yes_no.evaluation, candidates=yes_no.evaluation.candidates[:-1]),
            )
        ),
    }
    assert len(hashes) == 10
    assert make_task(yes_no, shards, samples=5).protocol.sha256() == task.protocol.sha256()


def test_withheld_differs_in_nothing_but_the_images(yes_no: Card, shards: Path) -> None:
    task = make_task(yes_no, shards, samples=5)
    blind = blind_task(task)
    assert blind.samples == task.samples
    assert dataclasses.replace(blind.protocol, images="shown") == task.protocol
    assert blind.protocol == make_task(yes_no, shards, samples=5, withhold_images=True).protocol
    assert blind.protocol.describe()["images"] == "withheld, resize_square"


def test_verbalizers_become_candidates_with_classes(shards: Path) -> None:
    ranked = make_task(load_card("easy_vqa_statements"), shards).protocol
    assert ranked.candidates == ("yes", "true", "no", "false")
    assert ranked.classes == ("true", "true", "false", "false")
    plain = make_task(load_card("easy_vqa_shape"), shards).protocol
    assert plain.candidates == plain.classes
    written = make_task(load_card("easy_vqa_statements"), shards, mode="generate").protocol
    assert (written.candidates, written.classes) == ((), ())


def test_json_holds_the_whole_protocol(yes_no: Card, shards: Path) -> None:
    protocol = make_task(yes_no, shards, samples=5).protocol
    fields = as_json(protocol)
    assert fields["sha256"] == protocol.sha256()
    assert fields.keys() == {field.name for field in dataclasses.fields(protocol)} | {"sha256"}


def test_the_majority_is_counted_on_training_images_question_by_question(yes_no: Card, shards: Path) -> None:
    majority = majority_answers(yes_no, shards)
    assert majority["is there a circle?"] == "yes"  # the tiny data asks this of circles only
    assert majority[""] == "no"  # as many no as yes: the first in the alphabet
    assert "is there a star?" not in majority
    train = {sample.record.question for sample in make_task(yes_no, shards, split="train").samples}
    assert majority.keys() == train | {""}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "not a prepared split"),
    ],
)
def test_what_cannot_be_run_is_refused(yes_no: Card, shards: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(yes_no, shards, **options)  # type: ignore[arg-type]


def test_a_metric_that_there_is_not_is_told_with_the_nearest_name(yes_no: Card, shards: Path) -> None:
    wrong = dataclasses.replace(yes_no, evaluation=dataclasses.replace(yes_no.evaluation, metric="vqa_acuracy"))
    with pytest.raises(UserError, match=r"evaluation.metric is 'vqa_acuracy'; did you mean 'vqa_accuracy'\?"):
        make_task(wrong, shards)


def test_records_of_too_few_annotators_are_refused_before_a_model_is_asked(yes_no: Card, shards: Path) -> None:
    ours = dataclasses.replace(yes_no, evaluation=dataclasses.replace(yes_no.evaluation, metric="vqa_accuracy"))
    with pytest.raises(
        UserError, match=r"^easy_vqa_yes_no: record .* too few people for vqa_accuracy \(1 of at least 4\)"
    ):
        make_task(ours, shards)


def test_the_lavis_preset_is_what_the_released_code_computes(tmp_path: Path) -> None:
    card = load_card("okvqa")
    paper = synthetic_task(card, tmp_path, 2).protocol
    decoder, t5 = (make_task(card, tmp_path, preset="lavis", llm_kind=kind) for kind in ("decoder", "encoder_decoder"))
    assert (paper.max_new_tokens, paper.min_new_tokens, paper.beam_lengths) == (10, 1, "new_tokens")
    assert (paper.text_processor, paper.upright, paper.transparency) == ("none", True, "white")
    assert (decoder.protocol.max_new_tokens, decoder.protocol.min_new_tokens) == (9, 0)
    assert (t5.protocol.max_new_tokens, t5.protocol.min_new_tokens) == (10, 0)
    for task in (decoder, t5):
        assert (task.protocol.text_processor, task.protocol.upright) == ("blip_caption", False)
        assert task.protocol.transparency == "dropped"
        assert (task.protocol.beam_lengths, task.protocol.transform) == ("transformers_4_33", "center_crop")
    told = decoder.protocol.describe()
    assert told["text processor"] == "blip_caption" and "not turned upright, transparency dropped" in told["images"]
    assert "beam lengths of transformers_4_33" in told["decoding"]
    captions = synthetic_task(load_card("coco_caption"), tmp_path, 2, preset="lavis").protocol
    assert (captions.max_new_tokens, captions.min_new_tokens) == (79, 9)


def test_the_lavis_preset_shows_pictures_as_they_are_stored(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 40), "white")
    picture.paste((0, 0, 0), (0, 0, 40, 20))  # the upper half is black
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 3  # upside down
    picture.save(buffer, "PNG", exif=exif)
    record = Record("1", "question", "what?", answers=("cat",), answer_weights=(10.0,))
    write_records(tmp_path / "vqav2/val", [record], buffer.getvalue())
    seen = {}
    for preset in ("paper", "lavis"):
        task = make_task(load_card("vqav2"), tmp_path, preset=preset)
        assert takes_cached_images(task) == (preset == "paper")  # a cache holds upright pictures
        reader = read_pixels(8, task.protocol.transform, upright=task.protocol.upright)
        seen[preset] = int(reader(task.samples[0].shard, 0)[0, 0, 0, 0])
    assert seen == {"paper": 255, "lavis": 0}


def test_the_lavis_preset_drops_transparency_as_pillow_does(tmp_path: Path) -> None:
    picture, buffer = Image.new("RGBA", (40, 40), (200, 0, 0, 0)), io.BytesIO()
    picture.save(buffer, "PNG")
    record = Record("1", "question", "what?", answers=("cat",), answer_weights=(10.0,))
    write_records(tmp_path / "vqav2/val", [record], buffer.getvalue())
    seen = {}
    for preset in ("paper", "lavis"):
        task = make_task(load_card("vqav2"), tmp_path, preset=preset)
        reader = read_pixels(8, task.protocol.transform, transparency=task.protocol.transparency)
        seen[preset] = tuple(reader(task.samples[0].shard, 0)[0, :, 0, 0].tolist())
    with Image.open(io.BytesIO(buffer.getvalue())) as opened:
        released = opened.convert("RGB").getpixel((0, 0))  # as every dataset class of LAVIS opens a picture
    assert seen == {"paper": (255, 255, 255), "lavis": released}


def test_the_lavis_preset_cleans_the_question_and_nothing_else_of_the_prompt(tmp_path: Path) -> None:
    record = Record("1", "multiple_choice", 'Is "it" (A)?', choices=("Yes.", "No!"), label=0)
    write_records(tmp_path / "scienceqa_img/test", [record])
    card = load_card("scienceqa_img")
    (paper,) = make_task(card, tmp_path).samples
    (lavis,) = make_task(card, tmp_path, preset="lavis").samples
    assert paper.prompt == 'Question: Is "it" (A)? Options: (a) Yes. (b) No!. Answer:'
    assert lavis.prompt == "context: . Question: is it a ? Options: (a) Yes. (b) No!. Answer:"
    assert lavis.record == record


def test_a_dataset_without_candidates_is_not_ranked(yes_no: Card, shards: Path) -> None:
    open_ended = dataclasses.replace(
        yes_no, evaluation=dataclasses.replace(yes_no.evaluation, candidates=(), mode="generate")
    )
    assert make_task(open_ended, shards).protocol.mode == "generate"
    with pytest.raises(UserError, match="mode=generate"):
        make_task(open_ended, shards, mode="rank")


@pytest.mark.parametrize(("name", "metric"), [("hateful_memes", "auroc"), ("visdial", "visdial")])
def test_what_needs_the_scores_of_candidates_is_not_generated(name: str, metric: str, tmp_path: Path) -> None:
    assert synthetic_task(load_card(name), tmp_path, 8, mode="rank").protocol.metric == metric
    with pytest.raises(UserError, match=f"^{name}: {metric} needs the scores of candidates, which mode=generate"):
        make_task(load_card(name), tmp_path, mode="generate")


def test_auroc_needs_both_labels_among_the_chosen_samples(tmp_path: Path) -> None:
    card = load_card("hateful_memes")
    labels = {sample.record.label for sample in synthetic_task(card, tmp_path, 12).samples}
    assert labels == {0, 1}
    with pytest.raises(
        UserError,
        match=r"^hateful_memes: AUROC needs samples of both labels, and all chosen ones \(1\) have label [01];",
    ):
        make_task(card, tmp_path, samples=1)
    assert len(make_task(card, tmp_path, samples=11).samples) == 11


def test_how_candidates_are_ranked_can_be_set_and_is_in_the_hash(yes_no: Card, shards: Path) -> None:
    own = make_task(yes_no, shards).protocol
    assert (own.normalize, own.include_eos) == ("sum", False)
    assert make_task(yes_no, shards, normalize=None, include_eos=None).protocol == own
    hashes = set()
    for normalize in ("sum", "mean"):
        for include_eos in (False, True):
            protocol = make_task(yes_no, shards, normalize=normalize, include_eos=include_eos).protocol
            assert (protocol.normalize, protocol.include_eos) == (normalize, include_eos)
            hashes.add(protocol.sha256())
    assert len(hashes) == 4
    released = make_task(yes_no, shards, preset="lavis", normalize="mean").protocol
    assert released.normalize == "mean"  # what is asked for goes before any preset


def test_the_released_lengths_leave_a_token_to_write() -> None:
    """transformers 4.33 looks at the length behind each token: one is written, whatever the limit."""
    assert released_lengths(10, 1, "decoder") == (9, 0)
    assert released_lengths(1, 1, "decoder") == (1, 0)
    assert released_lengths(1, 0, "encoder_decoder") == (1, 0)
