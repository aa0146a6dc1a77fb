"""Questions made of the classes of photos: balanced, drawn by the photo alone, novel classes kept out of what is trained."""

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from rich.console import Console

from instructblip.config.schema import PrepareConfig, SourcesConfig, TrainConfig
from instructblip.data.cards import CARDS_FOLDER, load_card
from instructblip.data.prepare import command
from instructblip.data.prepare.audit import audit_prepared
from instructblip.data.prepare.command import ensure_prepared, prepare
from instructblip.data.readers import READERS, RawSplit
from instructblip.data.readers.class_questions import ClassQuestions
from instructblip.data.records import Record
from instructblip.data.synthetic import synthetic_card, write_synthetic
from instructblip.data.templates import load_templates
from instructblip.data.typed import WrongValueError
from instructblip.errors import UserError
from tests.kit.runs import World, compose, read_lines, scores, train_here
from tests.kit.servers import file_server

CARD = load_card("clothing_small")
QUESTIONS = ClassQuestions.told(CARD.reader_options)
assert QUESTIONS is not None
CLASSES = tuple(QUESTIONS.named)
PHOTOS = [(f"{name}/{number}.jpg", name) for name in CLASSES for number in range(40)]
VIEWS = sorted(path.stem for path in CARDS_FOLDER.glob("clothing_*.yaml"))
TRAINED, HELD_OUT = [[name for name in VIEWS if load_card(name).role == role] for role in ("held-in", "held-out")]


def _records(photo: str, label: str) -> list[Record]:
    """All of a photo, as the reader makes them."""
    assert QUESTIONS is not None
    first = Record(photo, QUESTIONS.kind("classification", label, [label]), answers=(label,))
    return [first, *QUESTIONS.records(photo, label)]


ALL = [(label, record) for photo, label in PHOTOS for record in _records(photo, label)]


def _of(card: str) -> list[tuple[str, Record]]:
    kinds = load_card(card).kinds
    return [(label, record) for label, record in ALL if record.kind in kinds]


def _texts(record: Record) -> str:
    return " ".join([record.question or "", *record.answers, *record.choices])


def test_a_photo_is_asked_for_its_class_for_one_other_and_for_all_others() -> None:
    for photo, label in PHOTOS[::7]:
        asked = {record.question: record.answers[0] for record in _records(photo, label) if "-is-" in record.id}
        assert QUESTIONS is not None
        said = {name: asked.pop(f"is this {thing}?") for name, thing in QUESTIONS.named.items()}
        assert said == {name: "yes" if name == label else "no" for name in CLASSES}
        assert sorted(asked.values()) == ["false", "true"]  # the two statements


def test_statements_say_what_the_balanced_questions_ask() -> None:
    asked = {(r.id, r.answers[0] == "yes", (r.question or "")[len("is this ") : -1]) for _, r in _of("clothing_yes_no")}
    said = {
        (r.id.removesuffix("-statement"), r.label == 1, (r.question or "")[len("This is ") : -1])
        for _, r in _of("clothing_statements")
    }
    assert asked == said
    assert Counter(answer for _, answer, _ in said) == {True: len(PHOTOS), False: len(PHOTOS)}


def test_a_choice_is_the_class_among_four_in_any_place() -> None:
    found = _of("clothing_choices")
    for label, record in found:
        assert len(set(record.choices)) == 4
        assert record.label is not None and record.choices[record.label] == label
    assert set(Counter(record.label for _, record in found)) == {0, 1, 2, 3}
    assert min(Counter(record.label for _, record in found).values()) > len(PHOTOS) / 8


def test_draws_are_even_and_follow_from_the_photo_without_its_format() -> None:
    wrong = Counter(record.question for _, record in ALL if record.kind.startswith("absent"))
    assert len(wrong) == len(CLASSES)
    assert min(wrong.values()) > len(PHOTOS) / len(CLASSES) / 2
    jpeg, png = _records("hat/a.b.jpg", "hat"), _records("hat/a.b.png", "hat")
    assert [(r.kind, r.question, r.choices) for r in jpeg] == [(r.kind, r.question, r.choices) for r in png]


@pytest.mark.parametrize("card", [name for name in TRAINED if "_known_" in name])
def test_novel_classes_are_neither_shown_nor_named_where_the_others_are_trained(card: str) -> None:
    found = _of(card)
    assert {label for label, _ in found} == set(CLASSES) - {"pants", "shoes"}
    assert not any(word in _texts(record) for _, record in found for word in ("pants", "shoes"))


def test_every_question_about_novel_classes_names_one() -> None:
    for card in ("clothing_novel_what", "clothing_novel_yes_no", "clothing_novel_statements"):
        found = _of(card)
        assert all(any(word in _texts(record) for word in ("pants", "shoes")) for _, record in found)
        assert load_card(card).role == "held-out"


@pytest.mark.slow
def test_no_kind_is_both_trained_on_and_held_out() -> None:
    for experiment in ("photos", "photos_known"):
        config = compose("train", TrainConfig, [f"experiment={experiment}"])
        trained = {kind for entry in config.mixture.datasets for kind in load_card(entry.name).kinds}
        kept = {kind for name in config.suite.held_out for kind in load_card(name).kinds}
        assert not trained & kept
        assert not any(kind.startswith("statement") for kind in trained)
    assert len(TRAINED) + len(HELD_OUT) == len(VIEWS) == 15


