"""The Hugging Face hub: a model card that its client reads, what is sent, and what is loaded and read at a revision.

The hub's own client talks to a server on the loopback (`tests/kit/hub.py`), over HTTP.
"""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml

from instructblip.data.cards import Card, load_card
from instructblip.data.records import Record
from instructblip.data.trained_on import is_trained_on
from instructblip.errors import UserError
from instructblip.evaluation.suite import DatasetResult, results_json
from instructblip.fetch.shard_cache import mirror_datasets
from instructblip.files import write_json
from instructblip.models.fingerprint import fingerprint_tensors
from instructblip.weights.__main__ import main
from instructblip.weights.load import load_model
from tests.kit.hub import Hub, hub
from tests.kit.mixtures import jpeg, mixture_of, write_split
from tests.parity.conftest import Formats
from tests.unit.test_remote import sequence
from tests.unit.test_report_data import result_of

NAME = "user/tiny"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    with hub(monkeypatch, tmp_path / "cache") as made:
        yield made


@pytest.fixture
def evaluated(formats: Formats, tmp_path: Path) -> Path:
    """A run trained on VisDial and a card that is gone; evaluated on VisDial, IconQA and VizWiz's test split."""
    run = shutil.copytree(formats.native, tmp_path / "run")
    stored = yaml.safe_load((run / "config.yaml").read_text())
    stored["mixture"] = {"datasets": [{"name": "visdial"}, {"name": str(tmp_path / "secret_photos.yaml")}]}
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    rounds = [Record(f"{n}-1", "dialog", "?", ("b",), choices=("a", "b"), label=1) for n in range(4)]
    unscored = [Record(f"VizWiz_test_{n:08d}", "question", "what?") for n in range(2)]
    choices = [Record(str(n), "multiple_choice", "?", choices=("a", "b"), label=1) for n in range(4)]
    results = [
        result_of(tmp_path / "d", "visdial", rounds, [[-1.0, -2.0]] + [[-2.0, -1.0]] * 3),
        result_of(tmp_path / "v", "vizwiz", unscored, ["a", "b"], split="test"),
        result_of(tmp_path / "s", "iconqa", choices, [[-1.0, -2.0]] + [[-2.0, -1.0]] * 3),
    ]
    weights = fingerprint_tensors(load_model(run, device="cpu").model.held_state())
    model = {"kind": "InstructBLIP", "vision": {}, "llm": {"name": "tiny"}}
    written = results_json(
        [DatasetResult(result, {}) for result in results], checkpoint="x", fingerprint=weights, step=1, model=model
    )
    write_json(run / "evaluation/results.json", written)
    return run


def convert(*arguments: object) -> int:
    return main([*map(str, arguments), "--to", "huggingface"])


def test_another_view_of_what_was_trained_is_held_in_and_another_kind_is_not() -> None:
    trained: dict[str, Card | None] = {
        name: load_card(name) for name in ("clothing_known_what", "clothing_known_present")
    }
    asked = (
        "clothing_known_yes_no",
        "clothing_small",
        "clothing_novel_yes_no",
        "clothing_statements",
        "easy_vqa_yes_no",
    )
    assert [is_trained_on(name, {**trained, "gone": None}) for name in asked] == [True, True, False, False, False]


@pytest.mark.slow
def test_a_card_has_parts_data_scores_and_terms_and_the_hubs_client_reads_it(evaluated: Path, tmp_path: Path) -> None:
    assert convert(evaluated, tmp_path / "out", "--card", "--licence", "apache-2.0") == 0
    card = huggingface_hub.ModelCard.load(tmp_path / "out/README.md")
    data = card.data
    assert (data.license, data.pipeline_tag, data.library_name) == ("apache-2.0", "image-text-to-text", "transformers")
    assert data.datasets == ["visdial"]
    assert data.model_name == "out"
    stored = json.loads((evaluated / "evaluation/results.json").read_text())["datasets"]
    assert {(found.dataset_type, found.metric_type, found.metric_value) for found in data.eval_results} == {
        (name, stored[name]["metric"], stored[name]["value"]) for name in ("visdial", "iconqa")
    }  # VizWiz's answers are not public
    held = {found.dataset_type: found.metric_args["held"] for found in data.eval_results}
    assert held == {"visdial": "held-in", "iconqa": "held-out"}
    text = card.text
    entry = stored["iconqa"]
    row = next(line for line in text.splitlines() if line.startswith("| IconQA"))
    for word in ("held-out", f"{entry['value']:.1f}", f"{entry['low']:.1f} to {entry['high']:.1f}"):
        assert word in row
    assert entry["protocol"]["sha256"][:12] in row
    assert "answers not public" in text
    assert "CC BY 4.0" in text  # VisDial's
    assert "secret_photos | " in text
    assert str(tmp_path) not in text.replace(json.dumps(str(tmp_path / "out")), "")  # nothing of this machine's folders


