"""Runs the scripted expert in closed loop, and, where a task has such controls, experts that know less.

    ahawam expert --task react --episodes 100

Of *remember* one that forgets which plate was marked; of *react* some that see the cube so many rows late. What they
lose is what the task needs. Prints their success with 95 % intervals; no policy is needed.
"""

import argparse
import sys

from ahawam_jax.evaluation.experts import CONTROLS, expert_actor
from ahawam_jax.evaluation.rollouts import roll_out, table
from data_pipelines.paths import local_path
from data_pipelines.simulation.tasks import TASKS


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="ahawam expert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, required=True, help="see docs/tasks.md")
    parser.add_argument("--episodes", type=int, default=100, help="seeds 0, 1, ... (default %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="simulation workers (default %(default)s)")
    parser.add_argument("--out", type=local_path, help="folder for videos and contact sheets (default: none)")
    options = parser.parse_args(argv)
    if options.episodes < 1 or options.processes < 1:
        parser.error(
            f"--episodes is {options.episodes} and --processes {options.processes}: expected at least 1 of each"
        )
    seeds, results = range(options.episodes), []
    try:
        for name, knowledge in {"scripted expert": lambda seed: {}, **CONTROLS.get(options.task, {})}.items():
            actor = expert_actor(options.task, seeds, knowledge)
            results.append(roll_out(name, options.task, seeds, actor, options.processes, options.out))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(table(results))
