"""Trains AHA-WAM.

    ahawam train --config=configs/demo.py --workdir=DIR [--config.optimizer.learning_rate=1e-4 ...]

Resumes if DIR holds a checkpoint, on the data it was trained on: what has changed of them is named, and only
--accept-changed-data goes on with it. Ctrl-C saves a checkpoint and stops. Writes DIR/checkpoints, DIR/metrics.jsonl
(a line per step) and DIR/tensorboard.
"""

import sys

from absl import flags

from ahawam_jax.commands.flags import CONFIG, WORKDIR, require, run_with_flags

ACCEPT = flags.DEFINE_bool("accept-changed-data", False, "Resume although the data have changed, and record how.")


def _train(argv: list[str]) -> None:
    require(argv, CONFIG, WORKDIR)
    from ahawam_jax.training.loop import Interrupted, train

    try:
        train(CONFIG.value, WORKDIR.value, ACCEPT.value)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except Interrupted as stop:
        sys.exit(str(stop))


def main(argv: list[str] | None = None) -> None:
    run_with_flags(_train, argv)
