"""A resumed run stands on what it was begun with: other inputs are refused or allowed by name, damage costs itself alone."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps
from rich.console import Console

from instructblip.config.schema import TrainConfig
from instructblip.data import cards
from instructblip.data import templates as templates_module
from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.errors import UserError
from instructblip.files import CHECKSUM, claimed_folder, with_checksum
from instructblip.training import run as run_module
from instructblip.training.run import train
from instructblip.weights import load as load_module
from instructblip.weights.checkpoint import checkpoint_folders, load_checkpoint
from tests.kit.runs import World, compose, one_thread, read_lines

STEPS = 6
SHORT = (
    "~recipe.phases",
    f"recipe.phases={{instruction: {{steps: {STEPS}, batch_size: 2, learning_rate: 1e-3}}}}",
    "recipe.checkpoint_every=2",
    "recipe.validate_every=100",
    "suite.held_in=[]",
    "suite.held_out=[]",
)


def run(world: World, output: Path, *more: str) -> str:
    """Train in this process, to the end; what was printed."""
    config = compose("train", TrainConfig, [*world.train, *SHORT, f"output={output}", *more])
    printed = io.StringIO()
    with world.here(), one_thread():
        assert train(config, Console(file=printed, width=500)).status == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short run that went to its end: checkpoints of steps 4 and 6."""
    output = tmp_path_factory.mktemp("short")
    run(world, output)
    return output / "demo"


@pytest.fixture
def begun(whole: Path, tmp_path: Path) -> Path:
    """The same as if it had been killed after step 5."""
    shutil.copytree(whole, tmp_path / "demo")
    shutil.rmtree(tmp_path / "demo/checkpoints" / f"step_{STEPS:08d}")
    return tmp_path / "demo"


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl")]


def restate(checkpoint: Path, **changed: Any) -> None:
    """Change a checkpoint's state as its writer would have: the checksum fits."""
    file = checkpoint / "state.json"
    state = {key: value for key, value in json.loads(file.read_text()).items() if key != CHECKSUM}
    file.write_text(json.dumps(with_checksum(state | changed)))


# --- inputs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_shards(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same questions on other pictures."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(world.raw, folder / "raw")
    for path in (folder / "raw").rglob("*.png"):
        ImageOps.invert(Image.open(path).convert("RGB")).save(path)
    prepare_dataset(load_card("easy_vqa"), folder / "raw", folder / "shards", progress=False)
    return folder / "shards"


@pytest.mark.slow
def test_a_checkpoint_names_all_that_is_read_on_the_way(finished_run: Path) -> None:
    inputs = load_checkpoint(checkpoint_folders(finished_run / "checkpoints")[0]).state["inputs"]
    assert {kind: set(named) for kind, named in inputs.items()} == {
        "splits": {"easy_vqa/train", "easy_vqa/validation"},
        "cards": {"easy_vqa_present", "easy_vqa_absent", "easy_vqa_shape", "easy_vqa_color"},
        "tokenizers": {"llm", "qformer"},
        "protocols": {"easy_vqa_yes_no", "easy_vqa_shape", "easy_vqa_color"},
    }
    assert len({value for named in inputs.values() for value in named.values()}) >= 6  # yes and no share their rules


@pytest.mark.slow
def test_other_data_is_refused_or_allowed_by_name(world: World, begun: Path, whole: Path, other_shards: Path) -> None:
    other = f"data.shards={other_shards}"
    before = (begun / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"^split easy_vqa/train changed since .*step_00000004 .*=\[data\.shards\]$"):
        run(world, begun.parent, "resume=auto", other)
    assert (begun / "metrics.jsonl").read_bytes() == before
    printed = run(world, begun.parent, "resume=auto", other, "resume_allow=[data.shards]")
    assert "changed on resuming: split easy_vqa/train" in printed
    assert losses(begun)[:4] == losses(whole)[:4]
    assert losses(begun)[4:] != losses(whole)[4:]


@pytest.mark.slow
def test_the_same_data_elsewhere_is_the_same(world: World, begun: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(world.shards, tmp_path / "moved")
    run(world, begun.parent, "resume=auto", f"data.shards={tmp_path / 'moved'}")
    assert losses(begun) == losses(whole)


@pytest.mark.slow
def test_other_counts_in_the_same_shards_are_other_data(world: World, begun: Path, tmp_path: Path) -> None:
    """They decide how often each dataset is drawn; no tar differs."""
    shutil.copytree(world.shards, tmp_path / "moved")
    file = tmp_path / "moved/easy_vqa/train/manifest.json"
    manifest = json.loads(file.read_text())
    shard = manifest["shards"][0]["records_by_kind"]
    shard["shape"] -= 1
    manifest["shards"][0]["records"] -= 1
    manifest["records_by_kind"]["shape"] -= 1
    manifest["records"] -= 1
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"split easy_vqa/train changed since"):
        run(world, begun.parent, "resume=auto", f"data.shards={tmp_path / 'moved'}")


