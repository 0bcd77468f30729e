"""What a run takes from its own record when it goes on, and what may be another by then.

One rule: on resuming may change where things lie, how often is logged, validated and saved, what is computed on, how
the policy is run, and how long is trained (`train.steps` or `train.epochs`, not below the step that is reached). All
else decides what is learned and stays; so do the data, unless their change is accepted knowingly.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ahawam_jax.checkpoints import Checkpoints
from ahawam_jax.training.hosts import fields
from ahawam_jax.training.optimizer import OptimizerConfig, learning_rate
from data_pipelines.disk import whole_file, writing

FREE_FIELDS = (
    "train.log_every", "train.checkpoint_every", "train.checkpoint_minutes", "train.validate_every", "train.keep",
    "train.max_bad_steps", "mesh", "data.cache", "data.latents", "data.latent_clips", "data.workers", "policy", "init",
    "model.initial_gate",  # has done what it does before the first step
    "towers.video_weights", "towers.text_cache", "train.steps", "train.epochs",
    "data.path", "data.validation_episodes",  # what they lead to is compared by its content
)  # fmt: skip
ACCEPT = "--accept-changed-data"

Record = dict[str, Any]


def read_record(checkpoints: Checkpoints) -> Record | None:
    """What the newest checkpoint says of its run; None where there is none, and a run begins anew."""
    if checkpoints.latest is None:
        return None
    record = checkpoints.restore_run(checkpoints.latest)
    if "data" not in record:
        raise ValueError(
            f"{checkpoints.folder} holds parameters alone, no run to go on with; start from them with another "
            f"--workdir and --config.init={checkpoints.folder.parent}."
        )
    return record


def check_config(record: Record, config: ConfigDict, workdir: Path) -> None:
    """Raises ValueError listing the fields that may not change and have."""
    before, after = fields(record["config"]), fields(json.loads(config.to_json()))
    changed = [
        f"{name}: {before.get(name, 'absent')} there, {after.get(name, 'absent')} now"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not name.startswith(FREE_FIELDS)
    ]
    if changed:
        raise ValueError(
            f"{workdir} belongs to a run with another config; to go on with it, use its config, of which only "
            f"{', '.join(FREE_FIELDS)} may change; for another run, use another --workdir:\n  " + "\n  ".join(changed)
        )


def write_config(workdir: Path, config: Mapping[str, Any], safe: str) -> None:
    """Writes the config beside the checkpoints, for people to read. Raises DiskError, which ends with `safe`."""
    if jax.process_index() == 0:
        path = workdir / "config.json"
        with writing(path, safe), whole_file(path) as partial:
            partial.write_text(json.dumps(config, indent=1))


def accept(changes: list[str], accepted: bool, step: int) -> list[Record]:
    """What to record of changes of the data before a step: nothing without any.

    Raises ValueError for changes that nobody has accepted; says what follows from accepted ones.
    """
    if not changes:
        return []
    listed = "".join(f"\n  {change}" for change in changes)
    if not accepted:
        raise ValueError(
            f"The data are not those that this run was trained on:{listed}\nPut them back; or begin a new run in "
            "another --workdir, with config.init to start from the parameters of this one; or go on knowingly with "
            f"{ACCEPT}: statistics and held-out episodes stay those of the run, and the change is recorded."
        )
    print(f"going on with changed data, statistics and held-out episodes as before:{listed}", flush=True)
    return [{"step": step, "changes": changes}]


# --------------------------------------------------------------------------------------------------- length of a run
def steps_of(train: ConfigDict, windows: int, batch_size: int, optimizer: OptimizerConfig) -> int:
    """Training steps that config.train asks for, said on stdout where they are counted from epochs.

    windows: training windows of all datasets together; an epoch is as many samples, the last batch filled up.
    Raises ValueError unless exactly one of steps and epochs is given.
    """
    if min(train.steps, train.epochs) < 0 or bool(train.steps) == bool(train.epochs):
        raise ValueError(
            f"config.train.steps is {train.steps} and config.train.epochs {train.epochs:g}: give one of them, and 0 "
            "for the other."
        )
    if train.steps:
        return train.steps
    steps = math.ceil(train.epochs * windows / batch_size)
    print(
        f"{train.epochs:g} epochs of {windows:,} windows, {batch_size} a step: {steps:,} steps, "
        f"{optimizer.warmup(steps):,} of them warm-up",
        flush=True,
    )
    return steps


def check_length(record: Record, steps: int, optimizer: OptimizerConfig) -> None:
    """Says what becomes of the learning rate where a run gets another length; raises ValueError if that is over."""
    before, start = record["steps"], record["data_position"]["batches"]
    if steps < start:
        raise ValueError(
            f"The run has reached step {start}, config.train asks for {steps}; give at least {start}, or another "
            "--workdir for a shorter run."
        )
    if steps == start:
        print(
            f"The run of {steps} steps is finished; more in config.train.steps (or epochs) would go on from there.",
            flush=True,
        )
    if steps != before:
        rates = [float(learning_rate(optimizer, length)(start)) for length in (before, steps)]
        print(
            f"steps: {before} before, {steps} now. From step {start} on the learning rate is that of a run of {steps} "
            f"steps: {rates[1]:.3g}, where that of {before} steps would be {rates[0]:.3g}",
            flush=True,
        )
