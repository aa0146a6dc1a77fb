"""Checkpoints appear whole or not at all, the newest whole one is found, and optimiser state comes back bit by bit."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from instructblip.errors import UserError
from instructblip.training.optim import make_adamw, set_learning_rate
from instructblip.training.writer import CheckpointWriter
from instructblip.weights import checkpoint
from instructblip.weights.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    checkpoint_folders,
    load_checkpoint,
    newest_whole,
    optimizer_tensors,
    remove_unfinished,
    restore_optimizer,
    save_checkpoint,
)
from instructblip.weights.load import find_checkpoint


def _save(folder: Path, step: int, *, keep: int = 10, size: int = 5, **state: Any) -> Path:
    tensors = {"a": torch.full((size,), float(step)), "b": torch.arange(6).view(2, 3).T}
    optimizer = {"a|exp_avg": torch.full((size,), step / 7), "a|step": torch.tensor(float(step))}
    return save_checkpoint(folder, step=step, model=tensors, optimizer=optimizer, state=state, keep=keep)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = _save(tmp_path, 12, frozen={"llm": "abc"}, seed=3)
    assert path == tmp_path / "step_00000012"
    assert _names(path) == [MODEL_FILE, OPTIMIZER_FILE, STATE_FILE]
    loaded = load_checkpoint(path)
    assert (loaded.path, loaded.step) == (path, 12)
    assert torch.equal(loaded.model["a"], torch.full((5,), 12.0))
    assert torch.equal(loaded.model["b"], torch.arange(6).view(2, 3).T)
    assert (loaded.state["frozen"], loaded.state["seed"]) == ({"llm": "abc"}, 3)
    assert _names(tmp_path) == ["step_00000012"]


def test_equal_content_gives_equal_hashes(tmp_path: Path) -> None:
    first, second = _save(tmp_path / "a", 3), _save(tmp_path / "b", 3)
    assert (first / STATE_FILE).read_bytes() == (second / STATE_FILE).read_bytes()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10, 100_000_000):
        _save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step_100000000", "step_00000010"]
    assert _names(tmp_path) == ["step_00000010", "step_100000000"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    _save(tmp_path, 4, seed=1)
    path = _save(tmp_path, 4, seed=2)
    assert load_checkpoint(path).state["seed"] == 2
    assert _names(tmp_path) == ["step_00000004"]


def test_unfinished_checkpoints_are_no_checkpoints(tmp_path: Path) -> None:
    _save(tmp_path, 4)
    (tmp_path / "step_00000008.123.partial").mkdir()
    (tmp_path / "step_x").mkdir()
    (tmp_path / "step_00000009").write_text("a file")
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step_00000004"]
    remove_unfinished(tmp_path)
    assert "step_00000008.123.partial" not in _names(tmp_path)
    assert newest_whole(tmp_path / "nothing") == (None, [])


# --- damage ----------------------------------------------------------------------------------------------------------


def test_no_digit_of_the_state_can_change_unnoticed(tmp_path: Path) -> None:
    """Step, fingerprints, counts, hashes of files, the checksum itself: each as a flipped bit leaves them."""
    path = _save(tmp_path, 8, frozen={"llm": "ab12"}, inputs={"splits": {"vqa/train": "34"}}, lost={"vqa": {"lost": 5}})
    whole = (path / STATE_FILE).read_bytes()
    for place in range(len(whole)):
        if whole[place : place + 1].isalnum():
            (path / STATE_FILE).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            found, complaints = newest_whole(tmp_path)
            assert found is None, whole[place - 20 : place + 5]
            assert len(complaints) == 1
    (path / STATE_FILE).write_bytes(whole)
    assert newest_whole(tmp_path) == (path, [])


def test_a_checkpoint_counts_for_the_step_of_its_folder_alone(tmp_path: Path) -> None:
    path = _save(tmp_path, 8)
    renamed = path.rename(tmp_path / "step_00000012")
    with pytest.raises(UserError, match=r"step_00000012 is broken \(state.json is of step 8\)"):
        load_checkpoint(renamed)
    assert load_checkpoint(renamed.rename(tmp_path / "the_best")).step == 8  # which says nothing of a step


def test_files_of_another_step_are_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    first, second = _save(tmp_path, 1), _save(tmp_path, 2)
    shutil.copy(first / OPTIMIZER_FILE, second / OPTIMIZER_FILE)
    found, complaints = newest_whole(tmp_path)
    assert found == first
    assert "optimizer.safetensors does not match its recorded hash" in complaints[0]


def test_a_model_is_not_taken_from_an_older_checkpoint_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = _save(tmp_path / "checkpoints", 1), _save(tmp_path / "checkpoints", 2)
    _cut(newer / MODEL_FILE)
    assert find_checkpoint(tmp_path) == older
    assert f"{newer} is broken (model.safetensors does not match its recorded hash) and passed over" in caplog.text


def test_what_the_disk_cannot_read_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older, newer = _save(tmp_path, 1), _save(tmp_path, 2)
    real = checkpoint.sha256_file

    def failing(path: Path) -> str:
        if path.parent == newer:
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(checkpoint, "sha256_file", failing)
    found, complaints = newest_whole(tmp_path)
    assert (found, complaints) == (
        older,
        [f"{newer} is broken (it cannot be read: Input/output error) and passed over"],
    )


def test_one_that_does_not_fit_gives_way_to_one_that_does(tmp_path: Path) -> None:
    older, newer = _save(tmp_path, 1, frozen={"llm": "a"}), _save(tmp_path, 2, frozen={"llm": "b"})

    def unfit(state: Mapping[str, Any]) -> str | None:
        return None if state["frozen"]["llm"] == "a" else "has another llm"

    assert newest_whole(tmp_path, unfit) == (older, [f"{newer} has another llm and is passed over"])


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _other_format(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


DAMAGE = [
    (MODEL_FILE, _cut, "model.safetensors does not match"),
    (MODEL_FILE, _flip, "model.safetensors does not match"),
    (OPTIMIZER_FILE, _flip, "optimizer.safetensors does not match"),
    (OPTIMIZER_FILE, Path.unlink, "optimizer.safetensors is missing"),
    (STATE_FILE, lambda path: os.truncate(path, 20), "state.json is not whole JSON"),
    (STATE_FILE, Path.unlink, "state.json does not exist"),
    (STATE_FILE, lambda path: path.write_text("[]"), "state.json does not say"),
    (STATE_FILE, _other_format, "format 99, this code reads 2"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGE)
def test_newest_whole_passes_over_a_broken_one_and_says_so(tmp_path: Path, name: str, damage: Any, reason: str) -> None:
    whole = _save(tmp_path, 1)
    broken = _save(tmp_path, 2)
    damage(broken / name)
    found, complaints = newest_whole(tmp_path)
    assert found == whole
    assert len(complaints) == 1
    assert str(broken) in complaints[0]
    assert reason in complaints[0]
    damage(whole / name)
    found, complaints = newest_whole(tmp_path)
    assert (found, len(complaints)) == (None, 2)


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGE)
def test_a_broken_checkpoint_is_not_loaded(tmp_path: Path, name: str, damage: Any, reason: str) -> None:
    path = _save(tmp_path, 2)
    damage(path / name)
    if name == STATE_FILE and not (path / name).exists():
        reason = "no checkpoint at"
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert reason in str(error.value)
    assert str(path) in str(error.value)


# --- full disk -------------------------------------------------------------------------------------------------------


def _full_for(name: str) -> Any:
    """A `save_file` that runs out of space in the middle of one of the files."""
    original = checkpoint.save_file

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        original(tensors, path)
        if path.name == name:
            os.truncate(path, 10)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    return save


def _full_json(self: Path, *arguments: Any, **options: Any) -> int:
    raise OSError(28, "No space left on device", str(self))


@pytest.mark.parametrize("name", [MODEL_FILE, OPTIMIZER_FILE, STATE_FILE])
def test_a_full_disk_leaves_the_older_ones_whole(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        _save(tmp_path, step, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", _full_for(name))
        if name == STATE_FILE:
            patch.setattr(Path, "write_text", _full_json)
        with pytest.raises(UserError, match=r"disk full while writing .*step_00000003; older .* resume=auto"):
            _save(tmp_path, 3, keep=2)
    assert _names(tmp_path) == ["step_00000001", "step_00000002"]
    assert newest_whole(tmp_path) == (tmp_path / "step_00000002", [])
    _save(tmp_path, 3, keep=2)
    assert _names(tmp_path) == ["step_00000002", "step_00000003"]


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    first = _save(folder, 1, size=20_000)
    with pytest.raises(UserError, match="disk full while writing"):
        _save(folder, 2, size=40_000)
    assert _names(folder) == ["step_00000001"]
    assert load_checkpoint(first).step == 1
    _save(folder, 3, size=1000)
    assert newest_whole(folder) == (folder / "step_00000003", [])


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("what", ["save_file", "sync_all"])
def test_a_disk_that_fails_is_one_line_and_costs_no_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, what: str
) -> None:
    def broken(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    older = _save(tmp_path, 1, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, what, broken)
        with pytest.raises(UserError, match=r"step_00000002.*; older checkpoints are whole: .* go on with resume=auto"):
            _save(tmp_path, 2, keep=1)
    assert (newest_whole(tmp_path), _names(tmp_path)) == ((older, []), [older.name])


def test_a_limit_on_the_size_of_files_is_one_line(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"step_00000001 cannot be written \(File too large\); .*ulimit -f"):
            _save(tmp_path, 1, size=20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _names(tmp_path) == []


def test_a_defect_of_the_code_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tensors: dict[str, torch.Tensor], path: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(OSError, match="Invalid argument"):
        _save(tmp_path, 1)
    assert _names(tmp_path) == []


def test_a_run_that_was_deleted_stays_away(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "deleted/checkpoints", keep=1)
    writer.save(1, model={"a": torch.zeros(1)}, optimizer={}, state={})
    with pytest.raises(UserError, match=r"deleted was deleted while the run was writing to it; start again"):
        writer.wait()
    assert _names(tmp_path) == []


# --- the order in which things reach the disk ------------------------------------------------------------------------


def test_it_is_on_the_disk_before_it_has_its_name_and_before_another_loses_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, 1, keep=1)
    done: list[tuple[str, str]] = []

    def noted(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *rest: Any, **options: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            done.append((what, Path(path).name.replace(f".{os.getpid()}", "")))
            return real(first, *rest, **options)

        return call

    monkeypatch.setattr(os, "fsync", noted("sync", os.fsync))
    monkeypatch.setattr(os, "replace", noted("rename", os.replace))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", noted("remove", shutil.rmtree))
    _save(tmp_path, 2, keep=1)
    named = done.index(("rename", "step_00000002.partial"))
    assert {name for _, name in done[:named]} == {MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, "step_00000002.partial"}
    assert done[named + 1] == ("sync", tmp_path.name)
    assert done[-1] == ("remove", "step_00000001")


# --- optimiser state -------------------------------------------------------------------------------------------------


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> Iterator[float]:
    for step in steps:
        torch.manual_seed(step)
        set_learning_rate(optimizer, 0.01 / (step + 1))
        optimizer.zero_grad()
        loss = (model(torch.randn(5, 4)) - torch.randn(5, 3)).square().mean()
        loss.backward()
        optimizer.step()
        yield float(loss.detach())


def _names_of(model: nn.Module) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return make_adamw(model.named_parameters(), weight_decay=0.05, betas=(0.9, 0.98))


def test_optimiser_state_roundtrip_is_exact(tmp_path: Path) -> None:
    model = _model()
    optimizer = _adamw(model)
    list(_train(model, optimizer, range(4)))
    tensors = optimizer_tensors(optimizer, _names_of(model))
    assert set(tensors) == {f"{name}|{key}" for name in dict(model.named_parameters()) for key in (
        "step", "exp_avg", "exp_avg_sq"
    )}  # fmt: skip
    path = save_checkpoint(tmp_path, step=4, model=dict(model.state_dict()), optimizer=tensors, state={}, keep=1)

    other = _model()
    restored = _adamw(other)
    other.load_state_dict(load_checkpoint(path).model)
    restore_optimizer(restored, _names_of(other), path)
    again = optimizer_tensors(restored, _names_of(other))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) and again[name].dtype == tensors[name].dtype for name in tensors)

    assert list(_train(other, restored, range(4, 8))) == list(_train(model, optimizer, range(4, 8)))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_whole_state_goes_where_its_parameter_is(tmp_path: Path) -> None:
    """Fused AdamW reads the number of steps, too, on the device of the parameter."""
    model = _model()
    optimizer = _adamw(model)
    list(_train(model, optimizer, range(1)))
    tensors = optimizer_tensors(optimizer, _names_of(model))
    path = save_checkpoint(tmp_path, step=1, model=dict(model.state_dict()), optimizer=tensors, state={}, keep=1)
    elsewhere = _model().to("meta")
    restored = _adamw(elsewhere)
    restore_optimizer(restored, _names_of(elsewhere), path)
    devices = {value.device.type for values in restored.state.values() for value in values.values()}
    assert devices == {"meta"}


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    model = _model()
    with pytest.raises(
        UserError, match=r"step_00000001 has the optimiser state of other parameters \(.*\); it is of another model"
    ):
        restore_optimizer(_adamw(model), _names_of(model), path)