@pytest.mark.slow
def test_other_templates_are_refused(world: World, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = templates_module.load_templates

    def edited(name: str) -> templates_module.TemplateSet:
        found = real(name)
        return found.__class__(found.name, found.task_group, (*found.templates[:-1], "{question} Please answer:"))

    monkeypatch.setattr(cards, "load_templates", edited)
    with pytest.raises(UserError, match=r"^card easy_vqa_\w+, .* changed since .* resume_allow=\[mixture\.datasets\]$"):
        run(world, begun.parent, "resume=auto")


@pytest.mark.slow
def test_another_tokenizer_is_refused(world: World, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "_SOME_OF_EVERYTHING", "cut otherwise")
    with pytest.raises(
        UserError, match=r"^tokenizer llm, tokenizer qformer changed since .*llm\.sources\.path,qformer"
    ):
        run(world, begun.parent, "resume=auto")


# --- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_frozen_hash_gives_way_to_the_checkpoint_before(world: World, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "demo"))
    newest, older = checkpoint_folders(folder / "checkpoints")
    frozen = load_checkpoint(newest).state["frozen"]
    restate(newest, frozen=frozen | {"llm": "0" * 64})
    printed = run(world, tmp_path, "resume=auto")
    assert f"{newest} was trained with another frozen llm and is passed over" in printed
    assert f"continuing {older} after step 4" in printed
    assert losses(folder) == losses(whole)
    assert load_checkpoint(newest).state["frozen"] == frozen  # written anew


def test_where_no_checkpoint_has_these_frozen_weights_the_newest_is_named(world: World, begun: Path) -> None:
    (only,) = checkpoint_folders(begun / "checkpoints")
    restate(only, frozen=load_checkpoint(only).state["frozen"] | {"vision": "0" * 64})
    with pytest.raises(UserError, match=rf"^the frozen vision weights are not those {only} was trained with"):
        run(world, begun.parent, "resume=auto")


def _of_an_older_version(checkpoint: Path) -> None:
    file = checkpoint / "state.json"
    state = json.loads(file.read_text())
    file.write_text(
        json.dumps({key: state[key] for key in ("files", "step", "frozen", "seed", "lost")} | {"format": 1})
    )


def _cut_short(checkpoint: Path) -> None:
    (checkpoint / "optimizer.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(_of_an_older_version, "format 1, this code reads 2"), (_cut_short, "optimizer.safetensors does not match")],
)
def test_a_run_without_a_whole_checkpoint_does_not_begin_anew_by_itself(
    world: World, begun: Path, damage: Callable[[Path], None], reason: str
) -> None:
    (only,) = checkpoint_folders(begun / "checkpoints")
    damage(only)
    before = (begun / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=rf"^{only} is broken \({reason}.* no checkpoint of {begun} is whole; .* move "):
        run(world, begun.parent, "resume=auto")
    assert (begun / "metrics.jsonl").read_bytes() == before
    assert only.is_dir()


# --- metrics, the folder, steps that are skipped -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("line", [1, 3])
def test_a_zeroed_line_of_the_metrics_costs_that_line_alone(world: World, begun: Path, whole: Path, line: int) -> None:
    path = begun / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = b"\0" * (len(lines[line]) - 1) + b"\n"
    path.write_bytes(b"".join(lines))
    run(world, begun.parent, "resume=auto", "recipe.keep_best=mean")
    found = [json.loads(text) for text in path.read_bytes().split(b"\n") if text.strip(b"\0")]
    expected = read_lines(whole / "metrics.jsonl")
    assert [entry["loss"] for entry in found] == [entry["loss"] for entry in expected if entry["step"] != line + 1]
    assert (begun / "curves.png").is_file()


def test_one_run_at_a_time_writes_to_a_folder(world: World, begun: Path) -> None:
    before = sorted(path for path in begun.rglob("*"))
    (begun / "checkpoints/step_00000006.1.partial").mkdir()
    with (
        claimed_folder(begun, "run"),
        pytest.raises(
            UserError, match=rf"^another run is writing to {begun}; wait until it has ended, or give another"
        ),
    ):
        run(world, begun.parent, "resume=auto")
    assert (begun / "checkpoints/step_00000006.1.partial").is_dir()  # the other one's save
    assert set(before) <= set(begun.rglob("*"))


@pytest.mark.slow
def test_a_folder_that_is_deleted_under_a_run_ends_it_and_stays_away(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_entry = run_module.log_entry

    def deleting(step: int, *arguments: Any) -> dict[str, Any]:
        if step == 2:
            while (tmp_path / "demo").exists():  # a save that is under way may add to it meanwhile
                shutil.rmtree(tmp_path / "demo", ignore_errors=True)
        return log_entry(step, *arguments)

    monkeypatch.setattr(run_module, "log_entry", deleting)
    with pytest.raises(UserError, match=r"demo/metrics\.jsonl was deleted or moved while the run was writing to it"):
        run(world, tmp_path)
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_up_to_a_limit(world: World, tmp_path: Path) -> None:
    more = ("recipe.non_finite=skip", "recipe.non_finite_limit=2", "recipe.clip_norm=null")
    broken = "recipe.phases.instruction.learning_rate=1e30"
    with pytest.raises(
        UserError, match=r"^3 of the last \d steps were skipped, the last \d, where recipe\.non_finite_li"
    ):
        run(world, tmp_path, *more, broken)
    skipped = [line["step"] for line in read_lines(tmp_path / "demo/metrics.jsonl") if line.get("skipped")]
    assert len(skipped) == 2
    assert load_checkpoint(checkpoint_folders(tmp_path / "demo/checkpoints")[0]).state["skipped"] == skipped[:1]
    # A restart gives it no further ones.
    with pytest.raises(UserError, match=r"^3 of the last \d steps were skipped"):
        run(world, tmp_path, *more, broken, "resume=auto")
