"""Samples a second and share of the matrix peak of one training step on one device, latents cached.

    python -m benchmarks.train_step --batch 4 8          # full size, random weights: 110 GiB of device memory
    python -m benchmarks.train_step --layers 14          # a member of the family with fewer layers, for 80 GB
    python -m benchmarks.train_step --freeze planner --batch 32       # only executor and router are trained
    python -m benchmarks.train_step --lora 'planner/.*kernel' --batch 16
    python -m benchmarks.train_step --tiny               # the same code at a size for a CPU; its numbers mean nothing

FLOPs are those of the matrix products in the step's jaxpr, bodies of scans times their length; without
rematerialisation they are the model's, and MFU counts these alone.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.attention import attention_of
from ahawam_jax.models.config import SPATIAL_STRIDE, ModelConfig
from ahawam_jax.planning.flops import count
from ahawam_jax.planning.program import read
from ahawam_jax.towers.stand_ins import BlockTransform
from ahawam_jax.training.objective import ObjectiveConfig
from ahawam_jax.training.optimizer import OptimizerConfig, make_optimizer
from ahawam_jax.training.packing import pays
from ahawam_jax.training.step import Batch, create_state, make_train_step
from configs import robotwin
from data_pipelines.windows import WindowConfig
from export.measure.machine import describe, matmul_tflops

TINY = dict(num_layers=2, num_heads=2, head_dim=24, planner_dim=48, planner_ffn_dim=96, executor_dim=32,
            executor_ffn_dim=64, text_dim=32)  # fmt: skip
PEAK = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # dense bfloat16, TFLOP/s, by the vendor's datasheets
CANVAS, TEXT, WARM_UP = (384, 320), 128, 2
WINDOWS = WindowConfig()  # RoboTwin's


def random_batch(
    config: ModelConfig, size: int, canvas: tuple[int, int], windows: WindowConfig = WINDOWS, text: int = TEXT
) -> Batch:
    """What the loader hands over when latents are cached; names and shapes as in `joint_loss`."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    grid = tuple(side // SPATIAL_STRIDE for side in canvas)
    frames = windows.video_frames

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), (size, *shape))

    channels, history = config.latent_channels, config.memory_frames
    latent_frames = 1 + (frames - 1) // 4
    return {
        "input_latents": normal(channels, latent_frames, *grid),
        "obs_latents": normal(config.num_chunks, channels, 1, *grid),
        "history_latents": normal(history, channels, 1, *grid),
        "video_history_valid_len": jnp.full(size, history),
        "video_history_frame_indices": jnp.tile(jnp.arange(history) * frames, (size, 1)),
        "video_temporal_position_ids": jnp.tile(history * frames + 4 * jnp.arange(latent_frames), (size, 1)),
        "image_is_pad": jnp.zeros((size, frames), bool),
        "context": normal(text, config.text_dim).astype(jnp.bfloat16),
        "context_mask": jnp.ones((size, text), bool),
        "action": normal(windows.rows, config.action_dim),
        "action_is_pad": jnp.zeros((size, windows.rows), bool),
        "proprio": normal(windows.rows, config.state_dim),
        "action_offset": jnp.zeros(size, jnp.int32),
    }


def step_of(config: ModelConfig, run: ConfigDict) -> tuple[Callable[..., Any], Callable[[jax.Array], Any]]:
    """The training step (state, batch, key) -> (state, metrics), and the function that makes its state from a key.

    run: has the optimizer and the objective.
    """
    optimizer = OptimizerConfig(**run.optimizer)
    model, tx = AhaWam(config), make_optimizer(optimizer, run.train.steps)
    packed = pays(jax.devices()[:1])
    step = make_train_step(model, tx, ObjectiveConfig(**run.objective), optimizer, packed=packed)
    return (
        lambda state, batch, key: step(state, batch, BlockTransform(), key),
        lambda key: nn.unbox(create_state(model, tx, key, False)),
    )


def flops_of(config: ModelConfig, run: ConfigDict, canvas: tuple[int, int]) -> float:
    """Of one sample's forward and backward pass."""
    step, create = step_of(config, run)
    state = jax.eval_shape(create, jax.random.key(0))
    batch = jax.eval_shape(lambda: random_batch(config, 1, canvas))
    with attention_of("cpu"):  # its products can be counted, those in a kernel cannot
        return sum(count(read(jax.make_jaxpr(step)(state, batch, jax.random.key(0)))).values())


