"""Seconds and memory of one training step: ours, and an eager PyTorch step of the released maths, side by side.

    python -m benchmarks.train --size demo               # the demo's 1.6M parameters, 16 samples a step
    python -m benchmarks.train --size mid --steps 20     # 67M parameters, 4 samples a step, 64 actions each

Ours is the step that `ahawam train` compiles; the other is `export.released.training`, which tests hold to the same
loss, gradients and updates. Both run on the CPU in float32, on the same threads and processors, from the same weights,
on the same batch of latents with the release's objective, and draw their own noise; only in the first steps they are
given the same, and their losses must agree. Each has a process of its own, so that memory can be told apart. They take
turns, step by step, while the other waits; a step ends when its loss is there as a number. Ours is there twice: as it
runs after its program was compiled, and as at every later start, with the program from the cache of compiled ones.

"processor" is the time that the process's threads ran in a step: on a busy machine, with --threads 1, the figure to
trust, since PyTorch's threads wait for one another and for a processor. "peak, step" is the most that a process had in
memory (VmHWM) in the timed steps; "peak, all" is from the start, compiling included; "imports" is what all have before
they make anything, PyTorch and JAX, of which either side uses one.

To compare with an older commit, run the same command in a checkout of it (`git worktree add`), as far back as it has
this file; the released side, which hardly changes, says how far the two runs of the machine can be compared.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from ml_collections import ConfigDict
from safetensors.torch import load_file, save_file

from ahawam_jax.compilation_cache import FOLDER, SHORTEST
from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.towers.latents import make_canvas, make_windows
from ahawam_jax.training.host_memory import give_back
from ahawam_jax.training.objective import ObjectiveConfig, sample_noise
from ahawam_jax.training.optimizer import OptimizerConfig
from ahawam_jax.weights.release import to_release
from benchmarks import train_step
from benchmarks.sides import Side, machine, prepare
from configs import demo, robotwin
from data_pipelines.processes import ending
from data_pipelines.progress import Progress
from export.released.training import Noise, ReleasedTraining, Trainer, draw_noise

# What a size changes of the demo's model.
MODELS: dict[str, dict[str, Any]] = {
    "demo": {},
    "mid": dict(num_layers=8, num_heads=10, head_dim=48, planner_dim=576, planner_ffn_dim=2304, executor_dim=288,
                executor_ffn_dim=1152, text_dim=512, num_queries=16, horizon=64, memory_frames=6, remat="none"),
    "tiny": train_step.TINY,
}  # fmt: skip
SAMPLES = {"demo": 16, "mid": 4, "tiny": 2}
FIRST, LATER, RELEASED = "ours, first start", "ours, later start", "released way, eager"
SEED = 1  # of the noise
CHECKED, WARM_UP = 3, 4  # steps with the same noise, and steps before the first that counts
AGREEMENT = 1e-3  # of the losses of these steps, relative; float32, and Adam divides by small numbers


def run_of(size: str) -> ConfigDict:
    """The demo's configuration at a size, with the release's objective and a rate that begins at its peak."""
    run = demo.get_config()
    run.model.update(MODELS[size], prediction="velocity")
    run.objective = robotwin.get_config().objective
    run.optimizer.warmup_steps = 0
    return run


def ours(size: str) -> tuple[ModelConfig, ConfigDict, Any, Any, dict[str, Any]]:
    """The model and its run, the step, the state that it begins with, and its batch."""
    run = run_of(size)
    config = ModelConfig.create(run.model)
    step, create = train_step.step_of(config, run)
    state = jax.jit(create)(jax.random.key(0))
    give_back()  # as `ahawam train`, here and around the step's compilation
    windows, text = make_windows(run, config), run.towers.text_length
    batch = train_step.random_batch(config, SAMPLES[size], make_canvas(run).size, windows, text)
    return config, run, step, state, batch | {"context": batch["context"].astype(np.float32)}


def leave(size: str, folder: Path) -> None:
    """Weights, batch and first noise for the released way. In a process of its own: that memory is of neither side."""
    config, run, _, state, batch = ours(size)
    save(to_release(state.params), folder / "weights")
    save(batch, folder / "batch")
    objective = ObjectiveConfig(**run.objective)
    for i in range(CHECKED):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), i), 0)  # of step i and its only microbatch
        noise = sample_noise(key, batch, AhaWam(config), objective)
        drawn = (noise.video, noise.video_times, noise.action[0], noise.action_times[0])
        save(dict(zip(Noise._fields, drawn, strict=True)), folder / f"noise{i}")


class Ours:
    """The step as `ahawam train` compiles it."""

    def __init__(self, size: str) -> None:
        _, _, step, self.state, self.batch = ours(size)
        self.key = jax.random.key(SEED)
        give_back()
        self.compiled = jax.jit(step, donate_argnums=0).lower(self.state, self.batch, self.key).compile()
        give_back()

    def step(self) -> float:
        """The loss."""
        self.state, metrics = self.compiled(self.state, self.batch, self.key)
        return float(metrics["loss"])


class Released:
    """The released way, from what `leave` left."""

    def __init__(self, size: str, folder: Path) -> None:
        run = run_of(size)
        self.config, weights = ModelConfig.create(run.model), load_file(folder / "weights")
        optimizer = OptimizerConfig(**run.optimizer)
        self.trainer = Trainer(ReleasedTraining.load(weights, self.config), optimizer, run.train.steps)
        self.batch = load_file(folder / "batch")
        self.noise = [Noise(**load_file(folder / f"noise{i}")) for i in range(CHECKED)]

    def step(self) -> float:
        """The loss."""
        noise = self.noise.pop(0) if self.noise else draw_noise(self.batch, self.config)
        return self.trainer.step(self.batch, noise)


def save(arrays: dict[str, Any], path: Path) -> None:
    save_file({name: torch.from_numpy(np.array(x, order="C")) for name, x in arrays.items()}, path)


def row(side: Side) -> str:
    """Of the table."""
    taken = side.taken("step", WARM_UP)
    ever = max(side.built, *(call.peak for call in side.calls["step"]))
    return (
        f"{side.name:20}"
        + "".join(f"{x:11.4f} s" for x in (taken.median, taken.fastest, taken.processor))
        + "".join(f"{x:11,.0f} MiB" for x in (taken.peak, ever, side.imported))
    )


def measure(size: str, steps: int, threads: list[int]) -> list[Side]:
    """FIRST, LATER and RELEASED after `steps` timed steps each, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        alone = multiprocessing.get_context("spawn").Process(target=leave, args=(size, Path(folder)))
        alone.start()
        alone.join()
        if alone.exitcode:
            sys.exit(f"The process that makes weights and batch {ending(alone.exitcode)}.")
        os.environ |= {FOLDER: f"{folder}/compiled", SHORTEST: "0.1"}
        made = ((FIRST, Ours, size), (LATER, Ours, size), (RELEASED, Released, size, Path(folder)))
        sides = [Side(name, threads, make, *arguments) for name, make, *arguments in made]
        progress = Progress(WARM_UP + steps, "steps of each")
        for _ in range(WARM_UP + steps):
            progress.add(", ".join(f"{side.name} {side.call('step').seconds:.3g} s" for side in sides), 1)
        for side in sides:
            side.close()
    return sides


