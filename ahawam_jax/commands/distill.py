"""Distils the executor of a trained policy into a sampler of a few steps (Flash).

    ahawam distill --config=configs/demo_flash.py --workdir=DIR [--config.init=POLICY ...]

POLICY is a workdir of ahawam train or one of its checkpoint steps. Planner, router and towers are frozen. The executor
learns from the policy's own trajectories of 16 steps (--config.distillation.method=teacher), or so that one of its
steps ends where two of half the size do (self); ahawam_jax/training/distillation.py states both. Each validation
prints the mean distance to the undistilled policy's chunks of 16 steps, in 1, 2 and 4 steps, distilled and not.

Otherwise it is ahawam train: it takes its flags, resumes, stops and saves as it does. What comes out is an ordinary
checkpoint, with config.policy.steps of 2.
"""

from absl import app

from ahawam_jax.commands import train
from ahawam_jax.commands.flags import CONFIG, WORKDIR, require, run_with_flags


def _distill(argv: list[str]) -> None:
    require(argv, CONFIG, WORKDIR)
    if "distillation" not in CONFIG.value:
        raise app.UsageError(
            "--config has no section distillation; take one that has, as configs/demo_flash.py, or ahawam train."
        )
    train.run(argv)


def main(argv: list[str] | None = None) -> None:
    run_with_flags(_distill, argv)
