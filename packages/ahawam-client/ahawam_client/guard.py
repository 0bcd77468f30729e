"""What stands between a policy and motors: limits of each joint, how far it may go in a step, and sentences."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


class GuardError(ValueError):
    """A command that must not be sent; the message says why."""


@dataclass(frozen=True)
class Guard:
    """Of a robot's n numbers, in its own order and units.

    labels: their names.  lower, upper: [n], positions that are allowed.  step: [n], the most that a number may change
    from one command to the next.  jump: [n], how far the first command may be from where the robot is.
    """

    labels: Sequence[str]
    lower: np.ndarray
    upper: np.ndarray
    step: np.ndarray
    jump: np.ndarray

    def __post_init__(self) -> None:
        """Raises GuardError for limits that are none."""
        for name in ("lower", "upper", "step", "jump"):
            values = np.broadcast_to(np.asarray(getattr(self, name), np.float64), (len(self.labels),))
            if not np.isfinite(values).all() or (name in ("step", "jump") and not (values > 0).all()):
                raise GuardError(f"{name} is {values.tolist()}; expected {len(self.labels)} finite numbers"
                                 f"{', more than 0' if name in ('step', 'jump') else ''}.")  # fmt: skip
            object.__setattr__(self, name, values)
        wrong = [label for label, low, high in zip(self.labels, self.lower, self.upper, strict=True) if not low < high]
        if wrong:
            raise GuardError(f"the lower limit of {', '.join(wrong)} is not below the upper one.")

    def start(self, command: np.ndarray, state: np.ndarray) -> np.ndarray:
        """The first command: [n], clipped as others. Raises GuardError where it is too far from the robot's state."""
        self._require_finite(command)
        far = np.abs(np.clip(command, self.lower, self.upper) - state) > self.jump
        if far.any():
            places = np.flatnonzero(far)
            said = ", ".join(f"{self.labels[i]} is at {state[i]:.3f}, to go to {command[i]:.3f}" for i in places)
            raise GuardError(
                f"the first command is too far from where the robot is: {said}. Move it to where the recordings "
                "begin, and look whether units and order of the joints are theirs."
            )
        return self.limit(command, state)[0]

    def limit(self, command: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
        """A command within the limits and within a step of the last one: [n], and names of what was changed.

        Raises GuardError for one that is not finite.
        """
        self._require_finite(command)
        allowed = np.clip(command, self.lower, self.upper)
        allowed = np.clip(allowed, last - self.step, last + self.step)
        changed = np.abs(allowed - command) > 1e-6
        return allowed, tuple(self.labels[i] for i in np.flatnonzero(changed))

    def _require_finite(self, command: np.ndarray) -> None:
        if not np.isfinite(command).all():
            wrong = [label for label, value in zip(self.labels, command, strict=True) if not np.isfinite(value)]
            raise GuardError(f"a command has no number for {', '.join(wrong)}.")
