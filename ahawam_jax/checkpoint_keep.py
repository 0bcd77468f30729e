"""Which checkpoints of a run are kept."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
    """Which steps are kept: the `newest`, for good every one that `every` divides, and the `best` by their error.

    0 for `every` and `best` keeps none for that reason.
    """

    newest: int = 2
    every: int = 0
    best: int = 0

    def choose(self, errors: Mapping[int, float | None]) -> set[int]:
        """Of steps with their validation errors, None where there was no validation, those to keep."""
        steps = sorted(errors)
        rated = sorted((error, -step) for step, error in errors.items() if error is not None)
        return (
            {*steps[-self.newest :]}
            | {step for step in steps if self.every and step % self.every == 0}
            | {-step for _, step in rated[: self.best]}
        )


NEWEST_TWO = Keep()
