"""Time and memory of what runs at the planner's rate, against the floors of the device it runs on.

    python -m benchmarks.slow_stream                 # full size, random bfloat16 weights: 13 GB of device memory
    python -m benchmarks.slow_stream --tiny          # the same code at a size for a CPU; its numbers mean nothing

VAE encoding of one 384x320 observation and of a 9-frame clip; a planner refresh without memory and with a full one
of six frames. The floor of a stage is the larger of its weights' bytes over the copy rate and its FLOPs over the
matrix rate, both measured in the same run.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ahawam_jax.models.aha_wam import AhaWam, abstract_params, empty_memory
from ahawam_jax.models.config import PATCH, SPATIAL_STRIDE, ModelConfig
from ahawam_jax.towers.vae import VaeConfig, WanVae, abstract_vae_params
from ahawam_jax.weights.convert import flatten
from configs import robotwin
from export.measure.machine import copy_gb_per_s, describe, matmul_tflops, median_ms

TINY = dict(num_layers=2, num_heads=2, head_dim=24, planner_dim=48, planner_ffn_dim=96, text_dim=32)
TINY_VAE = dict(dim=8, dec_dim=8, dim_mult=(1, 1, 2, 2))


def random_like(tree: Any) -> Any:
    """Small random bfloat16 numbers in the shape of a tree."""

    leaves, structure = jax.tree.flatten(nn.unbox(tree))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    values = [0.02 * jax.random.normal(key, x.shape, jnp.bfloat16) for key, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, values)


def stages(tiny: bool) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], Any, int]]:
    """(function to jit, its arguments, the weights it reads, tokens that meet all of them or 0) of every stage."""
    config = ModelConfig.create(robotwin.get_config().model)
    vae_config, (height, width) = VaeConfig(), (384, 320)
    if tiny:
        config = dataclasses.replace(config, **TINY)
        vae_config, (height, width) = VaeConfig(**TINY_VAE), (64, 64)
    vae_params = abstract_vae_params(vae_config)
    tower = WanVae(random_like({name: vae_params[name] for name in ("encoder", "to_latent")}), vae_config)
    images = jax.random.uniform(jax.random.key(0), (1, 9, height, width, 3), minval=-1)

    def encode(tower: WanVae, images: jax.Array) -> jax.Array:
        return tower.encode(images)

    model = AhaWam(config)
    whole = abstract_params(config)
    params = random_like({name: whole[name] for name in ("planner", "branch_embedding")})
    rows, columns = height // SPATIAL_STRIDE, width // SPATIAL_STRIDE
    latents = jax.random.normal(jax.random.key(1), (1, config.latent_channels, 1, rows, columns))
    text = jax.random.normal(jax.random.key(2), (1, 128, config.text_dim))
    mask, position = jnp.ones((1, 128), bool), jnp.zeros(1, jnp.int32)
    tokens = rows * columns // PATCH**2
    memory = empty_memory(config, 1, tokens)
    memory = memory.replace(valid=jnp.ones_like(memory.valid))

    def plan(params: Any, latents: jax.Array) -> Any:
        out = model.apply({"params": params}, latents, position[:, None], position[:, None], text, mask, method="plan")
        return out.context

    def refresh(params: Any, latents: jax.Array, memory: Any) -> Any:
        return model.apply({"params": params}, latents, position, text, mask, memory, method="refresh")

    return {
        "VAE encode, 1 image": (encode, (tower, images[:, :1]), tower.params, 0),
        "VAE encode, 9 frames": (encode, (tower, images), tower.params, 0),
        "planner refresh, no memory": (plan, (params, latents), params["planner"], tokens),
        f"planner refresh, {config.memory_frames} frames": (
            refresh, (params, latents, memory), params["planner"], tokens
        ),  # fmt: skip
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slow_stream", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in seconds")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls per stage (default %(default)s)")
    options = parser.parse_args()
    bandwidth = copy_gb_per_s(0.02 if options.tiny else 2)
    flops = matmul_tflops(256 if options.tiny else 8192)
    print(f"{describe()}\ncopy {bandwidth:,.0f} GB/s, bfloat16 matrix product {flops:,.2f} TFLOP/s\n")
    print("| stage | median ms | weights, GB | TFLOP | floor ms | times the floor | temporaries, GB |")
    print("|---" * 7 + "|")
    for name, (function, arguments, weights, tokens) in stages(options.tiny).items():
        compiled = jax.jit(function).lower(*arguments).compile()
        size = sum(x.nbytes for x in flatten(weights).values()) / 1e9
        # XLA counts a scanned layer once; the planner's products are two operations per weight and token.
        work = 1e-3 * size * tokens if tokens else compiled.cost_analysis()["flops"] / 1e12
        took = median_ms(lambda run=compiled, inputs=arguments: run(*inputs), options.repeats)
        floor = 1e3 * max(size / bandwidth, work / flops)
        scratch = compiled.memory_analysis().temp_size_in_bytes / 1e9
        print(f"| {name} | {took:.2f} | {size:.3f} | {work:.3f} | {floor:.2f} | {took / floor:.1f} | {scratch:.2f} |")


if __name__ == "__main__":
    main()
