"""Go on with a run: choose the checkpoint, refuse other settings and other data than it stands on, put its state back."""

from collections.abc import Collection
from pathlib import Path

from rich.console import Console

from instructblip.config.schema import TrainConfig
from instructblip.config.validate import differences, read_config, to_dict, unknown_key, valid_keys
from instructblip.data.stream_dataset import StreamDataset
from instructblip.distributed import Ranks
from instructblip.errors import UserError
from instructblip.models.fingerprint import fingerprint_tensors
from instructblip.training.setup import TrainingRun
from instructblip.weights.checkpoint import (
    LoadedCheckpoint,
    checkpoint_folders,
    load_checkpoint,
    newest_whole,
    remove_unfinished,
    restore_optimizer,
)

# Settings that a resumed run may change: they decide how a run is carried out, not what it computes.
_FREE = (
    "resume",
    "resume_allow",
    "init_sha256",
    "device",
    "output",
    "logger",
    "parallel",
    "evaluation",
    "profile_step",
    "plan",
    "plan_gpu",
    "plan_gpus",
    "plan_mfu",
    "llm.sizes",
    "qformer.sizes",
    "data.shards",  # the splits in it are compared by their fingerprints
    "data.workers",
    "data.tolerance",
    "data.remote_cache_bytes",
    "recipe.keep_checkpoints",
    "recipe.keep_best",
    "recipe.full_disk",
    "recipe.non_finite_limit",
    "recipe.final_samples",
)
# How a batch is cut, where the loss is a mean over all of it.
_FREE_IN_PHASES = ("batching", "micro_batch_size", "micro_batch_tokens")
# What a checkpoint names of its inputs -> the key that allows another by its name in resume_allow.
_ALLOWED_BY = {
    "splits": "data.shards",
    "cards": "mixture.datasets",
    "protocols": "suite.held_in",
    "tokenizers": "{name}.sources.path",
}


def find_checkpoint(config: TrainConfig, folder: Path, ranks: Ranks, console: Console) -> LoadedCheckpoint | None:
    """The checkpoint that the run goes on from, which the first rank chooses for all; None: it starts from the beginning.

    Raises:
        UserError: the folder holds a run that is not to be continued, or checkpoints of which none is whole.
    """
    existing = checkpoint_folders(folder / "checkpoints")
    if config.resume is None and existing:
        raise UserError(
            f"{folder} already holds a run (newest checkpoint {existing[0].name}); "
            "continue it with resume=auto, or choose another name="
        )
    if ranks.is_first:
        remove_unfinished(folder / "checkpoints")
    if config.resume is None:
        return None
    if (found := _newest(folder, ranks, console)) is not None:
        return found
    console.print(f"{folder} has no checkpoint yet; starting from the beginning", soft_wrap=True)
    return None


def _newest(folder: Path, ranks: Ranks, console: Console) -> LoadedCheckpoint | None:
    chosen: str | None = None
    complaints: list[str] = []
    if ranks.is_first:
        newest, complaints = newest_whole(folder / "checkpoints")
        chosen = None if newest is None else str(newest)
    chosen, complaints = ranks.gather([chosen, complaints])[0]
    if chosen is not None:
        _say(console, complaints)
        return load_checkpoint(Path(chosen))
    if complaints:
        raise UserError(
            f"{'; '.join(complaints)}: no checkpoint of {folder} is whole; give another name=, or move "
            f"{folder / 'checkpoints'} away to start from the beginning"
        )
    return None


