"""Sampling a chunk of actions from a routed planner context."""

from typing import Any

import jax
import jax.numpy as jnp

from ahawam_jax import flow_matching
from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.memory import PlannerContext


def denoise(
    model: AhaWam,
    params: Any,
    noise: jax.Array,
    positions: jax.Array,
    text: jax.Array,
    text_mask: jax.Array,
    states: jax.Array,
    routed: PlannerContext,
    steps: int,
    shift: float,
) -> jax.Array:
    """Euler steps of the executor from noise to actions (Eq. 5).

    noise [B, C, T, d], positions [C, T] counted from the refresh, states [B, C, p] normalised,
    routed [L, B, C, S, N, H] -> normalised actions [B, C, T, d].
    """

    def predict(x: jax.Array, time: jax.Array) -> jax.Array:
        times = jnp.broadcast_to(time, x.shape[:2])
        return model.apply(
            {"params": params}, x, times, positions, text, text_mask, states, routed, method="act"
        )

    levels = flow_matching.noise_levels(steps, shift)
    return flow_matching.euler(predict, noise, levels, model.config.prediction)[0]
