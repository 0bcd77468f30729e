"""Graphs of the true size, with random weights, through ONNX to engines: what does it take?

    python -m benchmarks.full_size_engines --graph planner

Builds for an RTX 5090 D with TensorRT-RTX, in bfloat16 by default, and needs no GPU. Prints seconds, sizes, and the
peaks of memory of each part: what the process holds itself, and beside it the pages of files that it has mapped, which
the kernel drops where memory is short.
"""

import argparse
import gc
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ahawam_jax.models.config import ModelConfig
from ahawam_jax.towers.vae import VaeConfig
from configs import robotwin
from export.engines.engine import load_library
from export.engines.onnx_graphs import GRAPHS, Sizes, make_graph, write_onnx
from export.exported import latent_grid, torch_dtype
from export.to_tensorrt import TARGETS, build_engine
from export.twin.layers import DTYPES
from export.twin.model import Executor, PlannerRefresh, Router
from export.twin.vae import VaeEncoder


def random_module(name: str, sizes: Sizes, steps: int, shift: float) -> nn.Module:
    """A module of the twin with small random weights."""
    model, dtype = sizes.model, sizes.dtype
    make = {
        "vae": lambda: VaeEncoder(VaeConfig(), dtype),
        "planner": lambda: PlannerRefresh(model, sizes.grid, dtype),
        "router": lambda: Router(model, dtype),
        "executor": lambda: Executor(model, steps, shift, dtype),
    }
    module = make[name]()
    with torch.no_grad():
        for x in module.parameters():
            x.normal_(std=0.02)
        for label, x in module.named_buffers():
            if not label.startswith("space"):  # the planner's rotary table is computed
                x.normal_(std=0.02)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size_engines", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--graph", choices=GRAPHS, required=True)
    parser.add_argument("--steps", type=int, default=10, help="of the executor's loop (default 10)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--folder", type=Path, help="for the files, twice the weights (default: of the system)")
    options = parser.parse_args()
    config, trt, target = robotwin.get_config(), load_library("tensorrt_rtx"), TARGETS["rtx5090d"]
    sizes = Sizes(
        ModelConfig.create(config.model), latent_grid(config), config.towers.text_length, torch_dtype(options.dtype)
    )
    print(f"{options.graph}, {options.dtype}, {options.steps} steps; torch {torch.__version__}, "
          f"{trt.__name__} {trt.__version__}")  # fmt: skip
    print("| what | seconds | GiB | own memory, GiB | mapped files, GiB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        path, out = Path(name) / f"{options.graph}.onnx", Path(name) / f"{options.graph}.engine"
        with row("random weights, ONNX", Path(name)):
            module = random_module(options.graph, sizes, options.steps, config.objective.shift)
            write_onnx(make_graph(options.graph, module, sizes), path)
        del module
        gc.collect()  # the exporter's objects refer to each other, and to the weights
        with row("engine", out):
            build_engine(trt, options.graph, path, out, target, options.dtype)


@contextmanager
def row(what: str, made: Path) -> Iterator[None]:
    """Prints what it took to make a file, or the files of a folder."""
    began, peaks, done = time.monotonic(), [0.0, 0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peaks[:] = map(max, peaks, memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield
    done.set()
    watcher.join()
    size = sum(file.stat().st_size for file in (made.iterdir() if made.is_dir() else [made]))
    own, mapped = peaks
    print(f"| {what} | {time.monotonic() - began:.0f} | {size / 2**30:.2f} | {own:.1f} | {mapped:.1f} |", flush=True)


def memory() -> tuple[float, float]:
    """Resident memory of this process in GiB: its own, and pages of mapped files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    held = {line[0]: int(line[1]) / 2**20 for line in lines if line[0] in ("RssAnon:", "RssFile:")}
    return held["RssAnon:"], held["RssFile:"]


if __name__ == "__main__":
    main()
