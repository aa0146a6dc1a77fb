"""evaluate.py's work: restore a model, run a suite of cards, write the results."""

from pathlib import Path

from rich.console import Console

from instructblip.build import frozen_fingerprints
from instructblip.config import EvaluateConfig, check_at_least, to_dict
from instructblip.data.cards import load_card
from instructblip.data.synthetic import NOTE
from instructblip.evaluation.distributed import this_worker
from instructblip.evaluation.protocol import make_task
from instructblip.evaluation.results import log_scores
from instructblip.evaluation.suite import evaluate_tasks, finish_evaluation, image_reader, llm_kind
from instructblip.loading import load_model
from instructblip.prepared import shards_folder
from instructblip.training.loggers import make_logger
from instructblip.weights.assets import cache_folder


def evaluate(config: EvaluateConfig, console: Console) -> None:
    """Run evaluate.py with a validated configuration.

    Raises:
        UserError: no such checkpoint, card, split or device; unreadable shards; disk full.
    """
    check_at_least(1, {"samples": config.samples, "batch_size": config.batch_size})
    check_at_least(0, {"examples": config.examples, "tolerance": config.tolerance})
    worker = this_worker()
    if not worker.is_first:
        console = Console(quiet=True)
    cards = [load_card(name) for name in (*config.suite.held_in, *config.suite.held_out)]
    loaded = load_model(
        config.checkpoint,
        llm=config.llm,
        vision_path=config.vision_path,
        qformer_path=config.qformer_path,
        device=worker.device(config.device),
    )
    folder = Path(config.output) / config.name
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
            llm_kind=llm_kind(loaded.model),
        )
        for card in cards
    ]
    # A cache of features has no place for images that cannot be read.
    cache = cache_folder() / "features" if config.data.cache_features and not config.tolerance else None
    frozen = frozen_fingerprints(loaded.model)
    results = evaluate_tasks(
        loaded.model,
        tasks,
        image_reader(loaded.model, tasks, cache),
        shards=shards,
        folder=folder,
        batch_size=config.batch_size,
        blind=config.blind_baseline and not config.withhold_images,
        frozen=frozen,
        tolerance=config.tolerance,
        worker=worker,
    )
    if not worker.is_first:
        return
    finish_evaluation(
        loaded.model,
        results,
        folder,
        title=f"{config.suite.name} with {loaded.name}{NOTE if config.data.synthetic else ''}",
        checkpoint=loaded.source,
        step=loaded.step,
        parts=loaded.parts,
        frozen=frozen,
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
