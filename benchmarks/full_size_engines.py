"""Graphs of the true size, with random weights, through ONNX to engines: what does it take?

    python -m benchmarks.full_size_engines --graph executor --steps 2

Builds for an RTX 5090 D with TensorRT-RTX, in bfloat16 by default, and needs no GPU. Prints seconds, the peak of
resident memory so far and the sizes. Peaks are four to five times the weights: 10 GiB for the executor and the router,
and so about 45 for the planner, 1 for the VAE.
"""

import argparse
import resource
import tempfile
import time
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
    options = parser.parse_args()
    config, trt, target = robotwin.get_config(), load_library("tensorrt_rtx"), TARGETS["rtx5090d"]
    sizes = Sizes(
        ModelConfig.create(config.model), latent_grid(config), config.towers.text_length, torch_dtype(options.dtype)
    )
    print(f"{options.graph}, {options.dtype}, {options.steps} steps; torch {torch.__version__}, "
          f"{trt.__name__} {trt.__version__}")  # fmt: skip
    print("| what | seconds | GiB | peak resident memory, GiB |\n|---|---|---|---|")

    def row(what: str, began: float, size: int) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"| {what} | {time.monotonic() - began:.0f} | {size / 2**30:.2f} | {peak:.1f} |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        began, path = time.monotonic(), Path(folder) / f"{options.graph}.onnx"
        module = random_module(options.graph, sizes, options.steps, config.objective.shift)
        weights = (*module.parameters(), *module.buffers())
        row("random weights", began, sum(x.nbytes for x in weights))
        began = time.monotonic()
        write_onnx(make_graph(options.graph, module, sizes), path)
        row("ONNX", began, sum(file.stat().st_size for file in Path(folder).iterdir()))
        del module, weights
        began = time.monotonic()
        plan = build_engine(trt, options.graph, path, target, options.dtype)
        row("engine", began, plan.nbytes)


if __name__ == "__main__":
    main()
