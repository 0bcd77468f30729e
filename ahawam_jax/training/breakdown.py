"""What the loss is made of, computed in the step beside it: by noise level, by robot; gradients by component.

Sums over a batch go between devices as one small array. A mean over nothing, as of a robot that no sample of the batch
has, is NaN.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from ahawam_jax.flow_matching import NUM_TRAIN_TIMES

LEVELS = 4  # parts of equal width that noise levels are counted in
COMPONENTS = {  # by the first names of their parameters
    "planner": ("planner",),
    "router": ("router", "observation_queries"),
    "executor": ("executor", "state_encoder", "branch_embedding"),
}


@flax.struct.dataclass
class SampleLosses:
    """The loss before its mean over the batch, and errors before the weight of their noise level."""

    video: jax.Array  # [B], weighted; their mean is the loss
    action: jax.Array  # [B]
    video_error: jax.Array  # [B]
    video_kept: jax.Array  # bool [B], false where all future frames are padding
    action_error: jax.Array  # [draws, B, C]
    action_kept: jax.Array  # bool [B, C], or [draws, B, C] where each draw has its own committed actions


def names(robots: Sequence[str]) -> list[str]:
    """Of the entries of `breakdown`."""
    spans = [f"{100 * i // LEVELS}-{100 * (i + 1) // LEVELS}" for i in range(LEVELS)]
    return [
        *(f"{kind}_error/noise_{span}" for kind in ("video", "action") for span in spans),
        *(f"loss_{kind}/{robot}" for kind in ("video", "action") for robot in robots),
        "history_frames",
        *(f"gradient_norm/{component}" for component in COMPONENTS),
        *(f"gate/{which}" for which in ("mean", "min", "max")),
    ]


def batch_sums(
    losses: SampleLosses, video_times: jax.Array, action_times: jax.Array, batch: Mapping[str, jax.Array], robots: int
) -> jax.Array:
    """[2, M]: sums over the batch, and over how many, of the first M of `names`.

    video_times [B], action_times [draws, B, C]. batch: `robot` [B] int32, its place among the robots;
    `video_history_valid_len` [B] (optional).
    """
    size = len(losses.video)

    def groups(place: jax.Array, count: int, keep: jax.Array) -> jax.Array:
        return (place[..., None] == jnp.arange(count)) & keep[..., None]

    def level(times: jax.Array) -> jax.Array:
        return jnp.clip(times * LEVELS // NUM_TRAIN_TIMES, 0, LEVELS - 1)

    video = groups(level(video_times), LEVELS, losses.video_kept)
    action = groups(level(action_times), LEVELS, losses.action_kept).swapaxes(0, 1).reshape(size, -1, LEVELS)
    errors = losses.action_error.swapaxes(0, 1).reshape(size, -1, 1)
    robot = groups(batch.get("robot", jnp.zeros(size, jnp.int32)), robots, jnp.ones(size, bool))
    history = batch.get("video_history_valid_len", jnp.zeros(size))[:, None]
    sums = [
        jnp.where(video, losses.video_error[:, None], 0), jnp.where(action, errors, 0).sum(1),
        jnp.where(robot, losses.video[:, None], 0), jnp.where(robot, losses.action[:, None], 0), history,
    ]  # fmt: skip
    counts = [video, action.sum(1), robot, robot, jnp.ones((size, 1))]
    rows = [jnp.concatenate([x.astype(jnp.float32) for x in part], 1) for part in (sums, counts)]
    return jnp.stack(rows, 1).sum(0)


def breakdown(sums: jax.Array, gradient: Mapping[str, Any], params: Mapping[str, Any]) -> jax.Array:
    """float32 [len(names)]. sums: of `batch_sums`, over microbatches.  gradient: of what is trained."""
    # Else XLA may share squares with the norm of all, and add those in another order: other bits.
    gradient = jax.lax.optimization_barrier(gradient)

    def norm(parts: Sequence[str]) -> jax.Array:
        return optax.tree.norm([gradient[part] for part in parts if part in gradient] or jnp.zeros(()))

    gates = jax.nn.sigmoid(params["router"]["layers"]["gate"])
    rest = [*(norm(parts) for parts in COMPONENTS.values()), gates.mean(), gates.min(), gates.max()]
    return jnp.concatenate([sums[0] / sums[1], jnp.stack(rest)])
