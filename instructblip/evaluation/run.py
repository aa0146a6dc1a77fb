"""The work of evaluate.py: restore a model, run a suite of cards, write the results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from instructblip.config import entry
from instructblip.config.schema import EvaluateConfig
from instructblip.config.validate import to_dict
from instructblip.data.cards import load_cards
from instructblip.data.prepare.command import shards_folder
from instructblip.data.synthetic import NOTE
from instructblip.distributed import Ranks, choose_device
from instructblip.evaluation.journal import claimed, refuse_others_results
from instructblip.evaluation.protocol import Task, make_task
from instructblip.evaluation.suite import evaluate_tasks, finish_evaluation, image_reader, log_scores
from instructblip.fetch.parts import cache_folder
from instructblip.models.fingerprint import fingerprint_tensors
from instructblip.tracking import make_logger
from instructblip.weights.load import LoadedModel, find_source, frozen_fingerprints, load_model


def main() -> None:
    """The command: `evaluate.py` and `instructblip-evaluate`."""
    entry.main("evaluate", EvaluateConfig, evaluate)


def evaluate(config: EvaluateConfig, console: Console) -> None:
    """Evaluate as configured. Everything that may be wrong is checked before a model is loaded.

    Raises:
        UserError: no such checkpoint, card, split or device; unreadable shards; another evaluation's folder; disk full.
    """
    names = (*config.suite.held_in, *config.suite.held_out)
    ranks = Ranks.from_environment()
    if not ranks.is_first:
        console = Console(quiet=True)
    cards = load_cards(names)
    source = find_source(config.checkpoint, config.llm)
    device = str(choose_device(ranks.device(config.device)))
    shards = shards_folder(cards, config.data, console)
    tasks = [
        make_task(
            card,
            shards,
            split=config.split,
            samples=config.samples,
            mode=config.mode,
            withhold_images=config.withhold_images,
            preset=config.preset,
            llm_kind=source.llm_kind,
        )
        for card in cards
    ]
    folder = Path(config.output) / config.name
    with claimed(folder, ranks):
        refuse_others_results(folder, str(source.path), tasks)
        loaded = load_model(
            source, llm=config.llm, vision_path=config.vision_path, qformer_path=config.qformer_path, device=device
        )
        refuse_others_results(folder, loaded.source, tasks, llm=loaded.parts["llm"].name)
        _evaluate(config, loaded, tasks, shards, folder, ranks, console)


def _evaluate(
    config: EvaluateConfig,
    loaded: LoadedModel,
    tasks: Sequence[Task],
    shards: Path,
    folder: Path,
    ranks: Ranks,
    console: Console,
) -> None:
    """Run the tasks, and write and log the results."""
    # A cache of features has no place for images that cannot be read.
    cache = cache_folder() / "features" if config.data.cache_features and not config.tolerance else None
    weights: dict[str, Any] = {
        "frozen": frozen_fingerprints(loaded.model),
        "trained": fingerprint_tensors(loaded.model.held_state()),
    }
    results = evaluate_tasks(
        loaded.model,
        tasks,
        image_reader(loaded.model, tasks, cache),
        shards=shards,
        folder=folder,
        batch_size=config.batch_size,
        blind=config.blind_baseline and not config.withhold_images,
        **weights,
        tolerance=config.tolerance,
        ranks=ranks,
    )
    if not ranks.is_first:
        return
    finish_evaluation(
        loaded.model,
        results,
        folder,
        title=f"{config.suite.name} with {loaded.name}{NOTE if config.data.synthetic else ''}",
        checkpoint=loaded.source,
        step=loaded.step,
        parts=loaded.parts,
        **weights,
        examples=config.examples,
        console=console,
    )
    logger = make_logger(
        config.logger.kind,
        mode=config.logger.mode,
        project=config.logger.project,
        name=config.name,
        folder=folder,
        config=to_dict(config),
    )
    log_scores(logger, results, loaded.step)
    logger.finish()
