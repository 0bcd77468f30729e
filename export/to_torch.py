"""From a checkpoint to a folder that PyTorch, ONNX and TensorRT start from, checked against JAX on this machine.

    ahawam to-torch runs/robotwin/run --out exports/robotwin --dtype bfloat16

The folder holds model.safetensors (the release's layout), vae.safetensors (the VAE's encoder, as stored),
config.json, dataset_stats.json, text_tokens/, embodiment.json where the robot's own vectors are not the model's and,
written last, manifest.json. It appears whole or not at all. Weights are streamed: memory is needed for one stacked
parameter, or for two layers while they are compared.
"""

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ahawam_jax.checkpoints import Checkpoints, find_step
from ahawam_jax.commands.export_weights import export_checkpoint
from ahawam_jax.commands.flags import add_robot
from ahawam_jax.models.aha_wam import abstract_params
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.towers.building import STAND_INS, build_text_tower, build_video_tower
from ahawam_jax.towers.latents import make_canvas
from ahawam_jax.towers.text_cache import CachedText, entry_path, prompt
from ahawam_jax.towers.vae_names import vae_tensors
from ahawam_jax.weights.convert import Row, is_finite, rows
from ahawam_jax.weights.files import open_weights
from ahawam_jax.weights.release import TABLE
from ahawam_jax.weights.safetensors_file import write_safetensors
from ahawam_jax.weights.tensors import Tensor
from data_pipelines.embodiment import pick_embodiment
from data_pipelines.normalization import describe
from data_pipelines.paths import local_path
from data_pipelines.progress import Progress
from data_pipelines.statistics import FILE as STATISTICS
from data_pipelines.statistics import Statistics, pick_robot, save_statistics
from export.checks.parity import model_parity, video_parity
from export.exported import check_widths, latent_grid, load_video, torch_dtype
from export.manifest import (
    CONFIG,
    EMBODIMENT,
    MODEL,
    TEXT,
    VAE,
    ExportError,
    new_folder,
    require_new,
    sha256,
    write_manifest,
)
from export.twin.layers import DTYPES
from export.twin.vae import encoder_table

# Float32 rounding stays below 1e-4 even beside outlying activations; a wrong layout is off by about 1.
LARGEST_DEVIATION = 1e-3


def convert(
    path: str | Path, out: str | Path, dtype: str | None = None, robot: str | None = None, dataset: str | None = None
) -> dict[str, Any]:
    """Writes the export of a workdir or checkpoint step to the new folder `out` and returns the parity figures.

    dtype: "float32" or "bfloat16"; None for config.model.dtype. robot, dataset: as `Policy.load` takes them.
    Raises ExportError, or another ValueError of what it reads, in sentences; `out` does not exist then.
    """
    out = local_path(out)
    require_new(out)
    workdir, step = find_step(path)
    checkpoints = Checkpoints(workdir)
    run = checkpoints.restore_run(step)
    if "config" not in run:
        raise ExportError(f"{path} at step {step} lacks its config; train and import_weights write one.")
    config = ConfigDict(run["config"])
    model = ModelConfig.create(config.model)
    dtype = dtype or model.dtype
    torch_dtype(dtype)
    statistics = run_statistics(run, path, robot)
    check_widths(statistics, model, str(path))
    embodiment = pick_embodiment(run.get("robots", {}), robot, dataset)
    arrays = checkpoints.arrays(step)
    check_room(out, arrays, dtype)

    with new_folder(out) as partial:
        (partial / CONFIG).write_text(json.dumps(run["config"], indent=1) + "\n")
        save_statistics(statistics, partial / STATISTICS)
        if embodiment is not None:
            (partial / EMBODIMENT).write_text(json.dumps(embodiment.to_json(), indent=1) + "\n")
        copy_text(config, model, run["instructions"], partial / TEXT)
        vae = write_vae(config, model, partial)
        export_checkpoint(path, partial / MODEL, dtype)
        weights = compare_stored(checkpoints, step, arrays, open_weights(partial / MODEL).tensors, model)
        source = made_of(partial, weights)
        present = np.ones(model.action_dim, bool) if embodiment is None else embodiment.action.present
        parity = measure(config, model, partial, vae, present)
        write_manifest(partial, {
            "source": {"path": str(path), "step": step, "sha256": source}, "dtype": dtype, "vae": vae,
            "normalization": describe(statistics),
            "parity": {"arithmetic": "float32", "device": jax.devices()[0].device_kind, **parity},
        })  # fmt: skip
    return parity


def run_statistics(run: dict[str, Any], path: str | Path, robot: str | None) -> Statistics:
    """Those of the run, or of one of its robots."""
    if "statistics" not in run:
        raise ExportError(
            f"{path} has no statistics of states and actions, which a policy needs; import the checkpoint again with "
            "--statistics=dataset_stats.json."
        )
    return pick_robot(run["statistics"], robot)


