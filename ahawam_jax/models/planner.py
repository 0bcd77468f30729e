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
    KV,
    PLANNED,
    RESIDUAL_AXES,
    Block,
    Condition,
    Given,
    TextEmbedding,
    TimeEmbedding,
    cast_once,
    dense,
    make_blocks,
    make_text_context,
    modulate,
    read_text,
    scan_blocks,
)
from ahawam_jax.models.memory import PlannerContext, PlannerMemory
from ahawam_jax.models.partitioning import constrain, partitioned

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
    deployed: bool = False  # see `models/deployment.py`

    def setup(self):
        cfg = self.config
        dtype = jnp.dtype(cfg.dtype)
        self.patch_embedding = dense(cfg.planner_dim, (None, "embed"), name="patch_embedding", dtype=dtype)
        self.time_embedding = TimeEmbedding(cfg.planner_dim, cfg.freq_dim)
        self.text_embedding = TextEmbedding(cfg.planner_dim, dtype)
        self.text_context = make_text_context(cfg) if self.deployed else None
        self.blocks = make_blocks(cfg, "planner", self.deployed)
        self.head = Head(PATCH * PATCH * cfg.latent_channels, cfg.norm_eps)

    def __call__(
        self,
        latents: jax.Array,
        times: jax.Array,
        positions: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        mask: jax.Array,
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
          history: frames before the clip that every token of it may look back on, if any. They are planned here,
            frame-causally, at time 0 and without gradient, layer by layer beside the clip, so that sharded weights are
            gathered once for both (Eq. 13).
          kept: frames, from the first, whose context is handed back; None: all.
        """
        cfg = self.config
        batch, _, frames, height, width = latents.shape
        tokens = height // PATCH * (width // PATCH)
        text = self.text_embedding(text)
        if history is None:
            x, time, condition = self.enter(latents, times, positions, text, text_mask, mask)
            x, (k, v) = scan_blocks(cfg, "planner", self.blocks, partial(_layer, kept), x, None, condition)
        else:
            seen = jnp.repeat(history.valid, tokens, -1)[:, None]  # [B, 1, W*S]
            mask = jnp.concatenate(
                [jnp.broadcast_to(part, (batch, frames * tokens, part.shape[-1])) for part in (seen, mask)], -1
            )
            causal = frame_causal_mask(history.latents.shape[2], tokens, history.valid)
            with jax.named_scope(RECALL):
                before, _, condition_before = self.enter(
                    history.latents, jnp.zeros(history.positions.shape), history.positions, text, text_mask, causal
                )
            x, time, condition = self.enter(latents, times, positions, text, text_mask, mask)
            (_, x), (k, v) = scan_blocks(
                cfg, "planner", self.blocks, cast_once(partial(_layer_with_history, kept), jnp.dtype(cfg.dtype)),
                (jax.lax.stop_gradient(before), x), None, (jax.lax.stop_gradient(condition_before), condition),
            )  # fmt: skip
        return PlannerOutput(unpatchify(self.head(x, time), height, width), PlannerContext(k, v))

    def refresh(
        self, latents: jax.Array, position: jax.Array, text: jax.Array | None, text_mask: jax.Array,
        memory: PlannerMemory, given: list[Given] | None = None, x: jax.Array | None = None,
    ) -> tuple[PlannerContext, PlannerMemory, jax.Array]:  # fmt: skip
        """Plans one clean frame, which reads the memory and joins it (Eq. 13).

        latents [B, c, 1, h, w], position [B] -> context [L, B, 1, S, N, H], the memory for the next refresh, and the
        tokens [B, 1, S, D] behind the last layer. given: what has been made of time 0 and of the text, which then is
        None. x: tokens before the first layer, where they are not those of the frame: see `inference/slices.py`.
        """
        cfg, batch = self.config, len(latents)
        shape, slot = memory.k[0].shape, memory.slot(cfg.memory_anchor)
        valid = memory.valid | (jnp.arange(shape[1]) == slot)
        # Of tokens, made once; as part of every layer's softmax, XLA (JAX 0.10.2) runs that in three kernels.
        mask = jax.lax.optimization_barrier(jnp.repeat(valid, shape[2], -1)[:, None])
        place = slot * shape[2]
        times = None
        if given is None:
            times, text, given = jnp.zeros((batch, 1)), self.text_embedding(text), [None] * cfg.num_layers
        entered, _, condition = self.enter(latents, times, position[:, None], text, text_mask, mask, place)
        rings = [tuple(_joined(x, 1) for x in kv) for kv in zip(memory.k, memory.v, strict=True)]
        of_layer = list(zip(rings, given, strict=True))
        x = entered if x is None else x
        x, outs = scan_blocks(cfg, "planner", self.blocks, _layer_of_ring, x, of_layer, condition)
        own, rings = zip(*outs, strict=True)
        k, v = (tuple(x.reshape(shape) for x in xs) for xs in zip(*rings, strict=True))
        context = PlannerContext(*(jnp.stack(xs) for xs in zip(*own, strict=True)))
        return context, PlannerMemory(k, v, valid, memory.written + 1), x

    def read(self, text: jax.Array) -> KV:
        """Text tokens [B, K, X] -> k, v [L, B, K, N, H] of every layer's cross-attention."""
        return read_text(self.config, self.text_context, self.text_embedding(text))

    def enter(
        self, latents: jax.Array, times: jax.Array | None, positions: jax.Array, text: jax.Array | None,
        text_mask: jax.Array, mask: jax.Array, place: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None, Condition]:  # fmt: skip
        """Tokens [B, F, S, D] of a clip, the embedding of its times, and what its blocks see."""
        cfg = self.config
        _, channels, _, height, width = latents.shape
        if channels != cfg.latent_channels or height % PATCH or width % PATCH:
            raise ValueError(
                f"Planner latents have shape {latents.shape}; expected [B, {cfg.latent_channels}, F, h, w] "
                f"with h and w multiples of {PATCH}."
            )
        x = constrain(self.patch_embedding(patchify(latents)), RESIDUAL_AXES)
        self.sow("intermediates", "tokens", x)
        time, rows = (None, None) if times is None else self.time_embedding(times)
        angles = rotary_angles_3d(positions, height // PATCH, width // PATCH, cfg.head_dim)
        condition = Condition(angles, text_mask[:, None], rows, text, mask, place)
        self.sow("intermediates", "time", time)
        self.sow("intermediates", "condition", condition)
        return x, time, condition


def _layer(kept: int | None, block: Block, x: jax.Array, prefix: KV | None, condition: Condition) -> tuple[Any, KV]:
    x, (k, v), _ = block(x, prefix, condition)
    return x, (k[:, :kept], v[:, :kept])


def _layer_with_history(
    kept: int | None, block: Block, x: tuple[jax.Array, jax.Array], _: None, conditions: tuple[Condition, Condition]
) -> tuple[tuple[jax.Array, jax.Array], KV]:
    """The history's tokens go through the block, then the clip's, which look back on them."""
    before, now = x
    with jax.named_scope(RECALL):
        before, kv, _ = jax.lax.stop_gradient(block(before, None, conditions[0]))
    k, v = checkpoint_name(kv, PLANNED)
    now, out = _layer(kept, block, now, (_joined(k, 1), _joined(v, 1)), conditions[1])
    return (before, now), out


def _layer_of_ring(
    block: Block, x: jax.Array, of_layer: tuple[KV, Given | None], condition: Condition
) -> tuple[jax.Array, tuple[KV, KV]]:
    ring, given = of_layer
    x, own, ring = block(x, ring, condition, given)
    return x, (own, ring)


def _joined(x: jax.Array, axis: int) -> jax.Array:
    """Frames one behind the other: [..., F, S, N, H] -> [..., F*S, N, H], F at `axis`."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
