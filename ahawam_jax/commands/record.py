"""Records demonstrations of the scripted expert.

    ahawam record --task transfer_cube --episodes 200 --out data/transfer_cube
"""

import argparse
import math
import sys

from data_pipelines.paths import local_path
from data_pipelines.recording.record import record
from data_pipelines.simulation.env import FPS
from data_pipelines.simulation.rendering import check_rendering
from data_pipelines.simulation.tasks import TASKS


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="ahawam record",
        description="Record demonstrations of the scripted expert as a LeRobot v3.0 dataset: 14-D states and "
        f"actions, three camera views, {FPS} frames a second. Failed attempts are left out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--task", choices=TASKS, required=True, help="see docs/tasks.md")
    parser.add_argument("--episodes", type=int, default=200, help="demonstrations to keep")
    parser.add_argument("--out", type=local_path, required=True, help="folder of the dataset; must not exist yet")
    parser.add_argument("--processes", type=int, default=2, help="episodes recorded at a time")
    parser.add_argument(
        "--noise", type=float, default=0.01, help="disturbance of the joints while recording, rad (standard deviation)"
    )
    parser.add_argument("--seed0", type=int, default=1000, help="first seed; evaluation uses 0 to 999")
    parser.add_argument(
        "--randomise", action="store_true", help="an episode each, another light, table, place of the cameras, clutter"
    )
    arguments = parser.parse_args(argv)
    for name, least in (("episodes", 1), ("processes", 1), ("noise", 0), ("seed0", 0)):
        if not least <= getattr(arguments, name) < math.inf:  # NaN is neither
            parser.error(f"--{name} is {getattr(arguments, name)}: expected a number, at least {least}")
    if problem := check_rendering():
        sys.exit(problem)
    try:
        record(**vars(arguments))
    except (ValueError, OSError, RuntimeError) as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        print("the same command goes on with the episodes that are missing", file=sys.stderr)
        raise