def check_room(out: Path, arrays: dict[str, jax.ShapeDtypeStruct], dtype: str) -> None:
    """Raises ExportError for stored weights of a dtype without an export, and for too full a disk."""
    for name, x in arrays.items():
        if x.dtype.name not in DTYPES:
            raise ExportError(
                f"The checkpoint stores {name} as {x.dtype.name}; weights are exported from {' or '.join(DTYPES)}."
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    need = sum(int(np.prod(x.shape)) for x in arrays.values()) * DTYPES[dtype].itemsize
    free = shutil.disk_usage(out.parent).free
    if free < need:
        raise ExportError(
            f"{out.parent} has {free / 2**30:.2f} GiB free, the export needs {need / 2**30:.2f}; free some, or give "
            "--out on another disk."
        )


def copy_text(config: ConfigDict, model: ModelConfig, instructions: list[str], folder: Path) -> None:
    """The text tokens of the run's instructions; of an import, which knows none, all that its cache has."""
    tower = build_text_tower(config.towers, model)
    if not isinstance(tower, CachedText):
        return
    cache = Path(tower.folder)
    paths = [entry_path(cache, prompt(text), tower.length) for text in instructions]
    try:
        for text in instructions:
            tower.tokens(text)  # a ValueError if they are damaged or of another width
    except FileNotFoundError as error:
        raise ExportError(str(error)) from error
    if not instructions:
        paths = sorted(cache.glob(entry_path(cache, "", tower.length).name.replace(hashlib.sha256().hexdigest(), "*")))
    if not paths:
        raise ExportError(
            f"{cache} has no text tokens of length {tower.length}; write those of the tasks to deploy with python -m "
            f"ahawam encode-text --cache {cache} --length {tower.length} --prompt TASK."
        )
    folder.mkdir()
    for path in (*paths, *cache.glob("encoder.json")):
        shutil.copyfile(path, folder / path.name)


def write_vae(config: ConfigDict, model: ModelConfig, folder: Path) -> dict[str, Any] | None:
    """Writes the VAE's encoder under Wan's names, as stored, and returns its sizes; None for a tower without weights.

    Raises ValueError for an unknown tower and for weights that do not fit the model.
    """
    if config.towers.video in STAND_INS:
        return None
    build_video_tower(config.towers, model, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    tensors, sizes = vae_tensors(open_weights(config.towers.video_weights, "vae"), "float32")
    write_safetensors(folder / VAE, {name: tensors[name] for name, _, _ in encoder_table(sizes)}, {})
    return dataclasses.asdict(sizes)


def compare_stored(
    checkpoints: Checkpoints, step: int, arrays: dict[str, jax.ShapeDtypeStruct], tensors: dict[str, Tensor],
    model: ModelConfig,
) -> str:  # fmt: skip
    """Reads the checkpoint again, compares every tensor of the export bit for bit, and returns a hash of all weights.

    The hash is of the weights as the checkpoint stores them, whatever the dtype of the export. Raises ExportError for
    NaN or infinity, and for a tensor that is not the checkpoint's.
    """
    digest = hashlib.sha256()
    places: dict[str, list[Row]] = {}
    for row in rows(TABLE, abstract_params(model)):
        places.setdefault(row.path, []).append(row)
    progress = Progress(sum(int(np.prod(x.shape)) for x in arrays.values()), "G parameters compared", 10**9)

    def compare(path: str, stored: list[Row]) -> int:
        leaf = np.ascontiguousarray(checkpoints.read_param(step, path))
        digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.reshape(-1).view(np.uint8).data)
        if not is_finite(leaf):
            raise ExportError(
                f"{path} of step {step} in {checkpoints.folder} holds NaN or infinity; its training diverged or the "
                "checkpoint is damaged, use an earlier step."
            )
        for row in stored:
            want = row.to_theirs(leaf if row.layer is None else leaf[row.layer])
            got = np.asarray(tensors[row.name])
            if got.shape != want.shape or not np.array_equal(got, want.astype(got.dtype)) or not is_finite(got):
                raise ExportError(
                    f"{row.name} as written is not the checkpoint's {path}, or too large for {got.dtype}; convert "
                    "again, with --dtype float32."
                )
        return leaf.size

    for path, stored in places.items():  # a call each, so that one leaf is gone before the next is read
        progress.add(path, compare(path, stored))
    return digest.hexdigest()


def made_of(folder: Path, weights: str) -> str:
    """Hash of all that graphs and engines are made of, whatever the dtype: the weights, by theirs, VAE, config and the
    embodiment, whose absent numbers a loop holds."""
    files = [folder / name for name in (CONFIG, VAE, EMBODIMENT) if (folder / name).exists()]
    return hashlib.sha256("".join([weights, *map(sha256, files)]).encode()).hexdigest()


def measure(
    config: ConfigDict, model: ModelConfig, folder: Path, vae: dict[str, Any] | None, present: np.ndarray
) -> dict[str, float]:
    """Largest relative deviation of every graph, read back from the files, from JAX."""
    tensors = open_weights(folder / MODEL).tensors
    figures = model_parity(tensors, model, latent_grid(config), config.policy.steps, config.objective.shift, present)
    precise = dataclasses.replace(model, dtype="float32")
    tower = build_video_tower(config.towers, precise, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    encoder = load_video(folder, config.towers.video, vae, DTYPES["float32"])
    figures["vae"] = video_parity(encoder, tower, make_canvas(config).size)
    worst = max(figures, key=figures.__getitem__)
    if not figures[worst] <= LARGEST_DEVIATION:
        raise ExportError(
            f"The {worst} in PyTorch deviates from JAX by {figures[worst]:.1e}, expected at most "
            f"{LARGEST_DEVIATION:.0e} in float32; report it with this checkpoint's configuration."
        )
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ahawam to-torch", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    logging.set_verbosity(logging.ERROR)  # orbax reports every file it reads
    parser.add_argument("checkpoint", type=local_path, help="workdir of a run or an import, or one of its steps")
    parser.add_argument("--out", type=local_path, required=True, help="folder to write; it must not exist")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (default: config.model.dtype)")
    add_robot(parser)
    options = parser.parse_args(argv)
    try:
        parity = convert(options.checkpoint, options.out, options.dtype, options.robot, options.dataset)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    figures = ", ".join(f"{name} {value:.1e}" for name, value in parity.items())
    print(f"{options.out}: largest deviation from JAX in float32: {figures}")
    return 0
