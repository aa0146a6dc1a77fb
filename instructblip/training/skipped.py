"""Steps that are passed over since their loss or gradient is not finite (`recipe.non_finite=skip`), and too many of them."""

from collections.abc import Sequence

from instructblip.errors import UserError

WINDOW = 100  # steps


class SkippedSteps:
    """The skipped ones of the last `WINDOW` steps, the same on all ranks.

    Args:
        limit: how many there may be. Weights that give no finite loss any more give none ever after.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._steps: list[int] = []

    def add(self, step: int) -> None:
        """Count a step that was skipped.

        Raises:
            UserError: too many of the last ones were.
        """
        self._steps = [*(earlier for earlier in self._steps if earlier > step - WINDOW), step]
        if len(self._steps) > self._limit:
            raise UserError(
                f"{len(self._steps)} of the last {min(step, WINDOW)} steps were skipped, the last {step}, where "
                f"recipe.non_finite_limit={self._limit} allows no more; lower recipe.phases.NAME.learning_rate, look at "
                "the samples that were named, and go on from an older checkpoint with resume=auto"
            )

    def state(self) -> list[int]:
        """What a checkpoint keeps, as plain JSON."""
        return self._steps

    def restore(self, state: Sequence[int]) -> None:
        """Go on counting from a checkpoint's `state`."""
        self._steps = list(state)
