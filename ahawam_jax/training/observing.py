"""What the executor denoises against, made once for a batch by planner and router as they are deployed."""

from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp

from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.memory import PlannerContext
from ahawam_jax.sampling import Actor, actor
from ahawam_jax.training.objective import history_of, masked_mean, present_numbers, read_by_executor, window


@flax.struct.dataclass
class Observed:
    """The chunks of a batch, C of every sample, and their context. What is called normalised is float32."""

    text: jax.Array  # [B, K, X]
    text_mask: jax.Array  # bool [B, K]
    positions: jax.Array  # int32 [C, T], counted from the chunks' start
    states: jax.Array  # [B, C, p], normalised
    routed: PlannerContext  # [L, B, C, S, N, H], or the planner's own
    actions: jax.Array  # [B, C, T, d], as recorded, normalised
    keep: jax.Array  # bool [B, C, T], which of them are not padding
    present: jax.Array  # bool [B, 1, 1, d], which numbers of an action the sample's robot has

    def actor(self, model: AhaWam, params: Any) -> Actor:
        """The executor of `params` on this context; see `sampling.actor`."""
        given = self.positions, self.text, self.text_mask, self.states, self.routed
        return actor(model, params, *given, self.present)

    def deviation(self, sampled: jax.Array, wanted: jax.Array) -> jax.Array:
        """Mean |sampled - wanted|, both [B, C, T, d], over all that is no padding, of the numbers that are present."""
        each = masked_mean(jnp.abs(sampled - wanted), self.present)
        return jnp.where(self.keep, each, 0).sum() / jnp.maximum(self.keep.sum(), 1)


def observe(
    model: AhaWam, params: Any, batch: Mapping[str, jax.Array], draws: int = 1, routing: bool = True
) -> Observed:
    """Plans the current frame of every sample, without noise, and routes it to every chunk.

    batch: as in `joint_loss`; of the clip only the first frame is read, since it sees no later one.
    draws: how often every chunk stands in the horizon, to be denoised from noise of its own: C = draws * chunks.
    routing: see `read_by_executor`.
    """
    text, text_mask = batch["context"], batch["context_mask"]
    latents, positions = batch["input_latents"][:, :, :1], batch["video_temporal_position_ids"][:, :1]
    chunks, length = batch["obs_latents"].shape[1], model.config.chunk
    horizon = chunks * length

    def apply(method: str, *inputs: Any, **options: Any) -> Any:
        return model.apply({"params": params}, *inputs, **options, method=method)

    def repeated(x: jax.Array, axis: int) -> jax.Array:
        return jnp.concatenate([x] * draws, axis)

    times = jnp.zeros(positions.shape)
    planned = apply("plan", latents, times, positions, text, text_mask, history=history_of(batch))
    routed = read_by_executor(apply, planned.context, batch["obs_latents"], routing)
    start = batch["action_offset"]
    actions = window(batch["action"], start, horizon).reshape(-1, chunks, length, model.config.action_dim)
    keep = ~window(batch["action_is_pad"], start, horizon).reshape(actions.shape[:-1])
    return Observed(
        text, text_mask, repeated(jnp.arange(horizon).reshape(chunks, length), 0),
        repeated(window(batch["proprio"], start, horizon)[:, ::length], 1),
        jax.tree.map(lambda x: repeated(x, 2), routed), repeated(actions, 1), repeated(keep, 1),
        present_numbers(batch),
    )  # fmt: skip
