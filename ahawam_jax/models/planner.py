"""Planner: the video diffusion transformer (Wan2.2-5B) and its layerwise K/V (Sec. 3.1, Eq. 2)."""

from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ahawam_jax.models.attention import rotary_angles_3d
from ahawam_jax.models.config import PATCH, ModelConfig
from ahawam_jax.models.dit import (
    PLANNED,
    RESIDUAL_AXES,
    Block,
    Condition,
    TextEmbedding,
    TimeEmbedding,
    cast_once,
    dense,
    modulate,
    scan_blocks,
)
from ahawam_jax.models.memory import PlannerContext, PlannerMemory
from ahawam_jax.models.partitioning import constrain, partitioned

KV = tuple[jax.Array, jax.Array]
RECALL = "recall"  # in the names of operations: what is spent on the history can be told from the rest


def patchify(latents: jax.Array) -> jax.Array:
    """Latents [B, c, F, h, w] -> 2x2 patches [B, F, S, c*4], S = h/2 * w/2; a patch is read as (c, dy, dx)."""
    batch, channels, frames, height, width = latents.shape
    x = latents.reshape(batch, channels, frames, height // PATCH, PATCH, width // PATCH, PATCH)
    x = x.transpose(0, 2, 3, 5, 1, 4, 6)
    return x.reshape(batch, frames, -1, channels * PATCH * PATCH)


def unpatchify(patches: jax.Array, height: int, width: int) -> jax.Array:
    """Patches [B, F, S, 4*c], each written as (dy, dx, c), -> latents [B, c, F, height, width]."""
    batch, frames = patches.shape[:2]
    x = patches.reshape(batch, frames, height // PATCH, width // PATCH, PATCH, PATCH, -1)
    x = x.transpose(0, 6, 1, 2, 4, 3, 5)
    return x.reshape(batch, -1, frames, height, width)


def frame_causal_mask(frames: int, tokens: int, valid: jax.Array | None = None) -> jax.Array:
    """Token mask in which a frame sees itself and earlier frames. [1 or B, F*S, F*S] bool.

    Frames that are not `valid` [B, F] are seen by nobody and see nothing.
    """
    mask = jnp.tril(jnp.ones((1, frames, frames), bool))
    if valid is not None:
        mask = mask & valid[:, :, None] & valid[:, None, :]
    return expand_mask(mask, tokens)


def expand_mask(mask: jax.Array, tokens: int) -> jax.Array:
    """Frame-to-frame mask [..., F_q, F_k] -> token-to-token [..., F_q*S, F_k*S]."""
    return jnp.repeat(jnp.repeat(mask, tokens, -2), tokens, -1)


@flax.struct.dataclass
class PlannerOutput:
    """Velocity of the latents and the layerwise context of every frame of the clip, or of the first alone."""

    velocity: jax.Array  # [B, c, F, h, w] float32
    context: PlannerContext  # k, v [L, B, F or 1, S, N, H]


class Head(nn.Module):
    """Modulated output projection. x [B, F, S, D], time [B, F, D] -> patches [B, F, S, features] float32."""

    features: int
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        dim = x.shape[-1]
        table = self.param("modulation", partitioned(nn.initializers.normal(dim**-0.5), (None, "embed")), (2, dim))
        rows = table + time[:, :, None]  # [B, F, 2, D]
        x = modulate(x, rows[:, :, :1], rows[:, :, 1:], self.eps, jnp.float32)
        zeros = nn.initializers.zeros_init()
        return dense(self.features, ("embed", None), name="out", dtype=jnp.float32, kernel_init=zeros)(x)


@flax.struct.dataclass
class History:
    """Clean frames before a clip, in training; those that are not valid are hidden."""

    latents: jax.Array  # [B, c, W, h, w]
    positions: jax.Array  # [B, W]
    valid: jax.Array  # [B, W] bool


class Planner(nn.Module):
    """The video DiT. One diffusion time per latent frame; the clean current frame has time 0."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        latents: jax.Array,
        times: jax.Array,
        positions: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        mask: jax.Array,
        memory: PlannerMemory | None = None,
        history: History | None = None,
        kept: int | None = None,
    ) -> PlannerOutput:
        """Runs the clip once.

        Args:
          latents: [B, c, F, h, w], h and w even.
          times: [B, F] diffusion times in [0, 1000].
          positions: [B, F] rotary position of each frame, in latent-frame units.
          text: [B, K, X] text tokens; text_mask: [B, K] bool.
          mask: [1 or B, F*S, F*S] bool, which tokens of the clip see which.
          memory: frames every token of the clip may look back on, if any; or
          history: such frames that are not planned yet. They are now, frame-causally, at time 0 and without gradient,
            layer by layer beside the clip, so that sharded weights are gathered once for both (Eq. 13).
          kept: frames, from the first, whose context is handed back; None: all.
        """
        cfg = self.config
        dtype = jnp.dtype(cfg.dtype)
        batch, channels, frames, height, width = latents.shape
        if channels != cfg.latent_channels or height % PATCH or width % PATCH:
            raise ValueError(
                f"Planner latents have shape {latents.shape}; expected [B, {cfg.latent_channels}, F, h, w] "
                f"with h and w multiples of {PATCH}."
            )
        patch_embedding = dense(cfg.planner_dim, (None, "embed"), name="patch_embedding", dtype=dtype)
        time_embedding = TimeEmbedding(cfg.planner_dim, cfg.freq_dim, name="time_embedding")
        embedded = TextEmbedding(cfg.planner_dim, dtype, name="text_embedding")(text)
        tokens = height // PATCH * (width // PATCH)

        def enter(
            latents: jax.Array, times: jax.Array, positions: jax.Array, mask: jax.Array
        ) -> tuple[jax.Array, jax.Array, Condition]:
            x = constrain(patch_embedding(patchify(latents)), RESIDUAL_AXES)
            self.sow("intermediates", "tokens", x)
            time, rows = time_embedding(times)
            angles = rotary_angles_3d(positions, height // PATCH, width // PATCH, cfg.head_dim)
            condition = Condition(rows, angles, embedded, text_mask[:, None], mask)
            self.sow("intermediates", "time", time)
            self.sow("intermediates", "condition", condition)
            return x, time, condition

        past = memory or history
        if past is not None:
            seen = jnp.repeat(past.valid, tokens, -1)[:, None]  # [B, 1, W*S]
            mask = jnp.concatenate(
                [jnp.broadcast_to(part, (batch, frames * tokens, part.shape[-1])) for part in (seen, mask)], -1
            )
        if history is not None:
            causal = frame_causal_mask(history.latents.shape[2], tokens, history.valid)
            with jax.named_scope(RECALL):
                before, _, condition_before = enter(
                    history.latents, jnp.zeros(history.positions.shape), history.positions, causal
                )
            x, time, condition = enter(latents, times, positions, mask)
            (_, x), (k, v) = scan_blocks(
                cfg, "planner", cast_once(partial(_layer_with_history, kept), dtype),
                (jax.lax.stop_gradient(before), x), None, (jax.lax.stop_gradient(condition_before), condition),
            )  # fmt: skip
        else:
            prefix = None if memory is None else tuple(_joined(y, 2) for y in (memory.context.k, memory.context.v))
            x, time, condition = enter(latents, times, positions, mask)
            x, (k, v) = scan_blocks(cfg, "planner", partial(_layer, kept), x, prefix, condition)
        patches = Head(PATCH * PATCH * channels, cfg.norm_eps, name="head")(x, time)
        return PlannerOutput(unpatchify(patches, height, width), PlannerContext(k, v))


def _layer(kept: int | None, block: Block, x: jax.Array, prefix: KV | None, condition: Condition) -> tuple[Any, KV]:
    x, (k, v) = block(x, prefix, condition)
    return x, (k[:, :kept], v[:, :kept])


def _layer_with_history(
    kept: int | None, block: Block, x: tuple[jax.Array, jax.Array], _: None, conditions: tuple[Condition, Condition]
) -> tuple[tuple[jax.Array, jax.Array], KV]:
    """The history's tokens go through the block, then the clip's, which look back on them."""
    before, now = x
    with jax.named_scope(RECALL):
        before, kv = jax.lax.stop_gradient(block(before, None, conditions[0]))
    k, v = checkpoint_name(kv, PLANNED)
    now, out = _layer(kept, block, now, (_joined(k, 1), _joined(v, 1)), conditions[1])
    return (before, now), out


def _joined(x: jax.Array, axis: int) -> jax.Array:
    """Frames one behind the other: [..., F, S, N, H] -> [..., F*S, N, H], F at `axis`."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
