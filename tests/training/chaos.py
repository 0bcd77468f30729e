"""Kills and stops a tiny training of several processes again and again, and compares what comes out.

    python -m tests.training.chaos [--kills 20 --stops 20 --processes 2 --seed 0]      (make chaos)

Each time some processes, one or all, get SIGKILL or SIGTERM: so many steps after the job began, or while
a checkpoint is being written. Then all of them must end by themselves within a minute, the newest checkpoint must be
whole, no more than one interval between two saves lost (none by SIGTERM), and no process be left. At last the run goes
on to its end, which must equal that of an uninterrupted one in every number.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tests.conftest  # noqa: F401  before jax: what the processes find in their environment
from ahawam_jax.checkpoints import Checkpoints
from ahawam_jax.training.stopping import REQUEUE
from tests.data_pipelines import tiny_dataset
from tests.training.jobs import TRAIN, start_job

INTERVAL, VALIDATE, STEPS_EACH = 8, 12, 16  # steps: between saves, between validations, of the run for each blow
MINUTE, PATIENCE = 60.0, 300.0  # seconds: until all have ended after a blow, until the first step


@dataclass
class Blow:
    """What was done to a job and what came of it."""

    signal: signal.Signals
    victims: list[int]
    moment: str  # "steps", or "save" while one was being written
    done: int  # steps that were logged
    newest: int  # checkpoint afterwards, 0 for none
    seconds: float  # until all processes had ended
    statuses: list[int]
    complaints: list[str]

    def __str__(self) -> str:
        to = "all" if len(self.victims) == len(self.statuses) else ",".join(map(str, self.victims))
        return (
            f"{self.signal.name:8s}{to:6s}{self.moment:8s}{self.done:6d}{self.newest:8d}{self.done - self.newest:6d}"
            f"{self.seconds:9.1f}  {' '.join(map(str, self.statuses)):12s}{'; '.join(self.complaints)}"
        )


HEAD = "signal  to    during    step  newest  lost  seconds  statuses"


def last_step(workdir: Path) -> int:
    """The last step in metrics.jsonl, 0 for none."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def being_written(workdir: Path) -> list[int]:
    """Steps of which a save is under way, or was when its process ended."""
    return [int(path.name.partition(".")[0]) for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")]


def wait_for(condition, job: list[subprocess.Popen]) -> bool:
    """Until it holds; False where a process ends or nothing happens."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end or any(process.poll() is not None for process in job):
            return False
        time.sleep(0.005)
    return True


def end_all(job: list[subprocess.Popen], seconds: float) -> tuple[list[int], list[str]]:
    """Exit statuses and outputs, of processes that do not end by themselves after a SIGKILL."""
    end, outputs = time.monotonic() + seconds, []
    for process in job:
        try:
            outputs.append(process.communicate(timeout=max(0.1, end - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            process.kill()
            outputs.append(process.communicate()[0] + "\n(left behind)")
    return [process.returncode for process in job], outputs


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


def strike(random: random.Random, number: signal.Signals, processes: int, workdir: Path, flags: list[str]) -> Blow:
    """Starts the job, lets it train for a while, strikes, and looks at what is left."""
    job = start_job(processes, 1, *TRAIN, f"--workdir={workdir}", *flags)
    before = Checkpoints(workdir).latest or 0
    victims = random.choice([[random.randrange(processes)], list(range(processes))])
    steps, writing = before + random.randint(1, 2 * INTERVAL), random.random() < 0.4
    complaints = []
    if not wait_for(lambda: last_step(workdir) >= steps and (not writing or being_written(workdir)), job):
        complaints.append("it ended or stood still before it was struck")
    time.sleep(random.uniform(0, 0.05 if writing else 0.3))
    moment = "save" if being_written(workdir) else "steps"
    began = time.monotonic()
    for victim in victims:
        job[victim].send_signal(number)
    statuses, outputs = end_all(job, MINUTE)
    seconds, done, newest = time.monotonic() - began, last_step(workdir), Checkpoints(workdir).latest or 0
    if any("(left behind)" in output for output in outputs):
        complaints.append("a process was left behind")
    expected = [-number if number == signal.SIGKILL and k in victims else REQUEUE for k in range(processes)]
    if statuses != expected:
        complaints.append(f"statuses were expected to be {expected}")
    lost = done - newest if number == signal.SIGTERM else min([*being_written(workdir), done]) - newest
    if lost > (0 if number == signal.SIGTERM else INTERVAL):
        complaints.append("too much is lost")
    complaints += damage(workdir) if newest else []
    blow = Blow(number, victims, moment, done, newest, seconds, statuses, complaints)
    if complaints:
        print(*outputs, sep="\n---\n", file=sys.stderr)
    return blow


def result(workdir: Path) -> tuple[list[str], dict]:
    """Every number of a run that is done: each step's metrics, and of the last checkpoint the sums of all arrays."""
    checkpoints = Checkpoints(workdir)
    return (workdir / "metrics.jsonl").read_text().splitlines(), checkpoints.restore_run(checkpoints.latest)["arrays"]


def run(kills: int, stops: int, processes: int, seed: int, folder: Path) -> int:
    """Prints the table; returns the number of complaints."""
    choice = random.Random(seed)
    blows = [signal.SIGKILL] * kills + [signal.SIGTERM] * stops
    choice.shuffle(blows)
    tiny_dataset.write_dataset(folder / "dataset")
    flags = [
        f"--config.data.path={folder / 'dataset'}", f"--config.data.cache={folder / 'cache'}",
        f"--config.mesh.data={processes}", "--config.mesh.fsdp=1",
        f"--config.train.steps={STEPS_EACH * (1 + len(blows))}", f"--config.train.checkpoint_every={INTERVAL}",
        f"--config.train.validate_every={VALIDATE}",
    ]  # fmt: skip
    statuses, outputs = end_all(start_job(processes, 1, *TRAIN, f"--workdir={folder / 'whole'}", *flags), 4 * PATIENCE)
    if any(statuses):
        print(*outputs, sep="\n---\n", file=sys.stderr)
        return 1
    print(f"{processes} processes, a save every {INTERVAL} steps, {kills} SIGKILL, {stops} SIGTERM", flush=True)
    print(HEAD, flush=True)
    struck, workdir = [], folder / "struck"
    for number in blows:
        struck.append(strike(choice, number, processes, workdir, flags))
        print(struck[-1], flush=True)
    statuses, outputs = end_all(start_job(processes, 1, *TRAIN, f"--workdir={workdir}", *flags), 4 * PATIENCE)
    equal = not any(statuses) and result(workdir) == result(folder / "whole")
    if not equal:
        print(*outputs, sep="\n---\n", file=sys.stderr)
    complaints = sum(len(blow.complaints) for blow in struck)
    killed = [blow for blow in struck if blow.signal == signal.SIGKILL]
    print(
        f"{len(struck)} blows, {sum(blow.moment == 'save' for blow in struck)} of them during a save: at most "
        f"{max((blow.done - blow.newest for blow in killed), default=0)} steps lost by SIGKILL, all ended within "
        f"{max(blow.seconds for blow in struck):.0f} s, {complaints} complaints; the result "
        f"{'equals' if equal else 'DIFFERS FROM'} that of the uninterrupted run"
    )
    return complaints + (not equal)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 20), ("stops", 20), ("processes", 2), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="ahawam-chaos-") as folder:
        return min(1, run(options.kills, options.stops, options.processes, options.seed, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
