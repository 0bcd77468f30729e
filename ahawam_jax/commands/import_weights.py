"""Imports a released checkpoint, or Wan2.2 as the beginning of one, as a workdir that train and Policy read.

    ahawam import-weights --config=configs/robotwin.py --source=robotwin_ahawam.pt --nomemory_anchor \\
        --statistics=dataset_stats.json --workdir=checkpoints/robotwin
    ahawam import-weights --config=configs/robotwin.py --source=Wan2.2-TI2V-5B --workdir=checkpoints/wan

--source is a release .pt, or a Wan2.2 checkpoint in Wan's, DiffSynth's or the diffusers layout: a file, one of its
shards or the model's folder. From Wan the executor is interpolated, everything else starts fresh. Tensors go one by
one onto the devices of config.mesh; `ahawam train --config.init=WORKDIR` starts there.

The weights of a release do not tell whether it was trained with the episode's first frame kept in memory (RoboDojo:
--memory_anchor, configs/robodojo.py) or not (RoboTwin: --nomemory_anchor, configs/robotwin.py), so it must be said.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from ahawam_jax.checkpoints import Checkpoints, save_params
from ahawam_jax.commands.flags import CONFIG, WORKDIR, require, run_with_flags
from ahawam_jax.models.aha_wam import abstract_params
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.training import sharding
from ahawam_jax.weights.convert import flatten
from ahawam_jax.weights.files import Weights, open_weights
from ahawam_jax.weights.importing import is_release, load_model
from ahawam_jax.weights.tensors import WeightsError
from data_pipelines.normalization import describe
from data_pipelines.ownership import owned
from data_pipelines.paths import local_path
from data_pipelines.progress import Progress
from data_pipelines.statistics import load_statistics, to_lists

_SOURCE = flags.DEFINE_string("source", None, "Checkpoint: a file, one of its shards or a model's folder.")
_STATISTICS = flags.DEFINE_string("statistics", "", "dataset_stats.json of the checkpoint; a policy needs it.")
_FRESH = flags.DEFINE_list("fresh", [], "Parts to start from new values, e.g. executor/head,state_encoder.")
_ANCHOR = flags.DEFINE_bool(
    "memory_anchor", None, "Whether a release was trained with the episode's first frame kept in memory."
)
_DTYPE = flags.DEFINE_enum("dtype", "stored", ["stored", "float32", "bfloat16"], "Of the imported parameters.")


def import_checkpoint(
    config: ConfigDict, source: str, workdir: str, statistics: str = "", fresh: Sequence[str] = (), dtype: Any = None,
    memory_anchor: bool | None = None,
) -> None:  # fmt: skip
    """Reads `source` onto the devices of config.mesh and writes it to `workdir` as checkpoint step 0.

    memory_anchor: what a release was trained with; config.model has to say the same. Nobody is asked for Wan2.2.
    Raises WeightsError or DatasetError, in sentences, for files that do not fit; nothing is written then. Raises
    OwnedError where another process writes to `workdir`.
    """
    for path in (source, statistics):
        local_path(path)
    with owned(local_path(workdir)):
        _import_checkpoint(config, source, workdir, statistics, fresh, dtype, memory_anchor)


def _import_checkpoint(
    config: ConfigDict, source: str, workdir: str, statistics: str, fresh: Sequence[str], dtype: Any,
    memory_anchor: bool | None,
) -> None:  # fmt: skip
    model = ModelConfig.create(config.model)
    mesh = sharding.make_mesh(config.mesh)
    weights = open_weights(source, "planner")
    check_anchor(weights, model, memory_anchor)
    if Checkpoints(workdir).latest is not None:
        raise WeightsError(f"{workdir} already holds a checkpoint; give another --workdir.")
    run = {"config": json.loads(config.to_json()), "source": str(weights.path), "instructions": []}
    if statistics:
        stats = load_statistics(statistics)
        for kind, width in (("state", model.state_dim), ("action", model.action_dim)):
            found = len(stats[kind]["mean"])
            if found != width:
                raise WeightsError(
                    f"{statistics} describes {kind}s of {found} numbers, config.model.{kind}_dim is {width}; take the "
                    "file that belongs to this checkpoint."
                )
        print(f"{statistics}: {describe(stats)}")
        run["statistics"] = to_lists({"": stats})
    like = sharding.abstract(abstract_params(model), mesh)
    size = sum(x.nbytes for x in weights.tensors.values())
    print(f"{weights.path}: {len(weights.tensors)} tensors, {size / 2**30:.2f} GiB, {len(weights.files)} files")
    progress = Progress(size, "GiB", 2**30)
    params = load_model(weights, model, like, jax.random.key(config.seed), tuple(fresh), dtype, progress.add)
    print("writing ...", flush=True)
    save_params(workdir, params, run)
    count = sum(x.size for x in flatten(params).values())
    print(f"{workdir}: {count:,} parameters in {progress.seconds:.0f} s")


def check_anchor(weights: Weights, model: ModelConfig, stated: bool | None) -> None:
    """Raises WeightsError where it is not said, or not as in the config, whether a release keeps the first frame."""
    if stated is None and is_release(weights):
        raise WeightsError(
            f"{weights.path} does not tell whether it was trained with the episode's first frame kept in memory; add "
            "--memory_anchor if so (the release for RoboDojo), --nomemory_anchor if not (the one for RoboTwin)."
        )
    if stated not in (None, model.memory_anchor):
        raise WeightsError(
            f"--{'' if stated else 'no'}memory_anchor was given, but config.model.memory_anchor is "
            f"{model.memory_anchor}; use configs/{'robodojo' if stated else 'robotwin'}.py, or set "
            f"--config.model.memory_anchor={stated}."
        )


def _import(argv: list[str]) -> None:
    require(argv, CONFIG, _SOURCE, WORKDIR)
    dtype = None if _DTYPE.value == "stored" else jnp.dtype(_DTYPE.value)
    try:
        import_checkpoint(
            CONFIG.value, _SOURCE.value, WORKDIR.value, _STATISTICS.value, _FRESH.value, dtype, _ANCHOR.value
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def main(argv: list[str] | None = None) -> None:
    run_with_flags(_import, argv)
