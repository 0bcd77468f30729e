"""Runs RoboTwin 2.0's tasks over devices into a table with intervals, beside published numbers.

    ahawam robotwin --checkout=RoboTwin --simulator=robotwin --out=runs/table --gpus 0 1 2 3 \\
        --checkpoint=/data/runs/robotwin --policy-env=$PWD/policy-env                    # RoboTwin since August 2026
    ahawam robotwin --checkout=RoboTwin --simulator=robotwin --out=runs/table --gpus 0 1 \\
        --server=ws://127.0.0.1:8000                                                     # RoboTwin before

The policy folder of this project must lie in the checkout: docs/evaluators.md. A run that was stopped goes on where it
was. OUT gets manifest.json, results.jsonl, table.md and logs/.
"""

import argparse
import sys

from ahawam_jax.evaluation.robotwin.evaluators import CheckoutError, Choice, open_checkout
from ahawam_jax.evaluation.robotwin.jobs import CONFIGS, EPISODES, TASKS, all_jobs
from ahawam_jax.evaluation.robotwin.manifest import describe
from ahawam_jax.evaluation.robotwin.scheduler import SAFE, RunError, Scheduler, finished, read_lines, settle_manifest
from ahawam_jax.evaluation.robotwin.tables import render
from data_pipelines.disk import whole_file, writing
from data_pipelines.ownership import OwnedError, owned
from data_pipelines.paths import local_path
from data_pipelines.progress import say


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="ahawam robotwin", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--checkout", type=local_path, required=True, help="RoboTwin's folder")
    p.add_argument("--simulator", required=True, help="RoboTwin's environment: a folder, or its name in conda")
    p.add_argument("--out", type=local_path, required=True, help="folder of the table")
    p.add_argument("--policy", default="AHA_WAM_JAX", help="name of the policy folder (default %(default)s)")
    p.add_argument("--gpus", nargs="+", default=["0"], help="cards to run on (default 0)")
    p.add_argument("--per-gpu", type=int, default=1, help="evaluations at a time on a card (default %(default)s)")
    p.add_argument("--checkpoint", help="run or export, for XPolicyLab's evaluator")
    p.add_argument("--policy-env", help="environment of the policy, for XPolicyLab's evaluator")
    p.add_argument("--server", nargs="+", default=[], help="addresses of ahawam serve, for the older evaluator")
    p.add_argument("--label", default="aha_wam", help="name of the checkpoint in the older evaluator's results")
    p.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help="default: all 50")
    p.add_argument("--configs", nargs="+", default=list(CONFIGS), metavar="CONFIG", help="default: both")
    p.add_argument("--repeats", type=int, default=3, help="each with the next seed (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the first repeat (default %(default)s)")
    p.add_argument("--episodes", type=int, default=EPISODES, help="of an evaluation (default %(default)s)")
    p.add_argument("--stalled", type=float, default=60, metavar="MINUTES",
                   help="without a finished episode until an evaluation is ended (default %(default)s)")  # fmt: skip
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        failed = _run(options)
    except (CheckoutError, RunError, OwnedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for why in failed.values():
        print(f"error: {why}", file=sys.stderr)
    return 1 if failed else 0


def _run(options: argparse.Namespace) -> dict[str, str]:
    """Of each evaluation that gave no number, why."""
    for name, least in (("repeats", 1), ("per_gpu", 1), ("episodes", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise CheckoutError(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected at least {least}.")
    if not options.stalled > 0:
        raise CheckoutError(f"--stalled is {options.stalled:g}; expected more than 0 minutes.")
    for name in ("tasks", "configs", "gpus"):
        if len(set(getattr(options, name))) < len(getattr(options, name)):
            raise CheckoutError(f"--{name} names one twice.")
    unknown = [task for task in options.tasks if task not in TASKS]
    if unknown:
        raise CheckoutError(f"{', '.join(unknown)}: no task of RoboTwin 2.0; they are {', '.join(TASKS)}.")
    choice = Choice(
        options.checkout, options.policy, options.simulator, options.episodes, options.checkpoint, options.policy_env,
        options.server, options.label,
    )  # fmt: skip
    evaluator = open_checkout(choice, options.tasks, options.configs)
    jobs = all_jobs(options.tasks, options.configs, options.repeats, options.seed)
    with owned(options.out):
        manifest = describe(
            evaluator, options.gpus, options.tasks, options.configs, options.repeats, options.seed
        )
        lines = read_lines(options.out)
        settle_manifest(options.out, manifest)
        wanted = {(job.task, job.config, job.repeat) for job in jobs}

        def show() -> str:
            done = finished(read_lines(options.out))
            page = render(manifest, {key: line for key, line in done.items() if key in wanted})
            path = options.out / "table.md"
            with writing(path, SAFE), whole_file(path) as partial:
                partial.write_text(page)
            return page

        done = finished(lines)
        left = [job for job in jobs if (job.task, job.config, job.repeat) not in done]
        if len(left) < len(jobs):
            say(f"{len(jobs) - len(left)} of {len(jobs)} evaluations are finished, {len(left)} to go")
        scheduler = Scheduler(evaluator, options.out, options.gpus, options.per_gpu, 60 * options.stalled, say, show)
        failed = scheduler.run(left)
        say(show())
    return failed
