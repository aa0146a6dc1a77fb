"""What of a suite is evaluated, settled before a model is loaded: its cards, their modes, what is not there."""

from collections.abc import Callable, Sequence

from instructblip.config.schema import Missing, Mode, SuiteConfig
from instructblip.data.cards import Card
from instructblip.data.prepare.command import FoundShards
from instructblip.errors import UserError
from instructblip.evaluation.protocol import Task, unfit
from instructblip.evaluation.results_file import NotEvaluated

ALONE = "; or evaluate the others alone: suite.missing=skip"


def check_suite(suite: SuiteConfig, cards: Sequence[Card]) -> None:
    """Refuse a suite whose cards, held-in and held-out together, are not each another dataset.

    Raises:
        UserError: names the one that comes twice.
    """
    names = [card.name for card in cards]
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise UserError(f"suite {suite.name} names {twice[0]} twice; name it once")


def check_answers(cards: Sequence[Card], answers: str | None) -> None:
    """Refuse one list of answers for cards that rank different ones.

    Args:
        cards: of the suite.
        answers: place of the list, where one is given.

    Raises:
        UserError: names the cards.
    """
    lists = {
        card.name: card.evaluation.answer_list for card in cards if card.evaluation and card.evaluation.answer_list
    }
    if answers is not None and len(set(lists.values())) > 1:
        raise UserError(f"{', '.join(lists)} rank lists of their own, and answers= gives one; evaluate them one by one")


def fitting_modes(
    cards: Sequence[Card], mode: Mode | None, *, preset: str, llm_kind: str
) -> tuple[dict[str, Mode | None], str]:
    """The mode that each card of a suite is evaluated in, by name: the given one where it can be had, else the card's own.

    Returns:
        None for the card's own; and a line about the cards that cannot have the given one, if there are any.

    Raises:
        UserError: none of them can have it.
    """
    reasons = {card.name: unfit(card, mode, preset=preset, llm_kind=llm_kind) if mode else "" for card in cards}
    without = [name for name, reason in reasons.items() if reason]
    if without and len(without) == len(cards):
        raise UserError(reasons[without[0]])
    modes = {name: None if reason else mode for name, reason in reasons.items()}
    note = f"mode={mode} cannot be had of {', '.join(without)}: evaluated as the card says" if without else ""
    return modes, note


def split_missing(
    cards: Sequence[Card], found: FoundShards, missing: Missing, *needed_anyway: str
) -> tuple[list[Card], list[NotEvaluated]]:
    """The cards that can be evaluated, and those that are not prepared.

    Args:
        cards: of the suite.
        found: what was found of them, and of other datasets.
        missing: what one that is not prepared does.
        needed_anyway: names of other cards that the run cannot do without.

    Raises:
        UserError: all that are missing, by name: one of the suite where that stops, or all of it; or one that is needed.
    """
    lacking = [card.name for card in cards if card.name in found.missing]
    needed = [name for name in needed_anyway if name in found.missing]
    if needed or (lacking and missing == "stop"):
        raise found.refusal(hint=ALONE if lacking and not needed else "")
    if lacking and len(lacking) == len(cards):
        raise found.refusal()
    absent = [NotEvaluated(name, "missing", str(found.refusal(name))) for name in lacking]
    return [card for card in cards if card.name not in lacking], absent


def make_tasks(
    cards: Sequence[Card], make: Callable[[Card], Task], missing: Missing
) -> tuple[list[Task], list[NotEvaluated]]:
    """The tasks of a suite, and the cards that none can be made of.

    Args:
        cards: of the suite.
        make: makes a task of a card.
        missing: what such a card does: `stop` the whole, all of them named, or `skip`.

    Raises:
        UserError: as said; not one task can be made.
    """
    tasks, absent = [], []
    for card in cards:
        try:
            tasks.append(make(card))
        except UserError as error:
            absent.append(NotEvaluated(card.name, "failed", str(error)))
    if absent and (missing == "stop" or not tasks):
        raise UserError("; ".join(item.reason for item in absent))
    return tasks, absent
