"""A profile of a few steps of a run."""

from pathlib import Path
from typing import Any

import jax

from ahawam_jax.training.goodput import Goodput
from data_pipelines.progress import say


def parse_window(text: str) -> tuple[int, int] | None:
    """First and last step of "100:105"; None of nothing. Anything else is a ValueError."""
    if not text:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(f"--profile is {text!r}, expected FIRST:LAST, the steps to profile, as in 100:105.")
    return int(first), int(last)


class Profile:
    """Traces the devices of process 0 from the beginning of one step to the end of another, into a folder."""

    def __init__(self, window: tuple[int, int] | None, folder: Path, goodput: Goodput):
        self._window = window if jax.process_index() == 0 else None
        self._folder, self._goodput, self._running = folder, goodput, False

    def before(self, step: int) -> None:
        """To be called before a step."""
        if self._window and step == self._window[0]:
            with self._goodput.spent("profile"):
                jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, outputs: Any) -> None:
        """To be called when a step is under way; of the last one it waits for the outputs."""
        if self._running and step == self._window[1]:
            jax.block_until_ready(outputs)
            self.__exit__()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        """Writes what there is."""
        if self._running:
            self._running = False
            with self._goodput.spent("profile"):
                jax.profiler.stop_trace()
            first, last = self._window
            say(f"profile of steps {first} to {last}: {self._folder}; tensorboard and xprof show it")
