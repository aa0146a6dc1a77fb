"""Runs with buckets and packed rows: the samples and losses of a run without, and less padding in metrics.jsonl."""

from pathlib import Path

import pytest

from instructblip.errors import UserError
from instructblip.models.packing import pack_rows
from tests.kit.runs import World, read_lines, train_here

STEPS = 3


def phases(settings: str) -> tuple[str, ...]:
    """Overrides for a short run whose only phase is cut in this way."""
    phase = f"{{steps: {STEPS}, batch_size: 12, learning_rate: 1e-3, {settings}}}"
    every = ("recipe.final_samples=1", "recipe.validate_every=50", "qformer.dropout=0", "data.workers=1")
    return ("~recipe.phases", f"recipe.phases={{only: {phase}}}", *every)


@pytest.mark.slow
def test_batching_changes_neither_samples_nor_losses(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows as for a wide model: in the tiny one, longer rows would cost more in attention than they save.
    monkeypatch.setattr("instructblip.models.llm.pack_rows", lambda lengths, width: pack_rows(lengths, width=4096))
    runs = {
        kind: train_here(world, tmp_path / kind, *phases(settings))
        for kind, settings in (
            ("fixed", "micro_batch_size: 4"),
            ("bucketed", "batching: bucketed, micro_batch_size: 4"),
            ("packed", "batching: packed, micro_batch_tokens: 400"),
        )
    }
    lines = {kind: read_lines(run / "metrics.jsonl") for kind, run in runs.items()}
    for kind in ("bucketed", "packed"):
        assert len(lines[kind]) == STEPS
        for fixed, found in zip(lines["fixed"], lines[kind], strict=True):
            for key in ("step", "sample_ids", "tokens", "lr"):
                assert found[key] == fixed[key]
            assert found["loss"] == pytest.approx(fixed["loss"], rel=1e-5)
            assert found["grad_norm"] == pytest.approx(fixed["grad_norm"], rel=1e-4)
            assert found["loss_by_dataset"] == pytest.approx(fixed["loss_by_dataset"], rel=1e-5)
    waste = {kind: sum(line["padding_fraction"] for line in lines[kind]) / STEPS for kind in lines}
    assert 0 <= waste["packed"] < 0.05
    assert 0 < waste["bucketed"] < waste["fixed"] < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("batching: rows", ["recipe.phases.only.batching=rows", "fixed, bucketed, packed"]),
        ("micro_batch_tokens: 400", ["micro_batch_tokens", "fixed", "bucketed or packed"]),
        ("batching: packed, micro_batch_tokens: 0", ["recipe.phases.only.micro_batch_tokens=0", "1 or more"]),
    ],
)
def test_mistakes(world: World, tmp_path: Path, settings: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        train_here(world, tmp_path, *phases(settings))
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("llm.kind=encoder_decoder", ["batching=packed needs a decoder-only LLM", "bucketed"]),
        ("recipe.phases.only.objectives={alignment: 1.0}", ["batching=packed packs rows of the LLM", "fixed"]),
    ],
)
def test_where_nothing_can_be_packed(world: World, tmp_path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        train_here(world, tmp_path, *phases("batching: packed"), override)
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)
