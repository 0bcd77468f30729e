"""Evaluations over devices, which go on where they were stopped.

A line of results.jsonl is a finished evaluation, or one that gave no number and why; the first kind is never run
again. Whatever ends the scheduler, its jobs end with it (keeper.py), and the lines that are there stay.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from ahawam_jax.evaluation.robotwin.evaluators import Evaluator
from ahawam_jax.evaluation.robotwin.jobs import Job, ResultError, episodes_done, read_result
from data_pipelines import json_lines, keeper
from data_pipelines.disk import whole_file, writing
from data_pipelines.processes import ending

RESULTS, MANIFEST = "results.jsonl", "manifest.json"
TRIES = 2  # of a job, in one run of the scheduler
HOPELESS = 3  # jobs that fail before any gives a number: then the setting is at fault, not the task
POLL = 1.0  # seconds between two looks at the jobs
TAIL = 5  # lines of a log that are shown of a job that failed
SAFE = "What is finished is kept; the same command goes on."


class RunError(ValueError):
    """A folder that cannot be gone on with, or a run that makes no sense to go on; the message says why."""


@dataclass
class Running:
    """A job at a place."""

    job: Job
    slot: int
    gpu: str
    process: Any
    log: IO[bytes]
    began: float
    episodes: int = 0
    moved: float = 0.0  # when the last episode was over
    stopped: bool = False


def read_lines(out: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl. Raises RunError."""
    try:
        return json_lines.read(out / RESULTS)
    except ValueError as error:
        raise RunError(str(error)) from error


def finished(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Of each (task, config, repeat) that gave a number its line."""
    return {(line["task"], line["config"], line["repeat"]): line for line in lines if "successes" in line}


def settle_manifest(out: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, or compares it with that of the run that is gone on with. Raises RunError.

    Machines may be others, and are listed then; so may tasks and configurations, and more repeats.
    """
    path = out / MANIFEST
    if path.exists():
        before = json.loads(path.read_text())
        ours = json.loads(json.dumps(manifest))
        free = {"devices", "tasks", "configs", "seeds", "first_scenes", "servers"}
        fixed = sorted((before.keys() | ours.keys()) - free)
        wrong = [key for key in fixed if before.get(key) != ours.get(key)]
        wrong += ["seeds"] * (before["seeds"][0] != ours["seeds"][0])
        if wrong:
            found = "; ".join(f"{key} was {_brief(before.get(key))}, is {_brief(ours.get(key))}" for key in wrong)
            raise RunError(f"{out} was begun with others: {found}. Name another folder, or restore what it was.")
        new = [devices for devices in ours["devices"] if devices not in before["devices"]]
        manifest = {**manifest, "devices": before["devices"] + new}
    with writing(path, SAFE), whole_file(path) as partial:
        partial.write_text(json.dumps(manifest, indent=2) + "\n")


def _brief(value: Any) -> str:
    return json.dumps(value)[:200]


class Scheduler:
    """Runs jobs, at most one at a place, and writes down what came out."""

    def __init__(
        self, evaluator: Evaluator, out: Path, gpus: Sequence[str], per_gpu: int, stalled: float,
        say: Callable[[str], None], finished: Callable[[], None],
    ) -> None:  # fmt: skip
        """stalled: seconds without a finished episode until a job counts as hung.  finished: called after each job
        that gave a number."""
        self._evaluator, self._out, self._stalled, self._say, self._tell = evaluator, out, stalled, say, finished
        self._places = [(slot, gpu) for slot, gpu in enumerate(gpu for _ in range(per_gpu) for gpu in gpus)]
        self._running: list[Running] = []
        self._done = 0
        for name in ("logs", "args"):
            (out / name).mkdir(parents=True, exist_ok=True)

    def run(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Runs all of them; of each that gave no number, why. Raises RunError where the first ones all fail.

        Two repeats of the same evaluation never run at once: the evaluators name their folders by the second.
        """
        waiting, tries, failed = list(jobs), dict.fromkeys(jobs, 0), {}
        with self._ending():
            while waiting or self._running:
                for slot, gpu in self._free():
                    job = next((job for job in waiting if not self._busy(job)), None)
                    if job is not None:
                        waiting.remove(job)
                        tries[job] += 1
                        self._begin(job, slot, gpu)
                for running in [running for running in self._running if self._over(running)]:
                    self._running.remove(running)
                    why = self._take(running)
                    if why is None:
                        failed.pop(running.job.name, None)
                    else:
                        failed[running.job.name] = why
                        if not self._done and len(failed) >= HOPELESS:
                            raise RunError(f"the first {len(failed)} evaluations gave no number, so none is begun any "
                                           f"more; the last: {why}")  # fmt: skip
                        if tries[running.job] < TRIES:
                            waiting.append(running.job)
                if self._running:
                    time.sleep(POLL)
        return failed

    def _free(self) -> list[tuple[int, str]]:
        taken = {running.slot for running in self._running}
        return [place for place in self._places if place[0] not in taken]

    def _busy(self, job: Job) -> bool:
        return any((other.job.task, other.job.config) == (job.task, job.config) for other in self._running)

    @contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        finally:
            for running in self._running:
                running.process.stdin.close()
            for running in self._running:
                running.process.wait()
                running.log.close()

    def _begin(self, job: Job, slot: int, gpu: str) -> None:
        variables = self._evaluator.variables(job, gpu, self._out / "args")
        log = self._log(job).open("wb")
        process = keeper.start(self._evaluator.command(job, gpu, slot), self._evaluator.checkout, variables, log)
        now = time.monotonic()
        self._running.append(Running(job, slot, gpu, process, log, now, moved=now))
        self._say(f"{job.name} begins on GPU {gpu}")

    def _log(self, job: Job) -> Path:
        return self._out / "logs" / f"{job.name}.log"

    def _over(self, running: Running) -> bool:
        """Whether a job has ended; one that hangs is ended."""
        if running.process.poll() is not None:
            return True
        episodes = episodes_done(self._log(running.job).read_text(errors="replace"))
        if episodes > running.episodes:
            running.episodes, running.moved = episodes, time.monotonic()
        if time.monotonic() - running.moved > self._stalled and not running.stopped:
            running.process.stdin.close()
            running.stopped = True
        return False

    def _take(self, running: Running) -> str | None:
        """Writes the line of a job that ended; why it gave no number, None where it did."""
        running.log.close()
        job, path = running.job, self._log(running.job)
        line = {**asdict(job), "gpu": running.gpu, "seconds": round(time.monotonic() - running.began, 1)}
        log = path.read_text(errors="replace")
        try:
            if running.stopped:
                raise ResultError(f"no episode was over for {self._stalled / 60:g} minutes after the first "
                                  f"{running.episodes}, so it was ended")  # fmt: skip
            if running.process.returncode:
                raise ResultError(f"its process {ending(running.process.returncode)}")
            line |= read_result(log, self._evaluator.checkout, self._evaluator.episodes)
        except ResultError as error:
            line["failed"] = str(error)
        json_lines.append(self._out / RESULTS, line, SAFE)
        if "failed" in line:
            shown = [text for text in log.replace("\r", "\n").splitlines() if text.strip()][-TAIL:]
            self._say("\n    ".join([f"{job.name} gave no number: {line['failed']}; {path} ends:", *shown]))
            return f"{job.name}: {line['failed']} ({path})"
        self._done += 1
        self._say(f"{job.name}: {line['successes']} of {line['episodes']}")
        self._tell()
        return None
