"""Trains the paper's variants on simulated tasks and measures them: which mechanism helps where.

    ahawam ablation --out=runs/ablation [--quick]

Records each task, trains each variant, measures each, all as commands of their own, one on each processor. Every
command that is done has a line in OUT/results.jsonl and is not run again: after Ctrl-C or kill -9 the same command
goes on. Writes results.md and its figures into --page after every line.
--only names cells to run, with what they need; --list prints all cells with their commands and runs nothing.
"""

import argparse
import dataclasses
import fnmatch
import json
import shlex
import sys
from pathlib import Path

from ahawam_jax.experiments.ablation import FULL, QUICK, Cell, Size, cells, record_command, trainings
from ahawam_jax.experiments.figures import write
from ahawam_jax.experiments.running import RESULTS, ROOT, SAFE, Job, StudyError, run_all
from data_pipelines import json_lines
from data_pipelines.disk import whole_file, writing
from data_pipelines.ownership import OwnedError, owned
from data_pipelines.paths import local_path
from data_pipelines.progress import say


def jobs_of(out: Path, size: Size) -> list[Job]:
    """All jobs, in the order in which they are begun."""
    found = [Job(f"record.{task}", record_command(out, size, task)) for task in size.tasks]
    for training in trainings(size):
        after = f"record.{training.task}" if training.teacher is None else f"train.{Cell(training.teacher).key()}"
        first = Job(f"train.{Cell(training).key()}", training.command(out, size), (after,))
        found.append(first)
        for cell in cells(training, size):
            outcome = out / "cells" / f"{cell.key()}.json"
            found.append(Job(cell.key(), cell.command(out, size), (first.key,), outcome))
    return found


def settle(out: Path, size: Size) -> None:
    """Writes the size of a study into its folder, or raises ValueError where it was begun with another."""
    path, ours = out / "size.json", json.loads(json.dumps(dataclasses.asdict(size)))
    if not path.exists():
        with writing(path, SAFE), whole_file(path) as partial:
            partial.write_text(json.dumps(ours) + "\n")
    elif (before := json.loads(path.read_text())) != ours:
        raise ValueError(f"{out} was begun with {before}, not with {ours}; name another folder.")


def chosen(jobs: list[Job], patterns: list[str]) -> list[Job]:
    """The jobs whose keys fit one of the patterns, and those that they need. Raises ValueError where none fits."""
    by_key = {job.key: job for job in jobs}
    wanted = {key for key in by_key if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)}
    if not wanted:
        raise ValueError(f"--only {' '.join(patterns)} fits no cell; ahawam ablation --list names them.")
    left = list(wanted)
    while left:
        needed = by_key[left.pop()].after
        left += set(needed) - wanted
        wanted |= set(needed)
    return [job for job in jobs if job.key in wanted]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="ahawam ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=local_path, required=True, help="folder of datasets, runs and results")
    parser.add_argument("--page", type=local_path, help="folder of results.md (default: OUT)")
    parser.add_argument("--quick", action="store_true", help="two tasks, two or three variants of each, fewer steps")
    parser.add_argument("--only", nargs="+", metavar="CELL", help="cells to run, * and ? stand for anything")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args(argv)
    size, out = QUICK if options.quick else FULL, options.out.absolute()
    try:
        # Commands run from the project's folder, and are noted as one would type them there.
        jobs = jobs_of(out.relative_to(ROOT) if out.is_relative_to(ROOT) else out, size)
        if options.only:
            jobs = chosen(jobs, options.only)
        if options.list:
            print("\n".join(f"{job.key}\n    {shlex.join(job.command)}" for job in jobs))
            return
        def tell() -> None:
            write(options.page or out, {line["key"]: line for line in json_lines.read(out / RESULTS)}, size)

        with owned(out):
            settle(out, size)
            run_all(jobs, out, say, tell)
            tell()
    except (StudyError, OwnedError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"all done: {(options.page or out) / 'results.md'}")
