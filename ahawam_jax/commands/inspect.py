"""What a file of weights, a model's folder or a checkpoint holds, and whether it fits a configuration.

    ahawam inspect --config=configs/robotwin.py              # the model's parameters, none allocated
    ahawam inspect robotwin_ahawam.pt --config=configs/robotwin.py
    ahawam inspect Wan2.2-TI2V-5B                            # planner, VAE and text encoder in a folder
    ahawam inspect runs/robotwin/run                         # a workdir or one of its checkpoints

Only headers are read, so this takes seconds at any size; --values reads everything, finds NaN and infinity, and
compares a checkpoint with what was saved. Exits with 1 if something is wrong or does not fit.
"""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from absl import app, flags

from ahawam_jax import checkpoints
from ahawam_jax.commands.flags import CONFIG, run_with_flags
from ahawam_jax.models.aha_wam import abstract_params
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.towers import text_encoder_names as umt5
from ahawam_jax.towers import vae_names as vae
from ahawam_jax.towers.text_encoder import abstract_text_encoder_params
from ahawam_jax.towers.vae import abstract_vae_params
from ahawam_jax.weights.convert import flatten, is_finite, misfits, summarize
from ahawam_jax.weights.files import LOCATIONS, Weights, open_weights
from ahawam_jax.weights.importing import is_release, release_tensors
from ahawam_jax.weights.release import TABLE
from ahawam_jax.weights.tensors import WeightsError
from data_pipelines.embodiment import Embodiment
from data_pipelines.normalization import describe
from data_pipelines.progress import Progress
from data_pipelines.statistics import pick_robot

_VALUES = flags.DEFINE_bool("values", False, "Read every tensor and look for NaN and infinity.")

# Component of a parameter, by the beginning of its path in our tree.
COMPONENTS = (
    ("planner", "planner"),
    ("executor", "executor"),
    ("layerwise router", "router"),
    ("query encoder", "observation_queries/encoder"),
    ("observation projection", "observation_queries/projection"),
    ("state encoder", "state_encoder"),
    ("branch embedding", "branch_embedding"),
)
# The same by the beginning of a foreign name.
FOREIGN = (
    ("planner", "mot/mixtures.video."),
    ("executor", "mot/mixtures.action."),
    ("layerwise router", "mot/chunk_kv_cache_editor."),
    ("query encoder", "chunk_obs_query_encoder/"),
    ("observation projection", "action_obs_visual_proj/"),
    ("state encoder", "proprio_encoder/"),
    ("branch embedding", "mot/action_branch_embedding"),
)


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of each component, by the names of Table 4's model, from shapes alone."""
    leaves = flatten(abstract_params(config))
    return {label: sum(x.size for path, x in leaves.items() if _under(path, part)) for label, part in COMPONENTS}


def _under(path: str, part: str) -> bool:
    return path == part or path.startswith(part + "/")


def _group(name: str) -> str:
    for label, prefix in FOREIGN:
        if name.startswith(prefix):
            return label
    return re.split(r"[./]", name.removeprefix("model."))[0]


def print_table(arrays: Mapping[str, Any], group: Callable[[str], str]) -> None:
    """Parameters, dtypes and share of every group of arrays, and their sum."""
    rows: dict[str, list[Any]] = {}
    for name, x in arrays.items():
        rows.setdefault(group(name), []).append(x)
    total = sum(int(np.prod(x.shape)) for x in arrays.values())
    for label, members in rows.items():
        count = sum(int(np.prod(x.shape)) for x in members)
        dtypes = ", ".join(sorted({str(x.dtype) for x in members}))
        print(f"  {label:24s}{count:>16,d}  {count / total:6.1%}  {dtypes}")
    size = sum(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in arrays.values())
    print(f"  {'total':24s}{total:>16,d}  {size / 2**30:.2f} GiB in {len(arrays)} tensors")


# ------------------------------------------------------------------------------------------------- foreign files
def inspect_weights(weights: Weights, config: ModelConfig | None, values: bool) -> int:
    """Prints what the files hold; returns the number of problems."""
    kind, problems = compare(weights, config)
    verdict = "fits"
    if problems is None:
        problems, verdict = [], "give --config to compare with a configuration"
    files = weights.files[0].name if len(weights.files) == 1 else f"{len(weights.files)} files"
    print(f"{weights.path}: {kind} ({files})")
    print_table(weights.tensors, _group)
    for name, value in weights.metadata.items():
        print(f"  {name}: {str(value)[:80]}")
    if values:
        progress = Progress(sum(x.nbytes for x in weights.tensors.values()), "GiB", 2**30)
        for name, x in weights.tensors.items():
            if not is_finite(np.asarray(x)):
                problems.append(f"not finite: {name} {list(x.shape)}")
            progress.add(name, x.nbytes)
    return report(problems, verdict)


