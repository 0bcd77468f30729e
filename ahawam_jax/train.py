"""Trains AHA-WAM.

    python -m ahawam_jax.train --config=configs/demo.py --workdir=DIR [--config.optimizer.learning_rate=1e-4 ...]

Resumes if DIR holds a checkpoint. Ctrl-C saves one and stops. Writes DIR/checkpoints, DIR/metrics.jsonl (a line per
step) and DIR/tensorboard.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from ahawam_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, a file in configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; settings are --config.SECTION.FIELD=VALUE.")
    for name, value in (("config", _CONFIG.value), ("workdir", _WORKDIR.value)):
        if not value:
            raise app.UsageError(f"--{name} is required, for example --config=configs/demo.py --workdir=runs/demo.")
    from ahawam_jax.training.loop import Interrupted, train

    try:
        train(_CONFIG.value, _WORKDIR.value)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except Interrupted as stop:
        sys.exit(str(stop))


if __name__ == "__main__":
    cli.run(main)