@pytest.mark.slow
def test_scores_of_made_up_data_are_marked_and_not_given_to_the_hub(evaluated: Path, tmp_path: Path) -> None:
    file = evaluated / "evaluation/results.json"
    stored = json.loads(file.read_text())
    stored["datasets"]["visdial"]["made_up"] = True
    file.write_text(json.dumps(stored))
    assert convert(evaluated, tmp_path / "out", "--card") == 0
    card = huggingface_hub.ModelCard.load(tmp_path / "out/README.md")
    assert [found.dataset_type for found in card.data.eval_results] == ["iconqa"]
    assert "VisDial 1.0 (made-up data: the score means nothing)" in card.text


@pytest.mark.slow
def test_scores_of_other_weights_are_refused(
    evaluated: Path, formats: Formats, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = evaluated / "evaluation/results.json"
    stored = json.loads(file.read_text())
    stored["checkpoint"]["trainable_sha256"] = "0" * 64
    file.write_text(json.dumps(stored))
    assert convert(evaluated, tmp_path / "out", "--card") == 2
    assert "scores of other weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    file.write_text("{}")
    assert convert(formats.native, tmp_path / "out", "--card", "--results", file) == 2
    assert "is no results.json of an evaluation (KeyError: 'checkpoint')" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_is_sent_privately_and_loaded_at_a_revision(
    server: Hub, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(evaluated, tmp_path / "out", "--card", "--push", NAME) == 0
    assert "sent to " in capsys.readouterr().out
    assert server.private == {f"models/{NAME}": True}
    first, files = server.find(f"models/{NAME}", "main") or ("", {})
    assert files == {
        path.relative_to(tmp_path / "out").as_posix(): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert f'instructblip.load("{NAME}")' in files["README.md"].decode()
    broken = {name: content for name, content in files.items() if name != "config.json"}
    server.put(f"models/{NAME}", broken)  # the newest is another one
    with pytest.raises(UserError):
        load_model(NAME, device="cpu")
    assert convert(f"{NAME}@{first}", tmp_path / "third", "--card") == 0  # which names what it was made of
    third = huggingface_hub.ModelCard.load(tmp_path / "third/README.md")
    assert (third.data.base_model, third.data.license) == ([NAME], "other")
    assert f"| {NAME}@{first} | see https://huggingface.co/{NAME} |" in third.text
    assert "It has not been evaluated." in third.text
    found = load_model(f"{NAME}@{first}", device="cpu").model.state_dict()
    own = load_model(tmp_path / "out", device="cpu").model.state_dict()
    assert own.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in own.items())
    with pytest.raises(UserError, match=f"no folder {NAME}@v9 here") as error:
        load_model(f"{NAME}@v9", device="cpu")
    assert "\n" not in str(error.value)
    # A second time only where it is asked for, and then without what the new folder has not.
    assert convert(evaluated, tmp_path / "again", "--push", NAME) == 2
    assert f"the hub has a {NAME} already" in capsys.readouterr().err
    assert convert(evaluated, tmp_path / "out", "--push", NAME, "--overwrite") == 0
    assert (server.find(f"models/{NAME}", "main") or ("", {}))[1].keys() == files.keys() - {"README.md"}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_on_the_hub_are_read_as_local_ones_are_at_a_revision(server: Hub, tmp_path: Path, workers: int) -> None:
    local = tmp_path / "there/set/train"
    write_split(local, "set", [jpeg(seed) for seed in range(12)])
    files = {f"shards/set/train/{path.name}": path.read_bytes() for path in local.iterdir()}
    first = server.put("datasets/user/photos", files)
    server.put("datasets/user/photos", {"README.md": b"nothing else"})
    wanted = [("set", "train"), ("set", "test")]
    root, found = mirror_datasets(
        f"hf://datasets/user/photos@{first}/shards", wanted, tmp_path / "cache/shards", 1 << 20
    )
    assert found == {("set", "train")}
    assert not [line for line in server.asked if line.endswith(".tar")]  # opening fetches no tar
    assert sequence(mixture_of({"set": root / "set/train"}), workers) == sequence(mixture_of({"set": local}), 0)
    _, nothing = mirror_datasets("hf://datasets/user/photos/shards", wanted, tmp_path / "cache/shards", 1 << 20)
    assert nothing == set()


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no token", "run `hf auth login`, or set HF_TOKEN"),
        ("refused", f"the hub refuses the token for {NAME} (status 403)"),
        ("broken", f"the hub refuses {NAME} (status 500"),
        ("no network", f"the hub does not answer for {NAME}"),
        ("no name", "is no name of the hub; give USER/NAME"),
        ("native", "they go with --to huggingface"),
        ("no card", "--results and --licence are of the card; give --card"),
        ("nothing sent", "--public is of what is sent"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_anything_is_written(
    case: str,
    words: str,
    server: Hub,
    formats: Formats,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = {
        "no name": ["--push", "a/b/c"],
        "no card": ["--licence", "mit"],
        "nothing sent": ["--public"],
        "native": ["--to", "native", "--card"],
    }.get(case, ["--push", NAME])
    server.status = {"refused": 403, "broken": 500}.get(case)
    if case == "no token":
        monkeypatch.delenv("HF_TOKEN")
    if case == "no network":
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main([str(formats.native), str(tmp_path / "out"), "--to", "huggingface", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()