def compare(weights: Weights, config: ModelConfig | None) -> tuple[str, list[str] | None]:
    """What the tensors are, and a line for everything missing, surplus or misshapen; None if nothing to compare."""
    names = weights.tensors
    if {"context", "mask"} == set(names):
        return "text tokens of one prompt", []
    if any("token_embedding" in name or name == "shared.weight" for name in names):
        tensors, sizes = umt5.text_encoder_tensors(weights)
        return (
            f"umT5 encoder, {sizes.num_layers} layers of width {sizes.dim}, {sizes.num_heads} heads",
            misfits(tensors, umt5.TABLE, abstract_text_encoder_params(sizes)),
        )
    if any(name.removeprefix("model.").startswith("encoder.conv") for name in names):
        tensors, sizes = vae.vae_tensors(weights, "float32")
        return (
            f"VAE, {sizes.z_dim} channels, {sizes.spatial_stride}x{sizes.spatial_stride}x{sizes.frames_per_latent}",
            misfits(tensors, list(vae.table(sizes)), abstract_vae_params(sizes)),
        )
    patches = [x for name, x in names.items() if name.endswith("patch_embedding.weight")]
    if not patches:
        return "tensors of no model known here", None
    layers = 1 + max((int(found[1]) for name in names if (found := re.search(r"blocks\.(\d+)\.", name))), default=-1)
    kind = "AHA-WAM checkpoint" if is_release(weights) else "Wan video transformer"
    kind = f"{kind}, {layers} layers, planner width {patches[0].shape[0]}"
    if config is None:
        return kind, None
    tensors, absent = release_tensors(weights, config)
    table = [row for row in TABLE if not row[1].startswith(absent)] if absent else TABLE
    return kind, misfits(tensors, table, abstract_params(config))


def report(problems: list[str], verdict: str) -> int:
    """Prints the problems, or the verdict."""
    for line in summarize(problems):
        print(f"  {line}")
    if problems or verdict:
        print(f"  {f'{len(problems)} problems' if problems else verdict}")
    return len(problems)


# --------------------------------------------------------------------------------------------------- checkpoints
def inspect_checkpoint(path: Path, config: ModelConfig | None, values: bool) -> int:
    """Prints what a checkpoint of ours holds; returns the number of problems."""
    workdir, step = checkpoints.find_step(path)
    manager = checkpoints.Checkpoints(workdir)
    run = manager.restore_run(step)
    items = list(run["arrays"])
    print(f"{manager.folder / str(step)}: items {', '.join(sorted([*items, 'run']))}")
    arrays = manager.arrays(step)
    print_table(arrays, lambda name: next((label for label, part in COMPONENTS if _under(name, part)), name))
    robots = run.get("statistics", {})
    print(f"  statistics: {', '.join(name or 'one robot' for name in robots) or 'none, so a policy cannot run'}")
    for name in robots:
        print(f"    {name or 'one robot'}: {describe(pick_robot(robots, name))}")
        for way in run.get("robots", {}).get(name, ()):
            own = Embodiment.from_json(way)
            told = f"its own state has {len(own.state.names)} numbers, its action {len(own.action.names)}"
            for what, found in (("held", own.held), ("without camera", own.absent), ("in", way["datasets"])):
                told += f"; {what}: {', '.join(found)}" if found else ""
            print(f"      {told}")
    for key in ("source", "instructions"):
        if run.get(key):
            print(f"  {key}: {str(run[key])[:100]}")
    for part in run.get("data", []):
        print(
            f"  data: {part['path']}, {len(part['lengths'])} episodes of {sum(part['lengths'])} rows together, "
            f"{part['fps']:.5g} a second; {len(part['held_out'])} held out"
        )
    for change in run.get("accepted", []):
        print(f"  data changed after step {change['step']}: {'; '.join(change['changes'])}")
    config = config or ModelConfig.create(run["config"]["model"])
    problems = manager.misfits(step, "inference", nn.unbox(abstract_params(config)))
    for item in items:
        manager.check_files(step, item)
        if values:
            progress = Progress(sum(x.size for x in manager.arrays(step, item).values()), f"values of {item}")
            for name, x in manager.read_all(step, item):
                if not is_finite(x):
                    problems.append(f"not finite: {item} {name} {list(x.shape)}")
                progress.add(name, x.size)
    read = "all values are finite and as they were saved" if values else "--values reads the arrays, too"
    return report(problems, f"fits the configuration; {read}")


# ------------------------------------------------------------------------------------------------------- command
def inspect_config(config: ModelConfig) -> None:
    """Prints the parameters of a configuration."""
    counts = count_parameters(config)
    total = sum(counts.values())
    for name, count in counts.items():
        print(f"{name:24s}{count:>16,d}  {count / total:6.1%}")
    print(f"{'total':24s}{total:>16,d}  {total * 4 / 2**30:.1f} GiB in float32, {total * 2 / 2**30:.1f} in bfloat16")
    anchor = ", the episode's first always one of them" if config.memory_anchor else ""
    print(
        f"{config.num_layers} layers, {config.num_heads} heads of {config.head_dim}; horizon {config.horizon}, "
        f"{config.num_chunks} chunks of {config.chunk}; memory {config.memory_frames} frames{anchor}; predicts "
        f"{config.prediction}"
    )


def inspect_path(path: Path, config: ModelConfig | None, values: bool) -> int:
    """Prints what lies at a path; returns the number of problems. Raises WeightsError for what is not weights."""
    if path.is_dir() and any(part.name == "checkpoints" for part in (*path.iterdir(), path, path.parent)):
        return inspect_checkpoint(path, config, values)
    parts = [part for part in LOCATIONS if _holds(path, part)]
    return sum(inspect_weights(open_weights(path, part), config, values) for part in parts or [""])


def _holds(path: Path, part: str) -> bool:
    """Whether a model's folder has this component."""
    return path.is_dir() and any(any(path.glob(pattern)) for pattern in LOCATIONS[part])


def _inspect(argv: list[str]) -> None:
    config = ModelConfig.create(CONFIG.value.model) if CONFIG.value is not None else None
    if len(argv) > 2 or (len(argv) == 1 and config is None):
        raise app.UsageError("give one file or folder, --config=configs/X.py, or both.")
    try:
        if len(argv) == 1:
            inspect_config(config)
        elif inspect_path(Path(argv[1]), config, _VALUES.value):
            sys.exit(1)
    except (WeightsError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def main(argv: list[str] | None = None) -> None:
    run_with_flags(_inspect, argv)
