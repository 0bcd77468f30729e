"""No job waits for a worker that is gone, and no worker outlives its job."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import psutil
import pytest

from data_pipelines.processes import WorkerError, _Context, ending, worker_pool
from tests.conftest import REPOSITORY

SAFE = "What was done is kept."


def kill_yourself(number: int) -> int:
    os.kill(os.getpid(), number)
    time.sleep(60)
    return number


def leave(status: int) -> None:
    os._exit(status)


def test_the_last_worker_that_was_started_is_watched_too() -> None:
    """Nothing else happens that would make the pool look: the other task goes on and on."""
    for _ in range(4):  # the pool alone overlooks it about every other time
        with pytest.raises(WorkerError, match="SIGKILL"), worker_pool(2, SAFE) as pool:
            pool.submit(time.sleep, 300)
            pool.submit(kill_yourself, signal.SIGKILL).result(60)


def fail(number: int) -> int:
    raise ValueError(f"number {number}")


@pytest.mark.parametrize(
    ("function", "argument", "words"),
    [
        (kill_yourself, signal.SIGKILL, "was killed by SIGKILL, as the system does when memory runs out"),
        (kill_yourself, signal.SIGTERM, "was killed by SIGTERM"),
        (kill_yourself, signal.SIGBUS, "was killed by SIGBUS: a disk or /dev/shm is full"),
        (leave, 0, "ended before its work was done"),
        (leave, 3, "ended before its work was done, with exit status 3"),
    ],
)
def test_the_end_of_a_worker_is_an_error(function, argument: int, words: str) -> None:
    before = set(multiprocessing.active_children())  # those that another test left to the collector are not this one's
    with pytest.raises(WorkerError, match=f"^A worker process {words}.*{SAFE}$"), worker_pool(2, SAFE) as pool:
        pool.submit(function, argument).result(60)
    assert set(multiprocessing.active_children()) <= before


def test_an_error_ends_the_others_at_once() -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(ValueError, match="number 3"), worker_pool(2, SAFE) as pool:
        other = pool.submit(time.sleep, 300)
        pool.submit(fail, 3).result(60)
    assert set(multiprocessing.active_children()) <= before and isinstance(other.exception(), BrokenProcessPool)


def reached_by_ctrl_c(seconds: float) -> tuple[int, bool]:
    time.sleep(seconds)  # so that each worker has one
    return os.getpid(), signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_ctrl_c_is_the_job_s_alone() -> None:
    """From a worker's first moment on, its imports included."""
    with worker_pool(2, SAFE) as pool:
        answers = dict(pool.map(reached_by_ctrl_c, [0.3] * 4))
    assert len(answers) == 2 and not any(answers.values())
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])  # here it is as before


@pytest.mark.parametrize(("codes", "first"), [((-15, -9, -15), -9), ((-15, -15), -15), ((0, 3), 3), ((None, 0), None)])
def test_the_one_that_ended_first_is_told(codes: tuple, first: int | None) -> None:
    """The others are terminated for its sake."""
    context = _Context()
    context.started = [SimpleNamespace(exitcode=code) for code in codes]
    assert context.exit_code == first


def test_how_a_process_ended() -> None:
    assert ending(None) == "ended before its work was done"
    assert ending(-signal.SIGSEGV) == "was killed by SIGSEGV"


JOB = """
import os, time
from data_pipelines.processes import worker_pool
if __name__ == "__main__":
    with worker_pool(2, "kept") as pool:
        print(*{pool.submit(os.getpid).result() for _ in range(20)}, flush=True)
        pool.submit(time.sleep, 300).result()
"""


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_job(tmp_path, signal_: int) -> None:
    """SIGINT goes to all of them, as from a terminal, and is told once."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    # A job started in the background would hand down that SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        job = subprocess.Popen(
            [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    with job:
        workers = [psutil.Process(int(pid)) for pid in job.stdout.readline().split()]
        if signal_ == signal.SIGINT:
            os.killpg(job.pid, signal_)
        else:
            job.send_signal(signal_)
        errors = job.communicate(timeout=60)[1]
        assert not psutil.wait_procs(workers, timeout=60)[1]
        assert job.returncode == -signal_ and workers
        assert errors.count("Traceback") == (signal_ == signal.SIGINT)