def top_kernels(run: Callable[[], Any], count: int) -> list[dict[str, Any]]:
    """The kernels in which one call spends its time, milliseconds and how often; [] where nothing is recorded."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        files = list(Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(files[0])).planes if files else []
        time_of, calls = Counter[str](), Counter[str]()
        for plane in (plane for plane in planes if "/device:" in plane.name):
            for event in (event for line in plane.lines if "Stream" in line.name for event in line.events):
                time_of[event.name] += event.duration_ns / 1e6
                calls[event.name] += 1
    whole = sum(time_of.values())
    return [
        {"kernel": name[:90], "ms": ms, "calls": calls[name], "share": ms / whole}
        for name, ms in time_of.most_common(count)
    ]


def measure(
    config: ModelConfig, run: ConfigDict, size: int, canvas: tuple[int, int], repeats: int
) -> dict[str, Any]:
    """Median step of `size` samples, and what the compiler says of its memory."""
    step, create = step_of(config, run)
    batch, key = random_batch(config, size, canvas), jax.random.key(1)
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(jax.eval_shape(create, key), batch, key).compile()
    compile_seconds = time.perf_counter() - began
    state = jax.jit(create)(key)
    times = []
    for _ in range(repeats + WARM_UP):
        began = time.perf_counter()
        state, metrics = compiled(state, batch, key)
        loss = float(metrics["loss"])
        times.append(time.perf_counter() - began)
    holder = [state]

    def once() -> Any:
        holder[0], metrics = compiled(holder[0], batch, key)
        return metrics

    memory = compiled.memory_analysis()
    return {
        "batch": size, "seconds": float(np.median(times[WARM_UP:])), "loss": loss, "compile s": compile_seconds,
        "arguments GiB": memory.argument_size_in_bytes / 2**30, "temporaries GiB": memory.temp_size_in_bytes / 2**30,
        "kernels": top_kernels(once, 12),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--layers", type=int, help="of planner and executor (default: the configuration's 30)")
    parser.add_argument("--batch", type=int, nargs="+", default=[4], help="samples a step (default 4)")
    parser.add_argument("--remat", default="full", help="config.model.remat (default %(default)s)")
    parser.add_argument("--freeze", default="", help="config.optimizer.freeze")
    parser.add_argument("--lora", default="", help="config.optimizer.lora_targets")
    parser.add_argument("--plain", action="store_true", help="attention without the backend's kernel")
    parser.add_argument("--repeats", type=int, default=8, help="timed steps (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in seconds")
    parser.add_argument("--out", type=Path, help="write all numbers here as JSON, after every batch size")
    options = parser.parse_args()
    run = robotwin.get_config()
    run.optimizer.update(freeze=options.freeze, lora_targets=options.lora)
    config = ModelConfig.create(run.model)
    config = dataclasses.replace(config, remat=options.remat, num_layers=options.layers or config.num_layers)
    canvas = (64, 64) if options.tiny else CANVAS
    if options.tiny:
        config = dataclasses.replace(config, **TINY)
    device = jax.devices()[0]
    peak = next((rate for name, rate in PEAK.items() if name in device.device_kind), float("nan"))
    matrix = matmul_tflops(256 if options.tiny else 8192)
    model, whole = (
        flops_of(dataclasses.replace(config, remat=remat), run, canvas) for remat in ("none", config.remat)
    )
    print(
        f"{describe()}\n{config.num_layers} layers, {model / 1e12:.3g} TFLOP a sample ({whole / 1e12:.3g} with remat "
        f"{config.remat}); bfloat16 matrix product {matrix:,.0f} TFLOP/s here, {peak:,.0f} by the datasheet"
    )
    rows: list[dict[str, Any]] = []
    for size in options.batch:
        with attention_of("cpu") if options.plain else nullcontext():
            row = measure(config, run, size, canvas, options.repeats)
        rate = size / row["seconds"]
        row |= {"samples/s": rate, "MFU": rate * model / 1e12 / peak, "of matrix rate": rate * model / 1e12 / matrix,
                "HFU": rate * whole / 1e12 / peak}  # fmt: skip
        rows.append(row)
        print(
            f"batch {size}: {row['seconds']:.3f} s a step, {rate:.2f} samples/s, MFU {row['MFU']:.1%}, with remat's "
            f"work {row['HFU']:.1%}, {row['of matrix rate']:.1%} of the matrix rate; state and batch "
            f"{row['arguments GiB']:.1f} GiB, temporaries {row['temporaries GiB']:.1f}; compiled in "
            f"{row['compile s']:.0f} s",
            flush=True,
        )
        for kernel in row["kernels"]:
            print(f"  {kernel['ms']:8.2f} ms {kernel['share']:6.1%} {kernel['calls']:6d} x {kernel['kernel']}")
        if options.out:
            record = {"device": describe(), "layers": config.num_layers, "remat": config.remat,
                      "freeze": options.freeze, "lora": options.lora, "plain": options.plain,
                      "TFLOP": model / 1e12}  # fmt: skip
            options.out.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
