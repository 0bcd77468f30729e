"""What the loop must know of each step, read when the next one is under way, so that no device waits for the host."""

from collections.abc import Callable

import jax

from ahawam_jax.training.stopping import SAVE, STOP


class Watch:
    """Of the steps read so far: what the processes agreed on, and how many were skipped.

    stop: all stop here.  save: the clock of one of them asks for a save.  skipped: steps skipped in a row up to the
    newest one that was read.
    """

    def __init__(self, most: int, tell: Callable[[int], None]):
        """most: steps skipped in a row until the run ends.  tell: is called with the number of a skipped step."""
        self.stop, self.save, self.skipped = False, False, 0
        self._most, self._tell = most, tell
        self._unread: list[tuple[int, jax.Array, jax.Array]] = []

    def add(self, step: int, request: jax.Array, skipped: jax.Array) -> None:
        """Takes what a step returned, and reads that of the steps before.

        Raises FloatingPointError where as many as are allowed were skipped in a row.
        """
        self.catch_up()
        self._unread.append((step, request, skipped))

    def catch_up(self) -> None:
        """Waits for the newest step and reads it. Raises like `add`."""
        unread, self._unread = self._unread, []
        for step, *told in unread:
            request, skipped = jax.device_get(told)
            self.stop |= request == STOP
            self.save |= request == SAVE
            self.skipped = self.skipped + 1 if skipped else 0
            if skipped:
                self._tell(step)
            if self.skipped == self._most:
                raise FloatingPointError(
                    f"The loss or its gradient was not finite in {self._most} steps in a row, the last of them "
                    f"{step}; all were skipped, the parameters are those of step {step - self._most}. Lower "
                    "config.optimizer.learning_rate, or look at the data of these steps; config.train.max_bad_steps "
                    "is how many may be skipped."
                )
