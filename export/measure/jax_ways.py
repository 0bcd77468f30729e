"""The JAX policy's chunk and refresh beside the ways of `export.measure.ladder`; random weights, its dtypes.

Axis letters: B batch, S tokens of one frame, T action tokens, K text tokens, X text width, L layers, W memory frames.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from ahawam_jax.inference.programs import abstract_arguments, jitted, make_programs, tokens_of
from ahawam_jax.models.aha_wam import empty_memory
from ahawam_jax.models.config import SPATIAL_STRIDE
from ahawam_jax.models.deployment import abstract_deployed
from ahawam_jax.towers.building import STAND_INS
from ahawam_jax.towers.vae import WanVae, abstract_vae_params
from export.measure.ladder import Call, Chunk, Refresh
from export.measure.models import BATCH, Models


def jax_ways(models: Models, steps: Sequence[int]) -> tuple[dict[int, Chunk], Refresh]:
    """Ways to make a chunk, by number of steps, and the way to refresh; sizes are those of `models`.

    Raises ValueError where PyTorch has a GPU and JAX has none.
    """
    if jax.default_backend() != ("gpu" if models.device.type == "cuda" else "cpu"):
        raise ValueError(
            f"PyTorch runs on {models.device.type}, JAX on {jax.default_backend()}; install JAX for this GPU "
            "(jax[cuda12] or jax[cuda13]), or leave it out with --jax=without."
        )
    config, shift = models.config, models.run.objective.shift
    if models.vae_config is None:
        tower = STAND_INS[models.run.towers.video]
    else:
        weights = nn.unbox(abstract_vae_params(models.vae_config))
        weights = {name: weights[name] for name in ("encoder", "to_latent")}
        weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), weights)
        tower = WanVae(random_like(weights, models.device), models.vae_config)
    held = random_like(abstract_deployed(config, max(steps)), models.device)
    size = tuple(SPATIAL_STRIDE * n for n in models.grid)
    text, mask = (jnp.asarray(x.float().cpu().numpy()) for x in (models.text, models.text_mask))
    programs = jitted(make_programs(config, shift))
    words = programs.read(held, text, mask > 0)
    context = abstract_arguments(config, held, tower, size, text).act[1]
    context = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), context)
    memory = empty_memory(config, BATCH, tokens_of(size))
    memory = memory.replace(valid=jnp.ones_like(memory.valid))

    def make(count: int) -> Chunk:
        of_steps = held.replace(executor_rows=held.executor_rows[:count])
        key = jax.random.key(0)

        def chunk(call: Call) -> np.ndarray:
            # What a call of the policy runs on the device, without composing its cameras' pictures.
            latents, start = programs.encode(tower, call.canvas.numpy()), np.int32(call.start)
            return np.asarray(programs.act(of_steps, context, latents, call.state.numpy(), words, start, key))

        return chunk

    def refresh(latents: Tensor, frame: int) -> Any:
        nonlocal memory
        position = np.full(BATCH, frame, np.int32)
        made, memory = programs.refresh(held, jnp.from_dlpack(latents)[:, :, None], position, words, memory)
        return jax.block_until_ready(made)

    return {count: make(count) for count in steps}, refresh


def random_like(tree: Any, device: torch.device) -> Any:
    """Small random numbers in the shapes and dtypes of a tree, drawn by PyTorch on the device that both share.

    JAX would compile its generator for every shape.
    """

    def leaf(x: jax.ShapeDtypeStruct) -> jax.Array:
        drawn = torch.empty(x.shape, dtype=getattr(torch, x.dtype.name), device=device).normal_(std=0.02)
        return jnp.from_dlpack(drawn)

    return jax.tree.map(leaf, tree)
