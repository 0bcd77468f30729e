"""What the loop must know of each step, read when the next one is under way, so that no device waits for the host."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from ahawam_jax.training.stopping import SAVE, STOP
from data_pipelines.disk import writing
from data_pipelines.loader import Source, windows_of_batch
from data_pipelines.progress import say
from data_pipelines.windows import WindowConfig

SKIPPED = "skipped_steps.jsonl"  # in the workdir: a line per skipped step, with all windows of its batch
SHOWN = 8  # windows of a batch that are named on stdout


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
                    "config.optimizer.learning_rate, or look at their data, named in skipped_steps.jsonl; "
                    "config.train.max_bad_steps is how many may be skipped."
                )


def tell_skipped(
    workdir: Path, step: int, sources: Sequence[Source], windows: WindowConfig, batch_size: int, seed: int, safe: str
) -> None:
    """Says that a step was skipped and names its batch, of which process 0 writes every window to SKIPPED."""
    found = [
        (str(sources[source].dataset.root), *window)
        for source, *window in windows_of_batch(sources, windows, batch_size, seed, step - 1)
    ]
    shown = "; ".join(f"{root} episode {episode} row {row}" for root, episode, row, _ in found[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    say(f"step {step} is skipped: its loss or gradient is not finite. Its windows, see {SKIPPED}: {shown}{more}")
    if jax.process_index() == 0:
        path = workdir / SKIPPED
        with writing(path, safe), path.open("a") as file:
            keys = ("dataset", "episode", "row", "offset")
            file.write(json.dumps({"step": step, "windows": [dict(zip(keys, w, strict=True)) for w in found]}) + "\n")
