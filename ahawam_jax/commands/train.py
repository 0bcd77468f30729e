"""Trains AHA-WAM.

    ahawam train --config=configs/demo.py --workdir=DIR [--config.optimizer.learning_rate=1e-4 ...]

Resumes if DIR holds a checkpoint, on the data it was trained on: what has changed of them is named, and only
--accept-changed-data goes on with it. Ctrl-C and SIGTERM save a checkpoint and stop. Writes DIR/checkpoints,
DIR/metrics.jsonl (a line per step), DIR/tensorboard and DIR/goodput.json (where the time went); a crash leaves
DIR/crash.json.
--wandb=PROJECT shows the scalars there, too; --profile=100:105 traces these steps into DIR/profile.

Started by srun, mpirun, as a GKE JobSet or on every worker of a TPU-VM, the processes make up one job by themselves.
Elsewhere each is told: --coordinator=HOST:PORT --process=0 --processes=4, or JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID
and JAX_NUM_PROCESSES.

Exit status: 0 when all steps are done; 75 when the same command is to be started again, as after a signal or where
another process of the job is lost; 130 when stopped by Ctrl-C before the first step or by a second signal; 1 for what
it cannot go on with.
"""

import os
import signal
import sys
import traceback

from absl import flags

from ahawam_jax.commands.flags import CONFIG, WORKDIR, require, run_with_flags
from data_pipelines.processes import REQUEUE, Terminated

ACCEPT = flags.DEFINE_bool("accept-changed-data", False, "Resume although the data have changed, and record how.")

COORDINATOR = flags.DEFINE_string("coordinator", None, "Of a job of several processes: host:port of process 0.")
PROCESS = flags.DEFINE_integer("process", None, "Number of this process in the job, from 0.")
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes the job has.")

PROFILE = flags.DEFINE_string("profile", "", "FIRST:LAST, steps to profile into WORKDIR/profile.")
WANDB = flags.DEFINE_string("wandb", "", "Project of Weights & Biases that shows the scalars, too.")


def run(argv: list[str]) -> None:
    """Trains as the flags say; ends the process with the status that the module's text lists."""
    require(argv, CONFIG, WORKDIR)
    import jax

    from ahawam_jax.planning.mfu import work
    from ahawam_jax.training.clusters import find_job
    from ahawam_jax.training.hosts import join
    from ahawam_jax.training.loop import train
    from ahawam_jax.training.metrics import Monitoring
    from ahawam_jax.training.profiling import parse_window
    from ahawam_jax.training.stopping import Interrupted, LostProcess, end

    try:
        join(find_job(os.environ, COORDINATOR.value, PROCESS.value, PROCESSES.value))
        monitoring = Monitoring(
            parse_window(PROFILE.value), WANDB.value, lambda config: work(config, jax.devices()[0].device_kind)
        )
        train(CONFIG.value, WORKDIR.value, ACCEPT.value, monitoring)
    except (ValueError, OSError, FloatingPointError) as error:
        end(1, f"error: {error}")
    except LostProcess as lost:
        end(REQUEUE, f"error: {lost}")
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(REQUEUE)
    except KeyboardInterrupt as stop:  # before the first step, or the second signal
        end(REQUEUE if isinstance(stop, Terminated) else 128 + signal.SIGINT, "stopped")
    except Exception:
        end(1, traceback.format_exc())


def main(argv: list[str] | None = None) -> None:
    run_with_flags(run, argv)
