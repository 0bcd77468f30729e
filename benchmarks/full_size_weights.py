"""A release checkpoint of the true size through import and exports: is it the same, and what does it take?

    python -m benchmarks.full_size_weights --folder DIR

Writes a random bfloat16 checkpoint in the release's layout (7,349,428,556 parameters, 13.7 GiB) to DIR, imports it to
orbax, exports it again, compares every tensor bit for bit, and converts it for deployment (ahawam to-torch, with
towers that have no weights), which compares the PyTorch twin of every layer with JAX. Prints minutes and the peak of
resident memory of every step, each in a process of its own. DIR needs 42 GiB; what lies there from an earlier run is
written again.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from ahawam_jax.models.config import ModelConfig
from ahawam_jax.weights.files import open_weights
from ahawam_jax.weights.release import payload, release_shapes
from ahawam_jax.weights.torch_file import write_torch
from configs import robotwin
from data_pipelines.paths import local_path
from data_pipelines.progress import Progress
from data_pipelines.statistics import save_statistics

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Random:
    """A tensor drawn from its name's hash when it is asked for."""

    name: str
    shape: tuple[int, ...]
    progress: Progress
    dtype: np.dtype = BFLOAT16

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        x = (0.02 * rng.standard_normal(self.shape, np.float32)).astype(BFLOAT16)
        self.progress.add(self.name, x.size)
        return x


def write(source: Path) -> None:
    """The random checkpoint."""
    shapes = release_shapes(ModelConfig.create(robotwin.get_config().model))
    progress = Progress(sum(int(np.prod(shape)) for shape in shapes.values()), "G parameters", 10**9)
    tensors = {name: Random(name, shape, progress) for name, shape in shapes.items()}
    write_torch(source, payload(tensors, {"step": 0, "torch_dtype": "torch.bfloat16"}))


def write_statistics(path: Path) -> None:
    """Of a robot whose numbers are normal already."""
    one = dict.fromkeys(("mean", "min", "q01"), np.zeros(14)) | dict.fromkeys(("std", "max", "q99"), np.ones(14))
    save_statistics({"state": one, "action": one}, path)


def compare(source: Path, exported: Path) -> None:
    """Exits with a sentence if any tensor differs in a bit."""
    first, second = open_weights(source).tensors, open_weights(exported).tensors
    if first.keys() != second.keys():
        sys.exit(f"error: {len(first.keys() ^ second.keys())} names differ.")
    progress = Progress(sum(x.nbytes for x in first.values()), "GiB", 2**30)
    for name, x in first.items():
        if not np.array_equal(np.asarray(x).view(np.uint16), np.asarray(second[name]).view(np.uint16)):
            sys.exit(f"error: {name} differs.")
        progress.add(name, x.nbytes)
    print(f"{len(first)} tensors are the same, bit for bit")


def timed(label: str, *command: str) -> tuple[str, float, float]:
    """Runs a module; (label, minutes, GiB of resident memory at its peak)."""
    print(f"\n{label}: {' '.join(command)}", flush=True)
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", *command])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"error: {label} ended with status {status}.")
    return label, (time.monotonic() - began) / 60, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size_weights", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--folder", type=local_path, required=True, help="where to write; 42 GiB are needed")
    parser.add_argument("--only", choices=("write", "compare"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = ("source.pt", "imported", "exported.pt", "deployed", "dataset_stats.json")
    source, workdir, exported, deployed, statistics = (options.folder / name for name in names)
    if options.only:
        return write(source) if options.only == "write" else compare(source, exported)
    options.folder.mkdir(parents=True, exist_ok=True)
    for path in (workdir, deployed):
        shutil.rmtree(path, ignore_errors=True)
    write_statistics(statistics)
    this = ("benchmarks.full_size_weights", "--folder", str(options.folder), "--only")
    steps = [
        timed("write", *this, "write"),
        timed("inspect", "ahawam_jax", "inspect", str(source), "--config=configs/robotwin.py"),
        timed("import", "ahawam_jax", "import-weights", "--config=configs/robotwin.py", "--nomemory_anchor",
              f"--source={source}", f"--workdir={workdir}", f"--statistics={statistics}",
              "--config.towers.video=block_transform", "--config.towers.text=hashed_words"),
        timed("export", "ahawam_jax", "export-weights", str(workdir), str(exported)),
        timed("compare", *this, "compare"),
    ]  # fmt: skip
    exported.unlink()  # its room is needed
    steps.append(timed("to_torch", "ahawam_jax", "to-torch", str(workdir), "--out", str(deployed)))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"\n{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}, "
        f"commit {commit}; source {source.stat().st_size / 2**30:.2f} GiB"
    )
    print("| step | minutes | peak resident memory, GiB |\n|---|---|---|")
    for label, minutes, peak in steps:
        print(f"| {label} | {minutes:.1f} | {peak:.1f} |")


if __name__ == "__main__":
    main()
