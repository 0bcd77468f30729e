"""Commands of a study, several at a time, each on processors of its own; results are appended line by line.

A command whose line is in the results is never run again, and one that was stopped goes on where it was if it can. So
a study that is killed and started again does what is left.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines import json_lines, keeper
from data_pipelines.disk import writing
from data_pipelines.processes import ending
from data_pipelines.progress import clock

RESULTS = "results.jsonl"
SAFE = "What is finished is kept; the same command goes on."
POLL = 0.5  # seconds between two looks at the jobs
TAIL = 8  # lines of a log that are shown of a job that failed
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """One command, run from ROOT.  key: names its line.  after: keys of the jobs that must be done.  outcome: of a
    file that the command writes, an object that the line takes over; None for none."""

    key: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    outcome: Path | None = None


@dataclass
class _Running:
    job: Job
    place: int
    process: subprocess.Popen
    log: Any
    began: float = field(default_factory=time.monotonic)


class StudyError(RuntimeError):
    """A job failed; the message names it and shows what it said last."""


def run_all(jobs: Sequence[Job], out: Path, say: Callable[[str], None], tell: Callable[[], None]) -> None:
    """Runs the jobs that have no line in out/results.jsonl yet, one on each processor, earlier ones first.

    tell: called whenever a line was added. Raises StudyError for the first job that fails, when those that run beside
    it are done; DiskError where a line cannot be written.
    """
    places = sorted(os.sched_getaffinity(0))
    done = {line["key"] for line in json_lines.read(out / RESULTS)}
    waiting, running = [job for job in jobs if job.key not in done], []
    began, before, failed = time.monotonic(), len(waiting), None
    (out / "logs").mkdir(parents=True, exist_ok=True)
    if len(waiting) < len(jobs):
        say(f"{len(jobs) - len(waiting)} of {len(jobs)} jobs are done, {len(waiting)} to go")
    try:
        while running or (waiting and failed is None):
            free = sorted(set(places) - {one.place for one in running})
            ready = [job for job in waiting if done.issuperset(job.after)]
            for place, job in zip(free, ready if failed is None else (), strict=False):
                waiting.remove(job)
                running.append(_begin(job, place, out))
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                one.log.close()
                try:
                    line = _line(one, out)
                except StudyError as error:
                    failed = error
                    continue
                json_lines.append(out / RESULTS, line, SAFE)
                done.add(one.job.key)
                left, spent = len(waiting) + len(running), time.monotonic() - began
                eta = clock(spent / (before - left) * left)
                say(f"{one.job.key} in {clock(line['seconds'])}; {left} to go, ETA {eta}")
                tell()
            time.sleep(POLL)
    finally:
        for one in running:
            one.process.stdin.close()
        for one in running:
            one.process.wait()
    if failed is not None:
        raise failed


def _begin(job: Job, place: int, out: Path) -> _Running:
    path = _log(job, out)
    with writing(path, SAFE):
        log = path.open("ab")
    ours = (sys.executable, "-m", "ahawam_jax") if job.command[0] == "ahawam" else job.command[:1]
    command = ("taskset", "--cpu-list", str(place), *ours, *job.command[1:])
    return _Running(job, place, keeper.start(command, ROOT, os.environ, log), log)


def _log(job: Job, out: Path) -> Path:
    return out / "logs" / f"{job.key}.log"


def _line(one: _Running, out: Path) -> dict[str, Any]:
    """What is written down of a job that ended. Raises StudyError where it failed."""
    if one.process.returncode:
        path = _log(one.job, out)
        said = [text for text in path.read_text(errors="replace").replace("\r", "\n").splitlines() if text.strip()]
        raise StudyError("\n    ".join(
            [f"{one.job.key} {ending(one.process.returncode)}; {path} ends:", *said[-TAIL:], SAFE]
        ))  # fmt: skip
    line = {
        "key": one.job.key, "command": shlex.join(one.job.command), "commit": commit(),
        "seconds": round(time.monotonic() - one.began, 1),
    }  # fmt: skip
    return line | (json.loads((ROOT / one.job.outcome).read_text()) if one.job.outcome else {})


def commit() -> str | None:
    """Of the code that runs, with a + where it is changed; None where it is no repository."""
    said = [
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    ]
    return said[0] + "+" * bool(said[1]) if said[0] else None
