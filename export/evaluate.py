"""Runs an export in closed loop in simulation and prints its success with a 95 % interval.

    ahawam evaluate-export exports/demo --episodes 50

The deployed counterpart of `ahawam evaluate`: the same seeds, the same simulation, the policy of
`export.runtime` in PyTorch, all episodes as one batch.
"""

import argparse
import sys

from absl import logging

from ahawam_jax.evaluation.rollouts import policy_actor, roll_out, table
from data_pipelines.paths import local_path
from data_pipelines.simulation.tasks import TASKS
from export.runtime import DeployedPolicy


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ahawam evaluate-export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    logging.set_verbosity(logging.ERROR)
    parser.add_argument("export", type=local_path, help="folder of ahawam to-torch")
    parser.add_argument("--task", default="transfer_cube", choices=TASKS, help="(default %(default)s)")
    parser.add_argument("--episodes", type=int, default=50, help="unseen seeds 0, 1, ... (default %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="simulation workers (default %(default)s)")
    parser.add_argument("--steps", type=int, help="Euler steps of the executor (default: config.policy.steps)")
    options = parser.parse_args(argv)
    overrides = {} if options.steps is None else {"steps": options.steps}
    try:
        if options.episodes < 1:
            raise ValueError(f"--episodes is {options.episodes}; expected at least 1.")
        policy = DeployedPolicy.load(options.export, **overrides)
        actor = policy_actor(policy, options.task, options.episodes)
        seeds = range(options.episodes)
        result = roll_out("deployed", options.task, seeds, actor, options.processes, None, policy.config.refresh_every)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(", ".join(f"{graph}: {backend}" for graph, backend in policy.backends.items()))
    print(table([result]))
    return 0