def check_configuration(config: TrainConfig, folder: Path, console: Console) -> None:
    """Refuse to go on with other settings than the run was begun with, but for those that may change or are allowed.

    Raises:
        UserError: names the settings.
    """
    for key in config.resume_allow:
        if key not in (known := valid_keys(TrainConfig)):
            raise UserError(f"resume_allow: {unknown_key(key, known)}")
    begun = read_config(folder / "config.yaml", TrainConfig)
    cut = _FREE_IN_PHASES if config.recipe.loss_mean == "global" else ()
    free = (*_FREE, *(f"recipe.phases.{name}.{key}" for name in config.recipe.phases for key in cut))
    old, new = to_dict(begun), to_dict(config)
    refused = differences(old, new, ignore=(*free, *config.resume_allow))
    orders = [", ".join(recipe["phases"]) for recipe in (old["recipe"], new["recipe"])]
    if orders[0] != orders[1] and sorted(old["recipe"]["phases"]) == sorted(new["recipe"]["phases"]):
        refused.append(f"order of recipe.phases: {orders[0]} -> {orders[1]}")
    if refused:
        raise UserError(
            f"{folder} was begun with another configuration ({'; '.join(refused)}); undo the change, "
            "choose another name= for a new run, or allow it by name: resume_allow=[KEY]"
        )
    _say(console, [f"changed on resuming: {line}" for line in differences(old, new, ignore=free)])


def restore(run: TrainingRun, checkpoint: LoadedCheckpoint) -> int:
    """Put the counts of a checkpoint back, whose weights the run has; return its step.

    Raises:
        UserError: other data, templates or tokenizers than the run was begun with.
    """
    _check_inputs(run, checkpoint)
    run.lost.restore(checkpoint.state["lost"])
    run.skipped.restore(checkpoint.state["skipped"])
    if isinstance(run.dataset, StreamDataset):
        run.dataset.restore(checkpoint.state.get("stream", {}))  # none of a run that read by index until now
    if not run.best.restore(checkpoint.state["best"]):
        find_best(run, checkpoint.step)
    run.console.print(f"continuing {checkpoint.path} after step {checkpoint.step}", highlight=False, soft_wrap=True)
    return checkpoint.step


def restore_optimisation(run: TrainingRun, checkpoint: LoadedCheckpoint) -> None:
    """Put back what follows the weights, once the model is laid over the processes."""
    optimisation = run.optimisation
    restore_optimizer(optimisation.optimizer, optimisation.names, checkpoint.path)
    if optimisation.average:
        optimisation.average.restore(checkpoint.average or checkpoint.model)


def check_equal(run: TrainingRun) -> None:
    """Every rank starts from the same weights and reads the same data: other files on one node would go unnoticed.

    Raises:
        UserError: names the part and the ranks.
    """
    inputs = {_named(kind, name): value for kind, named in run.inputs.items() for name, value in named.items()}
    own = {"trained weights": fingerprint_tensors(run.model.held_state()), **run.frozen, **inputs}
    for rank, other in enumerate(run.ranks.gather(own)):
        for part, value in own.items():
            if other.get(part) != value:
                raise UserError(
                    f"rank {rank} has other {part} than rank {run.ranks.rank}; give all nodes the same files"
                )


def _check_inputs(run: TrainingRun, checkpoint: LoadedCheckpoint) -> None:
    """Compare the inputs that a checkpoint names with those of this run, where both have them: what is trained on, the
    configuration says."""
    refused, changed = dict[str, list[str]](), list[str]()
    for kind, stored in checkpoint.state["inputs"].items():
        for name, fingerprint in stored.items():
            if run.inputs[kind].get(name, fingerprint) == fingerprint:
                continue
            changed.append(what := _named(kind, name))
            key = _ALLOWED_BY[kind].format(name=name)
            if not _is_allowed(key, run.config.resume_allow):
                refused.setdefault(key, []).append(what)
    if refused:
        raise UserError(
            f"{', '.join(what for names in refused.values() for what in names)} changed since {checkpoint.path} was "
            "written, and is not what the run was begun with; put it back as it was, choose another name= for a new run, "
            f"or allow it: resume_allow=[{','.join(refused)}]"
        )
    _say(run.console, [f"changed on resuming: {what}" for what in changed])


def _named(kind: str, name: str) -> str:
    return f"{kind.removesuffix('s')} {name}"


def _is_allowed(key: str, allowed: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def find_best(run: TrainingRun, last: int) -> None:
    """Look for the best step up to the last that counts, where no checkpoint kept which it is."""
    if run.ranks.is_first:
        for entry in run.metrics.read():
            if entry["step"] <= last:
                run.best.see(entry)
    run.best.restore(run.ranks.gather(run.best.state())[0])


def _say(console: Console, lines: Collection[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
