"""Cards of one's own: short ones are as whole as official ones, a path is as good as a name, mistakes are one line."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from instructblip.config.schema import CardTask, Mode
from instructblip.config.validate import build
from instructblip.data.card_defaults import TASKS_FOLDER, task_defaults
from instructblip.data.cards import (
    OwnCard,
    as_stored,
    changed_source,
    load_card,
    load_cards,
    settled,
    source_facts,
)
from instructblip.errors import UserError
from tests.kit.own_data import short_card, write_card

TASKS = get_args(CardTask)


def own(path: Path) -> OwnCard:
    card = load_card(path)
    assert isinstance(card, OwnCard)
    return card


# --- defaults --------------------------------------------------------------------------------------------------------


def test_the_short_card_is_whole(tmp_path: Path) -> None:
    card = own(write_card(tmp_path))
    assert (card.name, card.title, card.role, card.templates, card.verified) == (
        "mine",
        "mine",
        "held-in",
        "vqa",
        False,
    )
    assert card.splits["train"].files == {"records": ("train.jsonl",), "images": ("photos",)}
    assert (card.splits["val"].images, card.splits["val"].records) == (None, None)
    assert card.told == {"prefix": "mine", "dataset": "mine", "task": "vqa", "columns": {}}
    rules = card.evaluation
    assert rules is not None
    assert (rules.split, rules.mode, rules.metric, rules.max_new_tokens) == ("val", "generate", "accuracy", 10)
    assert card.training.flip is False


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_defaults_that_hold_together(task: str, tmp_path: Path) -> None:
    card = own(write_card(tmp_path, task=task))
    assert card.template_set().templates
    assert card.evaluation is not None
    assert (card.task, card.task_group) == (task, task_defaults(task).task_group)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_card_may_choose_the_other_mode(task: str, mode: str, tmp_path: Path) -> None:
    """What is ranked goes with ranking; a task without anything to rank says so."""
    path = write_card(tmp_path, task=task, evaluation={"mode": mode})
    if mode == "rank" and task in ("captioning", "conversation"):
        with pytest.raises(
            UserError, match="evaluation needs one of candidates, verbalizers and candidates_from to rank"
        ):
            load_card(path)
        return
    rules = own(path).evaluation
    assert rules is not None
    assert rules.mode == mode


def test_there_is_a_file_for_each_task_and_no_other() -> None:
    assert sorted(path.stem for path in TASKS_FOLDER.iterdir()) == sorted(TASKS)


def test_what_the_card_says_goes_before_what_the_task_does(tmp_path: Path) -> None:
    evaluation = {"candidates": ["red", "blue"], "num_beams": 2, "prompt": "{question}"}
    card = own(
        write_card(tmp_path, templates="bare", training={"flip": True}, title="My photos", evaluation=evaluation)
    )
    rules = card.evaluation
    assert rules is not None
    assert (card.templates, card.training.flip, card.title) == ("bare", True, "My photos")
    assert (rules.mode, rules.candidates, rules.candidates_from, rules.num_beams) == ("rank", ("red", "blue"), None, 2)
    assert (rules.metric, rules.prompt) == ("accuracy", "{question}")


@pytest.mark.parametrize(
    ("splits", "scored", "watched", "role"),
    [
        (["train", "val", "test"], "test", "val", "held-in"),
        (["train", "val"], "val", None, "held-in"),
        (["validation", "test"], "test", "validation", "held-out"),
        (["benchmark"], "benchmark", None, "held-out"),
        (["train"], None, None, "held-in"),
    ],
)
def test_the_splits_say_what_is_scored(
    splits: list[str], scored: str | None, watched: str | None, role: str, tmp_path: Path
) -> None:
    card = own(write_card(tmp_path, splits={split: {"records": "a.csv"} for split in splits}))
    rules = card.evaluation
    assert (None if rules is None else (rules.split, rules.validation_split)) == (
        None if scored is None else (scored, watched)
    )
    assert (card.role, card.templates is None) == (role, "train" not in splits)


def test_a_card_may_be_only_trained_on_or_only_scored(tmp_path: Path) -> None:
    assert own(write_card(tmp_path, evaluation=None)).evaluation is None
    scored = own(write_card(tmp_path, templates=None))
    assert (scored.templates, scored.role) == (None, "held-out")
    with pytest.raises(UserError, match="nothing is done with it; give templates to train on it, or evaluation"):
        load_card(write_card(tmp_path, templates=None, evaluation=None))


def test_a_card_that_says_all_of_it_needs_no_task(tmp_path: Path) -> None:
    """Other readers' data too, in the form of official cards."""
    card = {
        **yaml.safe_load((Path("datasets") / "vsr.yaml").read_text()),
        "name": "mine",
        "task": ...,
        "reader": "vsr",
        "shared_images": {},
    }
    assert own(write_card(tmp_path, **card)).splits == load_card("vsr").splits


