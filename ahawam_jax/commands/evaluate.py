"""Runs a checkpoint in closed loop in simulation and prints its success with a 95 % interval.

    ahawam evaluate RUN --task transfer_cube --episodes 50 [--refresh-every 2] [--no-memory] ...

RUN is a workdir of ahawam train or one of its checkpoints/STEP folders. Settings not given are those of the
run's config.policy. Writes an mp4 and a contact sheet of the first episodes to --out.
"""

import argparse
import sys

from ahawam_jax.commands.flags import add_robot
from data_pipelines.paths import local_path


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="ahawam evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=local_path, help="workdir or checkpoint step")
    p.add_argument("--task", default="transfer_cube", choices=("transfer_cube", "insertion"))
    p.add_argument("--episodes", type=int, default=50, help="unseen seeds 0, 1, ... (default %(default)s)")
    p.add_argument("--processes", type=int, default=2, help="simulation workers (default %(default)s)")
    p.add_argument("--refresh-every", type=int, help="R, executor calls per planner refresh")
    p.add_argument("--steps", type=int, help="Euler steps of the executor")
    p.add_argument("--execute", type=int, help="actions of a chunk to run before the next call")
    for name, text in (("memory", "let the planner remember earlier frames"),
                       ("routing", "adapt the planner context to the newest frame")):  # fmt: skip
        p.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=text)
    add_robot(p)
    p.add_argument("--blank", action="store_true", help="show the policy black images: a control that must fail")
    p.add_argument("--out", type=local_path, help="folder for the video and contact sheet (default WORKDIR/rollouts)")
    return p


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    from ahawam_jax.checkpoints import find_step
    from ahawam_jax.evaluation.rollouts import policy_actor, roll_out, table
    from ahawam_jax.inference.policy import Policy

    names = ("refresh_every", "steps", "execute", "memory", "routing")
    overrides = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    try:
        if options.episodes < 1:
            raise ValueError(f"--episodes is {options.episodes}; expected at least 1.")
        policy = Policy.load(options.run, options.robot, options.dataset, **overrides)
        actor = policy_actor(policy, options.task, options.episodes, options.blank)
        label = ", ".join([options.task] + [f"{k}={v}" for k, v in overrides.items()] + ["blank"] * options.blank)
        out = options.out or find_step(options.run)[0] / "rollouts"  # never in the folder of a step
        result = roll_out(
            label, options.task, range(options.episodes), actor, options.processes, out, policy.config.refresh_every
        )
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(table([result]))
