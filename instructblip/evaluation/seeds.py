"""Runs that differ by their seed alone: what results.json says of the training behind a checkpoint, and groups of such."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from instructblip.config.validate import read_yaml
from instructblip.data.trained_on import run_config
from instructblip.evaluation.results_file import StoredRun

# Settings of a run that leave its weights as they are, on the same machine: names, places, what is shown on the way.
_OUTER = frozenset(
    {"seed", "name", "output", "device", "resume", "resume_allow", "profile_step", "evaluation", "logger", "suite"}
    | {"plan", "plan_gpu", "plan_gpus", "plan_mfu"}
)


def training_of(checkpoint: str) -> dict[str, Any]:
    """The `seed` of the training run that a checkpoint is of, and a hash of all else that decided it (`recipe_sha256`).

    Args:
        checkpoint: folder of a checkpoint, `RUN/checkpoints/STEP`; of anything else nothing is known: an empty dict.
    """
    stored = run_config(checkpoint)
    config = None if stored is None else read_yaml(stored)
    if not isinstance(config, dict) or not isinstance(config.get("seed"), int):
        return {}
    decided = {key: value for key, value in config.items() if key not in _OUTER}
    text = json.dumps(decided, sort_keys=True, default=str)
    return {"seed": config["seed"], "recipe_sha256": hashlib.sha256(text.encode()).hexdigest()}


def groups_of_seeds(runs: Sequence[StoredRun]) -> list[list[StoredRun]]:
    """The runs in their order, those together that differ by their seed alone and were asked the same questions.

    A second evaluation with a seed that a group has already stands alone.
    """
    groups: list[tuple[Any, list[StoredRun]]] = []
    for run in runs:
        asked = {
            name: (score.protocol["sha256"], score.protocol["samples_sha256"]) for name, score in run.scores.items()
        }
        key = (run.recipe, run.step, run.adapter, run.llm, asked)
        for known, members in groups:
            if run.seed is not None and key == known and all(member.seed != run.seed for member in members):
                members.append(run)
                break
        else:
            groups.append((key, [run]))
    return [members for _, members in groups]
