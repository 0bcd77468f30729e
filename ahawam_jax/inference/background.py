"""Where refreshes run while chunks are made: a thread of their own, taking turns where both share a device's queue."""

import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol


class Background(Protocol):
    """What a stream needs of the place where its refreshes run."""

    def begin(self, slices: Iterator[None]) -> None:
        """Runs through slices, beside the caller; the one before has ended or is about to. None of it raises."""

    def wait(self) -> None:
        """Until what was begun has ended."""

    def chunk(self) -> AbstractContextManager[None]:
        """What the executor does in it does not wait for more than the slice that runs."""


class Turns:
    """Of work on a device that does one thing after the other: chunks go first, and never stop a slice."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._chunks = 0  # that are made or wait to be
        self._taken = False

    @contextmanager
    def chunk(self) -> Iterator[None]:
        with self._changed:
            self._chunks += 1
            self._changed.wait_for(lambda: not self._taken)
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._chunks -= 1
                self._give_back()

    @contextmanager
    def slice(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken and not self._chunks)
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._give_back()

    def _give_back(self) -> None:
        self._taken = False
        self._changed.notify_all()


class Beside:
    """A thread for the refreshes of one stream. It ends with the last reference to this."""

    def __init__(self, turns: Turns | None = None) -> None:
        """turns: of all streams whose chunks and refreshes share one queue; None where they do not."""
        self._thread = ThreadPoolExecutor(1, "planner")
        self._turns = turns
        self._running: Future[None] | None = None

    def begin(self, slices: Iterator[None]) -> None:
        self._running = self._thread.submit(_run, slices, self._turns)

    def wait(self) -> None:
        if self._running is not None:
            self._running.result()

    def chunk(self) -> AbstractContextManager[None]:
        return nullcontext() if self._turns is None else self._turns.chunk()


def _run(slices: Iterator[None], turns: Turns | None) -> None:
    ended = object()
    while True:
        with nullcontext() if turns is None else turns.slice():
            if next(slices, ended) is ended:
                return


def finish(slices: Generator[None, None, Any]) -> Any:
    """What a generator returns in the end."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value
