"""Runs a checkpoint in closed loop in simulation and prints its success with a 95 % interval.

    ahawam evaluate RUN --task transfer_cube --episodes 50 [--refresh-every 2] [--no-memory] ...

RUN is a workdir of ahawam train or one of its checkpoints/STEP folders. Settings not given are those of the
run's config.policy. Writes an mp4 and a contact sheet of the first episodes to --out; --json takes the stage that each
episode reached, in the order of the seeds, and a hash of the run's config.
"""

import argparse
import hashlib
import json
import sys

from ahawam_jax.commands.flags import add_robot
from data_pipelines.disk import whole_file, writing
from data_pipelines.paths import local_path
from data_pipelines.simulation.tasks import TASKS


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="ahawam evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=local_path, help="workdir or checkpoint step")
    p.add_argument("--task", default="transfer_cube", choices=TASKS, help="see docs/tasks.md (default %(default)s)")
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
    p.add_argument("--randomise", action="store_true", help="scenes of another look, a seed each, see docs/tasks.md")
    p.add_argument("--json", type=local_path, help="file for what came of each episode")
    p.add_argument("--out", type=local_path, help="folder for the video and contact sheet (default WORKDIR/rollouts)")
    return p


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    from ahawam_jax.checkpoints import Checkpoints, find_step
    from ahawam_jax.evaluation.rollouts import policy_actor, roll_out, table
    from ahawam_jax.inference.policy import Policy

    names = ("refresh_every", "steps", "execute", "memory", "routing")
    overrides = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    try:
        if options.episodes < 1:
            raise ValueError(f"--episodes is {options.episodes}; expected at least 1.")
        policy = Policy.load(options.run, options.robot, options.dataset, **overrides)
        actor = policy_actor(policy, options.task, options.episodes, options.blank)
        asked = [f"{name}={value}" for name, value in overrides.items()]
        asked += [name for name in ("blank", "randomise") if getattr(options, name)]
        label = ", ".join([options.task, *asked])
        out = options.out or find_step(options.run)[0] / "rollouts"  # never in the folder of a step
        result = roll_out(
            label, options.task, range(options.episodes), actor, options.processes, out, policy.config.refresh_every,
            options.randomise,
        )  # fmt: skip
        if options.json:
            workdir, step = find_step(options.run)
            config = json.dumps(Checkpoints(workdir).restore_run(step)["config"], sort_keys=True)
            outcome = result.outcome() | {"config": hashlib.sha256(config.encode()).hexdigest()[:12]}
            with writing(options.json, "The films are written."):
                options.json.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(options.json) as partial:
                    partial.write_text(json.dumps(outcome) + "\n")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(table([result]))
