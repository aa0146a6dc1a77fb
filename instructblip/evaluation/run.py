"""The work of evaluate.py: restore a model, run a suite of cards, write the results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from instructblip.config.schema import EvaluateConfig
from instructblip.config.validate import to_dict
from instructblip.data.cards import Card, load_cards
from instructblip.data.prepare.command import Needed, find_shards
from instructblip.data.synthetic import NOTE
from instructblip.distributed import Ranks, choose_device
from instructblip.errors import UserError
from instructblip.evaluation.journal import claimed, refuse_others_results, replaced_results
from instructblip.evaluation.precision import check_held, check_precision
from instructblip.evaluation.protocol import Task, make_task, needed_splits, refuse_unable
from instructblip.evaluation.results_file import NotEvaluated
from instructblip.evaluation.suite import evaluate_tasks, finish_evaluation, image_reader, log_scores, refuse_failed
from instructblip.evaluation.suite_tasks import check_answers, check_suite, fitting_modes, make_tasks, split_missing
from instructblip.fetch.parts import cache_folder
from instructblip.models.fingerprint import fingerprint_tensors
from instructblip.tracking import check_loggers, make_loggers
from instructblip.weights.load import LoadedModel, find_source, frozen_fingerprints, load_model


def evaluate(config: EvaluateConfig, console: Console) -> None:
    """Evaluate as configured. Everything that may be wrong is checked before a model is loaded.

    Raises:
        UserError: no such checkpoint, card, split or device; unreadable shards; another evaluation's folder; disk full; or,
            once the others' results are written, a dataset that failed.
    """
    ranks = Ranks.from_environment()
    if not ranks.is_first:
        console = Console(quiet=True)
    cards = load_cards([*config.suite.held_in, *config.suite.held_out])
    check_suite(config.suite, cards)
    folder, tracker = Path(config.output) / config.name, config.logger
    if ranks.is_first:
        check_loggers(tracker.kind, mode=tracker.mode, project=tracker.project, folder=folder)
    source = find_source(config.checkpoint, config.llm)
    device = choose_device(ranks.device(config.device))
    check_precision(config.precision, device)
    tasks, absent, shards = _plan(cards, config, source.llm_kind or "decoder", console)
    refuse_unable(tasks, source.skills, str(source.path))
    with claimed(folder, ranks) as ranks:
        refuse_others_results(folder, str(source.path), tasks, adapter=config.adapter)
        for line in replaced_results(folder, tasks):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        loaded = load_model(
            source,
            llm=config.llm,
            vision_path=config.vision_path,
            qformer_path=config.qformer_path,
            adapter=config.adapter,
            device=str(device),
        )
        check_held(config.precision, loaded.model)
        _refuse_untrained(loaded, allowed=config.allow_untrained)
        refuse_others_results(
            folder,
            loaded.source,
            tasks,
            adapter=config.adapter,
            llm=loaded.parts["llm"].name if "llm" in loaded.parts else None,
        )
        failed = _evaluate(config, loaded, tasks, absent, shards, folder, ranks, console)
    refuse_failed([item for item in (*absent, *failed) if item.why == "failed"], folder, "the same command")


def _plan(
    cards: Sequence[Card], config: EvaluateConfig, llm_kind: str, console: Console
) -> tuple[list[Task], list[NotEvaluated], Path]:
    """What is evaluated, what is not, and the folder of the shards."""
    rules: dict[str, Any] = {"preset": config.preset, "llm_kind": llm_kind}
    check_answers(cards, config.answers)
    modes, note = fitting_modes(cards, config.mode, **rules)
    if note:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    needed = [Needed(card, needed_splits(card, split=config.split, mode=modes[card.name], **rules)) for card in cards]
    found = find_shards(needed, config.data, console)
    present, missing = split_missing(cards, found, config.suite.missing)

    def make(card: Card) -> Task:
        return make_task(
            card,
            found.folder,
            split=config.split,
            samples=config.samples,
            mode=modes[card.name],
            withhold_images=config.withhold_images,
            rerank=config.rerank,
            normalize=config.normalize,
            include_eos=config.include_eos,
            precision=config.precision,
            answers=None if config.answers is None else Path(config.answers),
            **rules,
        )

    tasks, failed = make_tasks(present, make, config.suite.missing)
    return tasks, [*missing, *failed], found.folder


def _refuse_untrained(loaded: LoadedModel, *, allowed: bool) -> None:
    """Scores of a model that cannot see say nothing of its parts, and look like any others in a table."""
    if loaded.standing.untrained and not allowed:
        untrained = ", ".join(loaded.standing.untrained)
        beside = f" with llm={loaded.parts['llm'].name}" if "llm" in loaded.parts else ""
        raise UserError(
            f"{untrained} of {loaded.name}{beside} was never trained; "
            f"train it first (train.py init_from={loaded.source}), or evaluate it as it is with allow_untrained=true"
        )


def _evaluate(
    config: EvaluateConfig,
    loaded: LoadedModel,
    tasks: Sequence[Task],
    absent: Sequence[NotEvaluated],
    shards: Path,
    folder: Path,
    ranks: Ranks,
    console: Console,
) -> list[NotEvaluated]:
    """Run the tasks, and write and log the results; to the first rank, the tasks that failed."""
    # A cache of features has no place for images that cannot be read, and its features are those of float32's products.
    cached = config.data.cache_features and not config.tolerance and config.precision == "fp32"
    cache = cache_folder() / "features" if cached else None
    model = loaded.model
    weights: dict[str, Any] = {
        "frozen": frozen_fingerprints(model),
        "trained": fingerprint_tensors(model.held_state()),
    }
    results, failed = evaluate_tasks(
        model,
        tasks,
        image_reader(model, tasks, cache),
        shards=shards,
        folder=folder,
        batch_size=config.batch_size,
        blind=config.blind_baseline and not config.withhold_images,
        **weights,
        tolerance=config.tolerance,
        ranks=ranks,
    )
    if not ranks.is_first:
        return []
    finish_evaluation(
        model,
        results,
        folder,
        title=f"{config.suite.name} with {loaded.name}{NOTE if config.data.synthetic else ''}",
        checkpoint=loaded.source,
        adapter=loaded.adapter,
        step=loaded.step,
        parts=loaded.parts,
        **weights,
        standing=loaded.standing,
        examples=config.examples,
        console=console,
        not_evaluated=[*absent, *failed],
    )
    logger = make_loggers(
        config.logger.kind,
        mode=config.logger.mode,
        project=config.logger.project,
        name=config.name,
        folder=folder,
        config=to_dict(config),
    )
    log_scores(logger, results, loaded.step, samples=config.logger.samples)
    logger.finish()
    return failed