def test_classes_are_asked_for_in_the_forms_of_the_questions_about_them() -> None:
    assert load_templates("what_is_this").templates == tuple(
        form.replace("{question}", "what is this?") for form in load_templates("half_bare").templates
    )


def test_the_card_counts_what_the_reader_makes() -> None:
    for counts in CARD.splits.values():
        kinds, photos = counts.records_by_kind, counts.images or 0
        assert counts.records == sum(kinds.values()) == photos * (len(CLASSES) + 4)
        totals: Counter[str] = Counter()
        for kind, number in kinds.items():
            totals[kind.removesuffix("_of_novel").removesuffix("_on_novel")] += number
        assert totals == {
            "classification": photos,
            "present": photos,
            "absent": photos,
            "more_absent": photos * (len(CLASSES) - 2),
            "statement": 2 * photos,
            "choice": photos,
        }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"named": ["hat"]}, "reader_options.named must say of each class"),
        ({"named": {"hat": ""}}, "reader_options.named must say of each class"),
        ({"named": {"hat": "a hat", "cap": "a cap"}, "novel": "hat"}, "reader_options.novel must be a list of classes"),
        ({"named": {"hat": "a hat", "cap": "a cap"}, "novel": ["shoe"]}, "reader_options.novel must be a list of"),
        ({"novel": ["hat"]}, "reader_options.novel must be a list of classes that reader_options.named has"),
        ({"named": {"hat": "a hat", "cap": "a cap"}, "novel": ["hat"]}, "needs two classes that are not novel"),
    ],
)
def test_options_that_make_no_questions_are_refused_before_anything_is_read(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "photos/hat").mkdir(parents=True)
    look = READERS["folders"].look
    assert look is not None
    with pytest.raises(UserError, match=words):
        look(RawSplit(tmp_path, "train", {"folder": ("photos",)}, options))


def test_a_class_without_a_name_is_a_reason() -> None:
    assert QUESTIONS is not None
    with pytest.raises(WrongValueError, match="class is none of those that the card names") as caught:
        QUESTIONS.records("tent/1.jpg", "tent")
    assert caught.value.detail == "'tent'"


# --- the photos that a run prepares by itself ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty made-up photos a split, two of each class and more of the novel ones."""
    folder = tmp_path_factory.mktemp("clothing") / "raw"
    write_synthetic(CARD, folder, scenes=20)
    return folder


@pytest.mark.slow
def test_the_same_photos_are_prepared_from_a_folder_and_from_their_address(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And by prepare.py without an argument; once fetched, the archive is not asked for again."""
    monkeypatch.chdir(tmp_path)
    console, bare = Console(file=io.StringIO(), width=300), synthetic_card(CARD)
    given = {"clothing_small": SourcesConfig(path=str(raw))}
    assert ensure_prepared([bare], tmp_path / "given", given, console) == {}
    with file_server() as server:
        served = replace(bare, fetch=(replace(CARD.fetch[0], url=f"{server.url}/photos.zip"),))
        server.files["/photos.zip"] = _archive(raw)
        for shards in ("fetched", "again"):
            assert ensure_prepared([served], tmp_path / shards, {"clothing_small": SourcesConfig()}, console) == {}
        assert len(server.requests) == 1
        monkeypatch.setattr(command, "load_cards", lambda names: [served])
        assert (
            prepare(PrepareConfig(dataset="clothing_small", sources={"clothing_small": SourcesConfig()}), console) == 0
        )
    tars = {path.relative_to(tmp_path / "given"): path.read_bytes() for path in (tmp_path / "given").rglob("*.tar")}
    assert len(tars) == 3
    for shards in ("fetched", "again", "data/shards"):
        assert {path: (tmp_path / shards / path).read_bytes() for path in tars} == tars


def test_photos_that_cannot_be_fetched_name_both_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with file_server() as server:
        card = replace(CARD, fetch=(replace(CARD.fetch[0], url=f"{server.url}/gone.zip"),))
        found = ensure_prepared([card], tmp_path, {"clothing_small": SourcesConfig()}, Console(quiet=True))
    assert "get it yourself: raw= is the folder that holds train/" in found["clothing_small"]
    assert found["clothing_small"].endswith("then set data.sources.clothing_small.path=FOLDER")


def _archive(raw: Path) -> bytes:
    """As the card says that the official one is laid out."""
    content = io.BytesIO()
    with ZipFile(content, "w") as archive:
        for path in sorted(raw.rglob("*.png")):
            archive.write(path, f"{CARD.fetch[0].below}/{path.relative_to(raw)}")
    return content.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("names", [[], ["mixture=photos_known", "suite=photos_novel"]], ids=["all", "known"])
def test_one_command_prepares_trains_scores_and_reports(
    names: list[str], raw: Path, world: World, tmp_path: Path
) -> None:
    data = [f"data.shards={tmp_path / 'shards'}", f"data.sources.clothing_small.path={raw}"]
    steps = ["recipe.phases.alignment.steps=1", "recipe.phases.instruction.steps=1", "recipe.final_samples=4"]
    run = train_here(world, tmp_path, "experiment=photos", *names, *data, *steps)
    assert [entry["step"] for entry in read_lines(run / "metrics.jsonl")] == [1, 2]
    config = compose("train", TrainConfig, ["experiment=photos", *names])
    assert scores(run / "evaluation").keys() == {*config.suite.held_in, *config.suite.held_out}
    assert (run / "evaluation/report.html").is_file()
    audit = audit_prepared([tmp_path / "shards"])
    assert audit.trained and audit.evaluated
    assert audit.leaks() == []
