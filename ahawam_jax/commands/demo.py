"""The whole system in one command: record demonstrations, train, run in closed loop, print a table.

    ahawam demo --config=configs/demo.py --workdir=runs/demo

Every stage is skipped if its result is already there, so an interrupted demo goes on where it was.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from ahawam_jax.commands.flags import CONFIG, WORKDIR, require, run_with_flags
from ahawam_jax.evaluation.experts import expert_actor
from ahawam_jax.evaluation.rollouts import Actor, Result, policy_actor, roll_out, table
from ahawam_jax.inference.policy import Policy
from ahawam_jax.models.aha_wam import init
from ahawam_jax.training.loop import train
from ahawam_jax.training.stopping import Interrupted
from data_pipelines.simulation.rendering import POINTS, check_rendering

TASK = "transfer_cube"
EPISODES = 50  # unseen seeds 0 .. 49; demonstrations use 1000 and up
PROCESSES = 2


def _demo(argv: list[str]) -> None:
    require(argv, CONFIG, WORKDIR)
    config, workdir, began = CONFIG.value, Path(WORKDIR.value), time.monotonic()
    problem = check_rendering()
    if problem:
        print(f"{problem}\nUntil then: camera views are drawn as dots, and evaluation is open loop only.", flush=True)
        os.environ["MUJOCO_GL"] = POINTS
        workdir = workdir / "without_drawing"  # nothing of it is taken for the real demo later
        config.data.path, config.data.cache = str(workdir / "dataset"), str(workdir / "cache")
    try:
        record(config)
        recorded = time.monotonic()
        error = train(config, workdir / "run")
        trained = time.monotonic()
    except (ValueError, OSError, FloatingPointError) as mistake:
        sys.exit(f"error: {mistake}")
    except Interrupted as stop:
        sys.exit(str(stop))
    report = [f"open-loop error on held-out demonstrations: {error:.4f} in normalised units"]
    if not problem:
        report = [table(evaluate(config, workdir)), "", *report]
    report.append(
        f"minutes: record {(recorded - began) / 60:.1f}, train {(trained - recorded) / 60:.1f}, "
        f"evaluate {(time.monotonic() - trained) / 60:.1f}"
    )
    (workdir / "table.md").write_text("\n".join(report) + "\n")
    print("\n" + "\n".join(report))
    if not problem:
        print(f"\nvideos and contact sheets: {workdir / 'rollouts'}")


def record(config: ConfigDict) -> None:
    """Demonstrations into config.data.path, in a process of its own that knows no JAX."""
    if Path(config.data.path).exists():
        return
    command = [
        sys.executable, "-m", "ahawam_jax", "record", "--task", TASK, "--episodes", str(config.data.episodes),
        "--out", config.data.path, "--processes", str(PROCESSES),
    ]  # fmt: skip
    if subprocess.run(command, check=False).returncode:
        sys.exit("error: recording the demonstrations failed, see above.")


def evaluate(config: ConfigDict, workdir: Path) -> list[Result]:
    """The table's rows: expert, trained policy, and the two controls."""
    seeds, folder = range(EPISODES), workdir / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    trained = Policy.load(workdir / "run")
    params = jax.jit(lambda: nn.unbox(init(trained.model, jax.random.key(1))))()
    untrained = Policy(trained.model, params, config, trained.statistics, trained.config)
    rows: list[tuple[str, Actor, int | None]] = [
        ("scripted expert", expert_actor(TASK, seeds), None),
        ("untrained", policy_actor(untrained, TASK, EPISODES), trained.config.refresh_every),
        ("trained, blanked images", policy_actor(trained, TASK, EPISODES, blank=True), trained.config.refresh_every),
        ("trained", policy_actor(trained, TASK, EPISODES), trained.config.refresh_every),
    ]
    results = []
    for name, actor, refresh_every in rows:
        results.append(roll_out(name, TASK, seeds, actor, PROCESSES, folder, refresh_every))
        print(f"{name}: {results[-1].success.sum()}/{EPISODES} succeed", flush=True)
    return results


def main(argv: list[str] | None = None) -> None:
    run_with_flags(_demo, argv)
