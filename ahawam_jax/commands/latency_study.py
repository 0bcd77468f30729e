"""What latency costs: success and jerk in closed loop, where the simulation does not wait for the policy.

    ahawam latency-study RUN [RUN ...] --out runs/latency_study [--task transfer_cube] [--quick]

RUN is a workdir of ahawam train or one of its checkpoints/STEP folders; give one trained without delays
(configs/demo.py) and one with (configs/demo_delay.py), or one trained with offsets between planner and chunk and one
without (far.full and far_aligned.full of configs/baselines.py). Every cell is a hand-over at a latency of the chunks,
or a latency of the plans with and without routing. Latency is injected in simulated time. Every finished cell is a
line of OUT/results.jsonl; the same command goes on where it was, and writes OUT/table.md and OUT/figure.svg.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from data_pipelines import json_lines
from data_pipelines.paths import local_path


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="ahawam latency-study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", nargs="+", type=local_path, metavar="RUN", help="workdir or checkpoint step")
    p.add_argument("--task", default="transfer_cube", help="of the simulation (default %(default)s)")
    p.add_argument("--out", type=local_path, required=True, help="folder of the results")
    p.add_argument("--quick", action="store_true", help="50 episodes a cell and fewer latencies, instead of 200")
    p.add_argument("--hand-overs", nargs="+", metavar="NAME", help="those to measure, such as wait (default: all)")
    p.add_argument("--episodes", type=int, help="unseen seeds 0, 1, ... of every cell")
    p.add_argument("--processes", type=int, default=2, help="simulation workers (default %(default)s)")
    return p


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    from ahawam_jax.experiments.latency_page import figure, table
    from ahawam_jax.experiments.latency_study import FULL, QUICK, RESULTS
    from ahawam_jax.inference.handover import HAND_OVERS
    from data_pipelines.simulation.tasks import TASKS

    size = QUICK if options.quick else FULL
    if options.episodes is not None:
        size = dataclasses.replace(size, episodes=options.episodes)
    try:
        if options.task not in TASKS:
            raise ValueError(f"--task is {options.task!r}; expected one of {', '.join(TASKS)}.")
        if size.episodes < 1:
            raise ValueError(f"--episodes is {size.episodes}; expected at least 1.")
        if unknown := sorted(set(options.hand_overs or ()) - set(HAND_OVERS)):
            raise ValueError(f"--hand-overs names {', '.join(unknown)}; expected some of {', '.join(HAND_OVERS)}.")
        names = [_name(path) for path in options.runs]
        if len(set(names)) < len(names):
            raise ValueError(f"The runs are called {', '.join(names)}; give folders of different names.")
        options.out.mkdir(parents=True, exist_ok=True)
        _run(options, dict(zip(names, options.runs, strict=True)), size)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    lines = json_lines.read(options.out / RESULTS)
    (options.out / "table.md").write_text(table(lines) + "\n")
    (options.out / "figure.svg").write_text(figure(lines))
    print(table(lines))
    print(f"\n{options.out / 'figure.svg'}")


def _name(path: Path) -> str:
    """What a run is called: its folder, or the one above where that says nothing."""
    parts = [part for part in path.resolve().parts if part not in ("run", "checkpoints") and not part.isdigit()]
    return parts[-1]


def _run(options: argparse.Namespace, runs: dict[str, Path], size) -> None:  # noqa: ANN001
    """Measures every cell that has no line yet."""
    from ahawam_jax.experiments.latency_study import RESULTS, ROW_MS, cells, measure
    from ahawam_jax.inference.handover import HAND_OVERS
    from ahawam_jax.inference.policy import Policy

    before = {line["key"]: line for line in json_lines.read(options.out / RESULTS)}
    for line in before.values():
        if (line["task"], len(line["success"])) != (options.task, size.episodes):
            raise ValueError(
                f"{options.out} holds {len(line['success'])} episodes of {line['task']} a cell, asked for are "
                f"{size.episodes} of {options.task}; give another --out."
            )
    policies: dict[tuple[str, bool], Policy] = {}
    for cell in cells(list(runs), size, options.hand_overs or tuple(HAND_OVERS)):
        if cell.key in before:
            continue
        key = cell.run, cell.routing
        if key not in policies:
            policies[key] = Policy.load(runs[cell.run], routing=cell.routing)
        try:
            HAND_OVERS[cell.hand_over].check(policies[key], cell.latency // ROW_MS)
        except ValueError as error:
            print(f"left out: {cell.key}. {error}", flush=True)
            continue
        began = time.monotonic()
        line = measure(policies[key], options.task, cell, size.episodes, options.processes)
        json_lines.append(options.out / RESULTS, line, "The cells before are kept; the same command goes on.")
        took = time.monotonic() - began
        print(f"{cell.key}: {sum(line['success'])} of {size.episodes} ({took:.0f} s)", flush=True)