def agreement(ours: list[float], released: list[float]) -> str:
    """How far losses of the same noise are apart. SystemExit where the two do not compute the same."""
    apart = np.max(np.abs(np.subtract(ours, released) / released))  # NaN stays
    if not apart <= AGREEMENT:
        sys.exit(f"The two do not compute the same: losses {ours} and {released} of the same noise.")
    return f"the losses of the first {len(ours)} steps, of the same noise, differ by {apart:.1e} at most"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--size", choices=MODELS, default="demo", help="tiny is for the test (default %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of each, and processors (default %(default)s)")
    options = parser.parse_args(arguments)
    if min(options.steps, options.threads) < 1:
        parser.error("--steps and --threads are at least 1")
    threads = prepare(options.threads)
    sides = measure(options.size, options.steps, threads)
    print(
        f"{machine(threads, sides[0].device)}\n"
        f"{options.size}: {SAMPLES[options.size]} samples a step, {options.steps} steps of each in turn\n"
        f"{'':20}{'median':>13}{'fastest':>13}{'processor':>13}{'peak, step':>15}{'peak, all':>15}{'imports':>15}"
    )
    print(*map(row, sides), sep="\n")
    *ours, released = sides
    for side in ours:
        pairs = zip(side.taken("step", WARM_UP), released.taken("step", WARM_UP), strict=True)
        median, fastest, processor, peak = (a / b for a, b in pairs)
        print(f"{side.name} / released: median {median:.2f}, fastest {fastest:.2f}, processor {processor:.2f}, "
              f"peak {peak:.2f}")  # fmt: skip
        losses = ([call.result for call in of.calls["step"][:CHECKED]] for of in (side, released))
        print(agreement(*losses))


if __name__ == "__main__":
    main()
