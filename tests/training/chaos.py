"""Kills and stops a tiny training of several processes again and again, and compares what comes out.

    python -m tests.training.chaos [--kills 20 --stops 20 --processes 2 --workers 0 --seed 0]      (make chaos)

Each time some processes, one or all, get SIGKILL or SIGTERM: between two saves, while a save is being written, or
during a validation. Then all of them, and the processes that load their data, must end by themselves within a minute,
with the status that says so; the newest checkpoint must be whole; no more than one interval between two saves may be
lost, and nothing by SIGTERM. The processes share a folder of compiled programs, which is struck as well. At last the
run goes on to its end, which must equal that of an uninterrupted one in every number. Exits with 1 where anything of
this does not hold.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tests.conftest  # noqa: F401  before jax: what the processes find in their environment
from ahawam_jax.checkpoints import Checkpoints
from ahawam_jax.compilation_cache import FOLDER, SHORTEST
from data_pipelines.processes import REQUEUE
from data_pipelines.progress import clock
from tests.data_pipelines import tiny_dataset
from tests.training.jobs import TRAIN, start_job

INTERVAL, VALIDATE, STEPS_EACH = 4, 6, 7  # steps: between saves, between validations, of the run for a blow
MINUTE, PATIENCE = 60.0, 300.0  # seconds: until all have ended after a blow, until the moment to strike has come
MOMENTS = ("step", "save", "validation")
MARK = "AHAWAM_CHAOS"  # an environment variable, by which all processes of a job are found


@dataclass
class Blow:
    """What was done to a job and what came of it."""

    signal: signal.Signals
    victims: list[int]
    moment: str = ""  # one of MOMENTS, as it was when the signal was sent
    done: int = 0  # steps that were logged
    newest: int = 0  # checkpoint afterwards, 0 for none
    seconds: float = 0.0  # until all processes had ended
    statuses: list[int] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        to = "all" if len(self.victims) == len(self.statuses) else ",".join(map(str, self.victims))
        return (
            f"{self.signal.name:8s}{to:5s}{self.moment:11s}{self.done:5d}{self.newest:8d}{self.done - self.newest:6d}"
            f"{self.seconds:9.1f}  {' '.join(map(str, self.statuses)):10s}{'; '.join(self.complaints)}"
        )


HEAD = "signal  to   during      step  newest  lost  seconds  statuses"


class Job:
    """Processes that train into a workdir, and what can be seen of them from outside."""

    def __init__(self, processes: int, workdir: Path, flags: Sequence[str], folder: Path):
        """folder: for what the processes say."""
        self.workdir, self._began = workdir, time.time()
        self.outputs = [folder / f"{number}.txt" for number in range(processes)]
        self._mark = f"{MARK}={folder}:{self._began}"
        name, _, value = self._mark.partition("=")
        self.processes = start_job(
            processes, 1, *TRAIN, f"--workdir={workdir}", *flags, outputs=self.outputs,
            **{name: value, FOLDER: str(folder / "compiled"), SHORTEST: "0.1"},
        )  # fmt: skip

    def done(self) -> int:
        """The last step in metrics.jsonl, 0 before this job has begun to train."""
        begun = "rows to train" in self.outputs[0].read_text()  # it has cut off what is behind its checkpoint
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if begun and path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def being_written(self) -> list[int]:
        """Steps of which this job is writing a save, or was when it ended."""
        found = (self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")
        return [int(path.name.partition(".")[0]) for path in found if _changed(path) > self._began]

    def moment(self) -> str:
        """What it is at, one of MOMENTS. A validation begins when its step is logged, and its result is said."""
        if self.being_written():
            return "save"
        step = self.done()
        if step == 0 or step % VALIDATE:
            return "step"
        return "step" if f"step {step}: open-loop error" in self.outputs[0].read_text() else "validation"

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Until it holds; False where a process ends or nothing happens."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end or any(process.poll() is not None for process in self.processes):
                return False
            time.sleep(0.01)
        return True

    def end(self, seconds: float) -> tuple[list[int], list[str]]:
        """Exit statuses of processes that end by themselves, and complaints of those that a SIGKILL ends."""
        end, complaints = time.monotonic() + seconds, []
        while time.monotonic() < end and (self._alive() or any(p.poll() is None for p in self.processes)):
            time.sleep(0.05)
        if left := self._alive():
            complaints.append(f"{len(left)} processes were left behind")
            for process in left:
                os.kill(process, signal.SIGKILL)
        return [process.wait() for process in self.processes], complaints

    def _alive(self) -> list[int]:
        """All processes that were started with the mark, by these or by those that they started."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self._mark.encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:  # another user's, or gone
                continue
        return found

    def said(self) -> str:
        return "\n---\n".join(path.read_text() for path in self.outputs)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_ctime
    except FileNotFoundError:
        return 0.0


def damage(workdir: Path) -> list[str]:
    """What is wrong with the newest checkpoint; every array of it is read."""
    checkpoints, found = Checkpoints(workdir), []
    try:
        for item in checkpoints.restore_run(checkpoints.latest)["arrays"]:
            for _ in checkpoints.read_all(checkpoints.latest, item):
                pass
    except ValueError as error:
        found.append(str(error))
    return found


