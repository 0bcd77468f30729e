"""Worker processes whose end is noticed, and that end with the job.

`multiprocessing.Pool` waits for ever for a worker that was killed; here its end is an error of the job.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

LOOK = 0.5  # seconds between two looks at the processes of a pool


REQUEUE = 75  # exit status (EX_TEMPFAIL): the same command goes on with what is kept


class Terminated(KeyboardInterrupt):
    """SIGTERM: a scheduler wants the machine back."""


class WorkerError(ChildProcessError):
    """A worker process ended before its work; the message says how, what was kept and what to do."""


@contextmanager
def worker_pool(
    processes: int, safe: str, initializer: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """New interpreters, for functions and arguments that can be pickled.

    safe: a sentence that says what was kept and how to go on. initializer(*arguments) runs first in each worker.
    Workers leave Ctrl-C to this process and end with it, also where it is killed; an error in the block ends them at
    once. Raises WorkerError where one of them ends itself or is killed.
    """
    context, ended = _Context(), threading.Event()
    pool = ProcessPoolExecutor(processes, context, _begin, (initializer, arguments))
    threading.Thread(target=_watch, args=(pool, context, ended), daemon=True).start()
    try:
        yield pool
    except BrokenProcessPool as error:
        pool.shutdown()  # which waits for the others: then all exit codes are known
        raise WorkerError(f"A worker process {ending(context.exit_code)}. {safe}") from error
    except BaseException:
        for process in context.started:
            process.terminate()
        raise
    finally:
        ended.set()
        pool.shutdown(cancel_futures=True)


def _watch(pool: ProcessPoolExecutor, context: "_Context", ended: threading.Event) -> None:
    """Has the pool look at its processes when one of them is gone.

    It waits for those alone that it had when it began to wait, and for results: of the last one that it started it may
    never learn that it was killed. Another task makes it begin anew.
    """
    while not ended.wait(LOOK):
        with suppress(RuntimeError, ValueError):  # the pool is broken or shut down, or a process only about to start
            if wait([process.sentinel for process in context.started], 0):
                pool.submit(_nothing)


def _nothing() -> None:
    """A task."""


def ending(exit_code: int | None) -> str:
    """How a process ended, to follow "A worker process": "was killed by SIGTERM"."""
    if exit_code is None or exit_code >= 0:
        return "ended before its work was done" + (f", with exit status {exit_code}" if exit_code else "")
    name = signal.Signals(-exit_code).name
    why = {
        "SIGKILL": ", as the system does when memory runs out (dmesg says so; use fewer processes then)",
        "SIGBUS": ": a disk or /dev/shm is full, or a file became shorter while it was read",
    }
    return f"was killed by {name}{why.get(name, '')}"


def follow_parent() -> None:
    """Called in a process that `multiprocessing` started: it ends when its parent is gone, however that went."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def out_of_reach_of_ctrl_c() -> Iterator[None]:
    """Processes started in the block never get SIGINT: a terminal sends it to all, and the job answers for all."""
    resource_tracker.ensure_running()  # else `multiprocessing` starts it with the first process, and unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a mask is inherited, also through exec
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    follow_parent()
    if initializer is not None:
        initializer(*arguments)


class _Worker(SpawnProcess):
    def start(self) -> None:
        with out_of_reach_of_ctrl_c():
            super().start()


class _Context(SpawnContext):
    """Knows the processes it started."""

    def __init__(self) -> None:
        self.started: list[_Worker] = []

    def Process(self, *arguments: Any, **options: Any) -> _Worker:  # noqa: N802  the name is the interface's
        self.started.append(_Worker(*arguments, **options))
        return self.started[-1]

    @property
    def exit_code(self) -> int | None:
        """Of the one that ended first; the pool then terminates the others."""
        codes = [process.exitcode for process in self.started]
        unusual = [code for code in codes if code not in (None, 0, -signal.SIGTERM)]
        return next(iter(unusual or codes), None)
