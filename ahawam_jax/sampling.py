"""Sampling: a chunk of actions from a routed planner context, or a video from the planner alone."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ahawam_jax import flow_matching
from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.config import FRAMES_PER_LATENT
from ahawam_jax.models.deployment import Deployed, Words, by_layer, give, give_committed, with_state
from ahawam_jax.models.memory import PlannerContext

Actor = Callable[[jax.Array, jax.Array], jax.Array]


def actor(
    model: AhaWam, params: Any, positions: jax.Array, text: jax.Array, text_mask: jax.Array, states: jax.Array,
    routed: PlannerContext, present: ArrayLike = True, *count: jax.Array,
) -> Actor:  # fmt: skip
    """The executor as a function of x [B, C, T, d] and times that broadcast to [B, C]; the rest as in `denoise`."""

    def act(x: jax.Array, times: jax.Array) -> jax.Array:
        inputs = x, jnp.broadcast_to(times, x.shape[:2]), positions, text, text_mask, states, routed, *count
        # XLA drops it where the constant True stands.
        return jnp.where(present, model.apply({"params": params}, *inputs, method="act"), 0.0)

    return act


@flax.struct.dataclass
class Committed:
    """The beginning of chunks that is given: what a robot runs while they are computed."""

    actions: jax.Array  # [B, C, T, d] normalised, of which the first `count` of every chunk are read
    count: jax.Array  # int32 [B, C]

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, C, T, d], its first actions replaced by those that are given."""
        first = jnp.arange(x.shape[2]) < self.count[..., None]
        return jnp.where(first[..., None], self.actions, x)


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
    present: ArrayLike = True,
    committed: Committed | None = None,
) -> jax.Array:
    """Euler steps of the executor from noise to actions (Eq. 5).

    noise [B, C, T, d], positions [C, T] counted from the refresh, states [B, C, p] normalised,
    routed [L, B, C, S, N, H] -> normalised actions [B, C, T, d]. present: bool, broadcasts against the noise, which
    numbers of an action the robot has; the others are 0 at every step, as in training. committed: for a model that was
    trained with committed actions; they stay as they are given through all steps.
    """
    count = () if committed is None else (committed.count,)
    act = actor(model, params, positions, text, text_mask, states, routed, present, *count)

    def fix(x: jax.Array) -> jax.Array:
        return x if committed is None else jnp.where(present, committed(x), 0.0)

    levels = flow_matching.noise_levels(steps, shift)
    return flow_matching.euler(act, jnp.where(present, noise, 0.0), levels, model.config.prediction, fix)[0]


def denoise_deployed(
    model: AhaWam,
    deployed: Deployed,
    noise: jax.Array,
    positions: jax.Array,
    words: Words,
    states: jax.Array,
    routed: PlannerContext,
    shift: float,
    present: ArrayLike = True,
    continued: Committed | flow_matching.Guide | None = None,
) -> jax.Array:
    """`denoise` of one chunk, C = 1, in the deployment form: what the steps share is made before the first.

    continued: what the chunk goes on from, as committed actions or as where every step is pulled.
    """
    committed = continued if isinstance(continued, Committed) else None
    guide = continued if isinstance(continued, flow_matching.Guide) else None

    def apply(method: str, *inputs: Any) -> Any:
        return model.apply({"params": deployed.params}, *inputs, method=method)

    text, mask = with_state(words, apply("read_state", states))

    seen = by_layer(routed.k, routed.v)

    def body(x: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        level, delta, rows = at
        rows = jax.lax.optimization_barrier(rows)  # out of the table once; no norm is fused with that
        given = give(rows, text)
        if committed is not None:
            given = give_committed(given, deployed.clean_rows[0], committed.count, noise.shape[2])

        def predict(x: jax.Array) -> jax.Array:
            return jnp.where(present, apply("step", x, positions, mask, seen, given), 0.0)

        if guide is not None:
            x = flow_matching.guided_step(predict, x, level, delta, model.config.prediction, guide)
            return jnp.where(present, x, 0.0), None  # the pull reaches what the robot has not, too
        return fix(flow_matching.euler_step(predict(x), x, level, delta, model.config.prediction)[0]), None

    def fix(x: jax.Array) -> jax.Array:
        return x if committed is None else jnp.where(present, committed(x), 0.0)

    start = fix(jnp.where(present, noise, 0.0))
    levels = flow_matching.noise_levels(len(deployed.executor_rows), shift)
    steps = (*flow_matching.euler_schedule(levels), deployed.executor_rows)
    return jax.lax.scan(body, start, steps)[0]


def imagine(
    model: AhaWam,
    params: Any,
    first: jax.Array,
    noise: jax.Array,
    text: jax.Array,
    text_mask: jax.Array,
    steps: int,
    shift: float,
    causal: bool = True,
) -> jax.Array:
    """Euler steps of the planner: the future that it believes follows the current frame.

    first [B, c, 1, h, w] latents of the current frame, noise [B, c, n, h, w] -> latents [B, c, 1 + n, h, w]. The
    current frame stays clean, at time 0, as in training. Rotary positions count video frames, as in training.
    causal=False is for a planner that is still plain Wan2.2, which counts latents.
    """
    frames = 1 + noise.shape[2]
    later = jnp.arange(frames) > 0
    positions = jnp.arange(frames) * (FRAMES_PER_LATENT if causal else 1)
    positions = jnp.broadcast_to(positions, (first.shape[0], frames))

    def predict(x: jax.Array, time: jax.Array) -> jax.Array:
        times = jnp.broadcast_to(time * later, positions.shape)
        out = model.apply(
            {"params": params}, x, times, positions, text, text_mask, causal, method="plan"
        )
        return out.velocity * later[:, None, None]

    levels = flow_matching.noise_levels(steps, shift)
    return flow_matching.euler(predict, jnp.concatenate([first, noise], 2), levels, "velocity")[0]
