"""A run that draws records of an image together: its groups, its count of encoded images, its resume."""

import shutil
from pathlib import Path

import pytest

from tests.kit.runs import World, one_thread, read_lines, train_here

SETTINGS = ("mixture.per=image", "mixture.image_records=2", "data.cache_features=false", "recipe.validate_every=24")


@pytest.mark.slow
def test_a_run_by_images_resumes_bit_for_bit(world: World, tmp_path: Path) -> None:
    with one_thread():
        whole = train_here(world, tmp_path / "whole", *SETTINGS)
        steps = read_lines(whole / "metrics.jsonl")
        cut = tmp_path / "cut" / whole.name
        shutil.copytree(whole, cut)
        shutil.rmtree(cut / "evaluation", ignore_errors=True)
        for checkpoint in sorted((cut / "checkpoints").iterdir())[2:]:
            shutil.rmtree(checkpoint)
        train_here(world, tmp_path / "cut", *SETTINGS, "resume=auto")
    assert len(steps) == 24
    kept = [{name: step[name] for name in ("step", "loss", "grad_norm", "sample_ids")} for step in steps]
    again = read_lines(cut / "metrics.jsonl")
    assert [{name: step[name] for name in kept[0]} for step in again] == kept
    images = [{sample.rsplit("-", 1)[0] for sample in step["sample_ids"]} for step in steps]
    assert sum(map(len, images)) < 0.8 * sum(len(step["sample_ids"]) for step in steps)