def test_what_is_a_default_is_told_from_what_the_card_says(tmp_path: Path) -> None:
    rows = {key: said for key, _, said in settled(own(write_card(tmp_path, evaluation={"num_beams": 1})))}
    assert {key for key, said in rows.items() if said} == {"name", "task", "reader", "evaluation.num_beams"}
    assert {"role", "templates", "training.flip", "evaluation.split", "evaluation.metric"} <= rows.keys()


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["./mine.yaml", "mine.yaml", "../data/mine.yaml", "~/data/mine.yaml", "{folder}/mine.yaml"]
)
def test_a_path_may_be_written_in_any_way(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_card(tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    written = name.format(folder=tmp_path / "data")
    card = load_card(written)
    assert (card.name, card.reference) == ("mine", written)


def test_a_path_may_hold_anything_and_the_card_another_name_than_its_file(tmp_path: Path) -> None:
    card = load_card(write_card(tmp_path / "mein Ordner, groß [1]", "Karte 1.yml", name="my_photos-2"))
    assert card.name == "my_photos-2"


def test_a_path_to_an_official_card_is_the_official_card() -> None:
    assert load_card("datasets/vsr.yaml") == load_card("vsr")
    assert not isinstance(load_card("datasets/vsr.yaml"), OwnCard)


def test_templates_and_metric_beside_the_card_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/asking.yaml").write_text("templates: ['Say: {question}']\n")
    (tmp_path / "data/my metric.py").write_text("raise SystemExit('a card is read, not run')\n")
    path = write_card(tmp_path / "data", templates="./asking.yaml", evaluation={"metric": "./my metric.py:score"})
    monkeypatch.chdir(tmp_path)
    card = own(path.relative_to(tmp_path))
    assert (card.template_set().name, card.template_set().templates) == ("asking", ("Say: {question}",))
    assert card.evaluation is not None
    assert card.evaluation.metric == f"{tmp_path}/data/my metric.py:score"


def test_a_view_takes_files_and_task_of_reading_from_its_parent(tmp_path: Path) -> None:
    write_card(tmp_path, "photos.yaml", name="my_photos", columns={"question": "q"})
    kept = {"reader": ..., "splits": ..., "view_of": "photos", "name": "view", "task": "conversation"}
    for parent in ("photos", "./photos.yaml"):
        view = own(write_card(tmp_path, "view.yaml", **(kept | {"view_of": parent})))
        assert (view.source, view.task, view.read_as, view.columns) == (
            "my_photos",
            "conversation",
            "vqa",
            {"question": "q"},
        )
        assert source_facts(view, "train") == source_facts(own(tmp_path / "photos.yaml"), "train")
    for other in ("view", "third"):  # a view of itself too
        with pytest.raises(UserError, match=f"view_of must name a dataset of its own, but {other} is a view too"):
            load_card(write_card(tmp_path, "third.yaml", **(kept | {"view_of": other, "name": "third"})))


def test_a_view_of_an_official_dataset_asks_it_in_ones_own_way(tmp_path: Path) -> None:
    view = own(write_card(tmp_path, reader=..., splits=..., view_of="vqav2", evaluation={"prompt": "Q: {question}"}))
    official = load_card("vqav2")
    assert (view.source, view.splits, view.reader, view.fetch) == ("vqav2", official.splits, "vqa", official.fetch)
    assert view.evaluation is not None
    assert (view.evaluation.split, view.evaluation.prompt) == ("test", "Q: {question}")
    assert changed_source(view, {"split": "train", "source": {}}) == []  # its shards are the official card's
    assert view.prepared_as == "vqav2"


def test_two_cards_of_one_name_cannot_stand_together(tmp_path: Path) -> None:
    paths = [write_card(tmp_path / folder) for folder in ("a", "b")]
    with pytest.raises(UserError, match=r"a/mine.yaml and .*b/mine.yaml are both named mine; rename one of them"):
        load_cards(paths)


def test_all_cards_that_are_wrong_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no dataset card 'vrs'.*; there is no card at .*none.yaml; .* reader=x is none of"
    ):
        load_cards(["vsr", "vrs", tmp_path / "none.yaml", write_card(tmp_path, reader="x")])


# --- mistakes --------------------------------------------------------------------------------------------------------

TRAIN = {"records": "train.jsonl"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"reader": "jsonlines"}, "reader=jsonlines is none of aokvqa, coco_captions, coco_karpathy"),
        ({"reader": 3}, "reader must be text, not 3"),
        ({"task": "vqaa"}, "task=vqaa is none of vqa, captioning, multiple_choice"),
        ({"task": "vqaa"}, "did you mean vqa?"),
        ({"task": ["vqa"]}, "task="),
        ({"task": ...}, "key task is missing; give one of vqa, captioning"),
        ({"task": ..., "templates": "vqa"}, "key task is missing; give vqa or captioning"),
        ({"reader": "folders", "splits": {"train": {"folder": "a"}}}, "task=vqa is not what reader folders reads for"),
        ({"licens": "MIT"}, "unknown key licens; did you mean licence?"),
        ({"path": "a"}, "unknown key path"),
        ({"said": ["a"]}, "unknown key said"),
        ({"read_as": "vqa"}, "unknown key read_as"),
        ({"splits": ...}, "key splits is missing"),
        ({"splits": {}}, "splits has none; give one, such as train"),
        ({"splits": ["train"]}, "splits must be keys and values"),
        ({"splits": {"train": "train.jsonl"}}, "splits.train must be keys and values, not 'train.jsonl'"),
        ({"splits": {"train": {"images": "photos"}}}, "key splits.train.records is missing; reader records needs it"),
        ({"splits": {"train": TRAIN | {"imags": "a"}}}, "splits.train has 'imags', which reader records does not take"),
        ({"splits": {"train": {"records": 2014}}}, "key splits.train.records is missing; reader records needs it"),
        ({"splits": {"train": TRAIN | {"folder": 2014}}}, "splits.train.folder must be the path of a file or folder"),
        ({"splits": {"train": {"records": []}}}, "splits.train.files.records names no place"),
        ({"splits": {"train": {"records": "../a.csv"}}}, "'../a.csv' must be a path below the raw folder; put a link"),
        ({"splits": {"train": {"records": "/data/a.csv"}}}, "'/data/a.csv' must be a path below the raw folder"),
        ({"splits": {"a": TRAIN, "b": TRAIN}}, "key evaluation.split is missing; name the split that is scored: a, b"),
        (
            {"columns": {"qestion": "q"}},
            "columns has 'qestion', which reader records does not take; did you mean",
        ),
        ({"columns": ["q"]}, "columns must be keys and values"),
        ({"reader_options": {"prefix": "a"}}, "reader_options has 'prefix', which reader records does not take"),
        ({"templates": "vqua"}, "templates: there is no template set 'vqua'"),
        ({"templates": "./none.yaml"}, "templates: there is no template set 'none' in"),
        ({"templates": 3}, "templates must be text, not 3"),
        ({"evaluation": {"metric": "acuracy"}}, "evaluation.metric is 'acuracy'; did you mean 'accuracy'?"),
        ({"evaluation": {"metric": "./my_metric.py"}}, "evaluation.metric is '"),
        ({"evaluation": {"metric": "./my_metric.py"}}, "write ./FILE.py:FUNCTION"),
        ({"evaluation": {"metric": "./none.py:score"}}, "none.py, which is not there"),
        ({"evaluation": {"metric": ["accuracy"]}}, "evaluation.metric must be text"),
        ({"evaluation": {"promt": "a"}}, "unknown key evaluation.promt; did you mean evaluation.prompt?"),
        ({"evaluation": {"split": "vall"}}, "evaluation.split 'vall' is not among splits; did you mean 'val'?"),
        ({"evaluation": ["val"]}, "evaluation must be keys and values"),
        ({"task": "classification", "splits": {"test": {"records": "a.csv"}}}, "key evaluation.candidates is missing"),
        ({"name": "a/b"}, "name is 'a/b'; folders are named after it: give letters, digits, _ and -"),
        ({"name": "../mine"}, "folders are named after it"),
        ({"name": ".mine"}, "folders are named after it"),
        ({"name": "my photos"}, "folders are named after it"),
        ({"name": "größe"}, "folders are named after it"),
        ({"name": "a" * 101}, "folders are named after it"),
        ({"name": ""}, "folders are named after it"),
        ({"name": 7}, "name must be text, not 7; put it in quotes"),
        ({"name": ...}, "key name is missing"),
        ({"name": "mean"}, "name is 'mean'; that means something else in recipe.keep_best"),
        ({"name": "vqav2"}, "name is 'vqav2'; that is an official card's; give another"),
        ({"view_of": "vqav2"}, "reader is the parent's to say; remove it, or view_of"),
        ({"view_of": "nobody", "reader": ..., "splits": ...}, "view_of names no card: 'nobody'"),
        ({"fetch": [], "not_fetched": ...}, "say one of source_part, fetch, and not_fetched"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_key(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    path = write_card(tmp_path, **values)
    with pytest.raises(UserError) as caught:
        load_card(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and "also wrong: read_as" not in str(caught.value)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 10)}]\n" for n in range(8)
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (BOMB, "there are more than 100,000 values, by aliases perhaps"),
        ("name: &a [*a]\n", "nested too deep, or holds itself by an alias"),
        ("name: mine\nname: yours\n", "key name stands twice"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("splits: {1: {records: a}}\n", "splits has the key 1, which is not text; put it in quotes"),
        ("[" * 5000, "not valid YAML"),
        ("", "must hold keys and values at its top level"),
        ("\x00", "not valid YAML"),
    ],
)
def test_a_hostile_file_is_one_line(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        load_card(tmp_path / "mine.yaml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_card_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for place in (tmp_path / "none.yaml", tmp_path / "folder.yaml", tmp_path / "mine"):
        with pytest.raises(UserError, match=rf"there is no card at {place}; a card's path ends in .yaml"):
            load_card(place)


# --- no code of others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", [("config.yaml", "metrics.jsonl", "checkpoints/step_1"), ("model.safetensors",)])
@pytest.mark.parametrize("inside", ["card", "metric"])
def test_code_that_comes_with_a_checkpoint_is_refused(tmp_path: Path, around: tuple[str, ...], inside: str) -> None:
    checkpoint, elsewhere = tmp_path / "run", tmp_path / "mine"
    for name in around:
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).touch()
    homes = {"card": elsewhere, "metric": elsewhere} | {inside: checkpoint / "below"}
    for home in homes.values():
        home.mkdir(exist_ok=True)
    (homes["metric"] / "score.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    card = write_card(homes["card"], evaluation={"metric": f"{homes['metric']}/score.py:score"})
    with pytest.raises(
        UserError, match=r"lies in .*/run, which holds a checkpoint: code that comes with weights is not run"
    ):
        load_card(card)
    shutil.rmtree(checkpoint / "below")
    assert not (tmp_path / "ran").exists()


# --- what is kept of a card ------------------------------------------------------------------------------------------


def test_what_results_keep_of_a_card_is_whole_and_names_no_place_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "score.py").touch()
    (tmp_path / "asking.yaml").write_text("templates: ['{question}']\n")
    rules = {"metric": "./score.py:score", "presets": {"lavis": {"metric": "./score.py:score"}}}
    card = own(write_card(tmp_path, templates="./asking.yaml", evaluation=rules))
    kept = json.loads(json.dumps(as_stored(card)))
    assert str(tmp_path) not in json.dumps(kept)
    again = build(OwnCard, kept)
    assert card.evaluation is not None
    named = replace(card.evaluation, metric="score.py:score", presets={"lavis": {"metric": "score.py:score"}})
    assert again == replace(card, path="mine.yaml", templates="asking", evaluation=named)


def test_a_change_of_the_files_or_their_columns_is_noticed(tmp_path: Path) -> None:
    card = own(write_card(tmp_path))
    manifest = {"split": "train", "source": source_facts(card, "train")}
    assert changed_source(card, manifest) == []
    assert changed_source(own(write_card(tmp_path, evaluation={"num_beams": 1}, templates="bare")), manifest) == []
    for changes, told in (
        ({"columns": {"question": "q"}}, "options.columns.question: None -> q"),
        ({"task": "conversation"}, "options.task: vqa -> conversation"),
        ({"splits": {"train": {"records": "b.csv"}}}, "files.records: ['train.jsonl'] -> ['b.csv']"),
    ):
        assert told in changed_source(own(write_card(tmp_path, **changes)), manifest)


def test_the_dictionary_of_a_card_holds_all_of_it(tmp_path: Path) -> None:
    card = own(write_card(tmp_path))
    assert asdict(card).keys() >= short_card().keys()
