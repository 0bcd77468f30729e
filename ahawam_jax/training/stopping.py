"""How a run ends before its time: by a signal, or because another process of its job is lost.

A signal reaches some processes of a job, and all have to stop at the same step. So each puts its wish into every step,
the step returns the largest of them (an all-reduce of four bytes), and the host reads it when the next step is under
way, so that no device waits for it. That the clock asks for a save is agreed on likewise.

A lost process is noticed by a connection that breaks, or by jax's coordination service, which misses its signs of
life. The service then aborts the process from a thread of its own, whatever the main thread waits for.
"""

import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipelines.processes import REQUEUE
from data_pipelines.progress import finish_line

NOTHING, SAVE, STOP = range(3)  # wishes; the larger one counts
GRACE = 2.0  # seconds for the other processes to say what they fail of, where all fail alike
# Of what is raised where a collective or a barrier fails: by Gloo, NCCL, the coordination service.
BROKEN = re.compile(r"gloo|nccl|coordination ?service|barrier|socket closed|connection (closed|reset)", re.IGNORECASE)


class Interrupted(Exception):
    """Training stopped on request after saving a checkpoint."""


class LostProcess(Exception):
    """Another process of the job is gone; the message says how that was noticed and what to do."""


class Requests:
    """What is asked of this process: by SIGINT and SIGTERM, while it is entered, to stop; by the clock to save.

    A second signal aborts. What the process was started to ignore, as a job in the background ignores SIGINT, it goes
    on to ignore.

    minutes: between two saves, 0 for no matter how many.
    """

    def __init__(self, minutes: float = 0):
        self.stop, self._seconds = False, 60 * minutes
        self.saved()

    def saved(self) -> None:
        """Lets the clock begin anew."""
        self._since = time.monotonic()

    def votes(self, mesh: Mesh) -> jax.Array:
        """int32 [devices]: what each process wishes, on its own devices of the mesh."""
        late = self._seconds and time.monotonic() - self._since > self._seconds
        wish = np.array([STOP if self.stop else SAVE if late else NOTHING], np.int32)
        everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        return jax.make_array_from_callback((mesh.size,), everywhere, lambda _: wish)

    def __enter__(self) -> "Requests":
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number, handler in self._before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
        finish_line()
        print("stopping within two steps, saving a checkpoint ...", file=sys.stderr, flush=True)


def with_votes(train_step: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """The step that also takes `votes` and returns, as its third, the largest of them."""

    def train_step_with_votes(state: Any, batch: Any, tower: Any, key: jax.Array, votes: jax.Array) -> Any:
        return *train_step(state, batch, tower, key), votes.max()

    return train_step_with_votes


# ------------------------------------------------------------------------------------------------ lost processes
LOST = (
    "Another process of this job is lost{how}. Saved steps are whole: the same command goes on from the newest, on "
    "these hosts or on others, fewer or more."
)
_status: int | None = None  # with which this process is about to end anyway


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    if _status is None:
        said = LOST.format(how=", or process 0 is, which the others need; jax names it above")
        os.write(2, f"error: {said}\n".encode())
    os._exit(_status or REQUEUE)


@contextmanager
def others_may_be_lost() -> Iterator[None]:
    """In a job of several processes: makes a LostProcess of what a collective raises when another process is gone.

    From the first time on, jax's abort for the same reason ends this process with a sentence and the status REQUEUE.
    """
    if jax.process_count() == 1:
        yield
        return
    # Python's own handlers wait for the main thread, which hangs in a collective.
    set_handler = ctypes.CDLL(None).signal
    set_handler.restype = ctypes.c_void_p
    set_handler(signal.SIGABRT, _aborted)
    try:
        yield
    except Exception as error:
        words = next((str(e) for e in _chain(error) if BROKEN.search(str(e))), None)
        if words is None:
            raise
        raise LostProcess(LOST.format(how=f" ({' '.join(words.split())[:200]})")) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def end(status: int, message: str) -> NoReturn:
    """Ends this process with a message, without waiting for the others of its job, which may wait for this one."""
    global _status
    _status = status
    finish_line()
    print(message, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        time.sleep(GRACE)
        os._exit(status)
    sys.exit(status)