def strike(choice: random.Random, number: signal.Signals, job: Job) -> Blow:
    """Lets the job train for a while, strikes, and looks at what is left."""
    processes = len(job.processes)
    blow = Blow(number, choice.choice([[choice.randrange(processes)], list(range(processes))]))
    steps = (Checkpoints(job.workdir).latest or 0) + choice.randint(1, 2 * INTERVAL)
    wanted = choice.choice(MOMENTS)
    if not job.wait_for(lambda: job.done() >= steps and job.moment() == wanted):
        blow.complaints.append("it ended or stood still before it was struck")
    time.sleep(choice.uniform(0, 0.3 if wanted == "step" else 0.03))
    blow.moment, began = job.moment(), time.monotonic()
    for victim in blow.victims:
        job.processes[victim].send_signal(number)
    blow.statuses, left = job.end(MINUTE)
    blow.seconds, blow.done, blow.newest = time.monotonic() - began, job.done(), Checkpoints(job.workdir).latest or 0
    expected = [-number if number == signal.SIGKILL and k in blow.victims else REQUEUE for k in range(processes)]
    if blow.statuses != expected:
        left.append(f"statuses were expected to be {expected}")
    if number == signal.SIGTERM:
        too_much = blow.newest != blow.done
    else:  # the steps since a save began that was being written are lost besides
        too_much = min([*job.being_written(), blow.done]) - blow.newest > INTERVAL
    if too_much:
        left.append("too much is lost")
    blow.complaints += left + (damage(job.workdir) if blow.newest else [])
    return blow


def result(workdir: Path) -> tuple[list[str], dict]:
    """Every number of a run that is done: each step's metrics, and of the last checkpoint the sums of all arrays."""
    checkpoints = Checkpoints(workdir)
    return (workdir / "metrics.jsonl").read_text().splitlines(), checkpoints.restore_run(checkpoints.latest)["arrays"]


def run(kills: int, stops: int, processes: int, workers: int, seed: int, folder: Path) -> int:
    """Prints a line per blow and the verdict; returns the number of complaints."""
    choice, began = random.Random(seed), time.monotonic()
    numbers = [signal.SIGKILL] * kills + [signal.SIGTERM] * stops
    choice.shuffle(numbers)
    tiny_dataset.write_dataset(folder / "dataset")
    flags = [
        f"--config.data.path={folder / 'dataset'}", f"--config.data.cache={folder / 'cache'}",
        f"--config.data.workers={workers}", f"--config.mesh.fsdp={processes}", "--config.mesh.data=1",
        f"--config.train.steps={STEPS_EACH * (3 + len(numbers))}", f"--config.train.checkpoint_every={INTERVAL}",
        f"--config.train.validate_every={VALIDATE}",
    ]  # fmt: skip
    print(f"{processes} processes, a save every {INTERVAL} steps, a validation every {VALIDATE}\n{HEAD}", flush=True)
    blows, workdir, whole = [], folder / "struck", folder / "whole"
    for count, number in enumerate(numbers, 1):
        job = Job(processes, workdir, flags, folder)
        blows.append(strike(choice, number, job))
        spent = time.monotonic() - began
        print(f"{blows[-1]}   {count}/{len(numbers)} ETA {clock(spent / count * (len(numbers) - count))}", flush=True)
        if blows[-1].complaints:
            print(job.said(), file=sys.stderr, flush=True)
    print("now to its end, and once more without a blow", flush=True)
    finished = all(finishes(processes, place, flags, folder) for place in (workdir, whole))
    equal = finished and result(workdir) == result(whole)
    complaints = sum(len(blow.complaints) for blow in blows) + (not equal)
    print(verdict(blows, equal, complaints), flush=True)
    return complaints


def finishes(processes: int, workdir: Path, flags: Sequence[str], folder: Path) -> bool:
    """Whether the run, left alone, gets to its end."""
    job = Job(processes, workdir, flags, folder)
    statuses, complaints = job.end(4 * PATIENCE)
    if any(statuses) or complaints:
        print(f"the run did not finish: {statuses} {complaints}\n{job.said()}", file=sys.stderr, flush=True)
    return not (any(statuses) or complaints)


def verdict(blows: Sequence[Blow], equal: bool, complaints: int) -> str:
    """The table of blows by signal and moment, and what came of all."""
    counts = Counter((blow.signal, len(blow.victims) > 1, blow.moment) for blow in blows)
    lines = ["", "blows during       " + "".join(f"{moment:>12s}" for moment in MOMENTS)]
    for number in (signal.SIGKILL, signal.SIGTERM):
        for everyone in (False, True):
            name = f"{number.name} to {'all' if everyone else 'one'}"
            lines.append(f"{name:19s}" + "".join(f"{counts[number, everyone, moment]:12d}" for moment in MOMENTS))
    for number in (signal.SIGKILL, signal.SIGTERM):
        lost = max((blow.done - blow.newest for blow in blows if blow.signal == number), default=0)
        lines.append(f"most steps lost by {number.name}: {lost} (a save every {INTERVAL})")
    lines += [
        f"longest until all had ended: {max((blow.seconds for blow in blows), default=0):.1f} s",
        f"the finished run {'equals' if equal else 'DIFFERS FROM'} the uninterrupted one",
        f"{'FAILED' if complaints else 'passed'}: {len(blows)} blows, {complaints} complaints",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 20), ("stops", 20), ("processes", 2), ("workers", 0), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="ahawam-chaos-") as folder:
        return min(1, run(**vars(options), folder=Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
