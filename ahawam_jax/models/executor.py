"""Executor: the action diffusion transformer with layerwise joint attention (Sec. 3.1, Eq. 3)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ahawam_jax.models.attention import own_tokens, rotary_angles_1d
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.models.dit import (
    KV,
    RESIDUAL_AXES,
    Block,
    Condition,
    Given,
    TextEmbedding,
    TimeEmbedding,
    committed_rows,
    dense,
    make_blocks,
    make_text_context,
    read_text,
    scan_blocks,
)
from ahawam_jax.models.memory import PlannerContext
from ahawam_jax.models.partitioning import constrain


class Executor(nn.Module):
    """The action DiT. A chunk's tokens attend to each other and to that chunk's routed planner context."""

    config: ModelConfig
    deployed: bool = False  # see `models/deployment.py`

    def setup(self):
        cfg = self.config
        dtype, zeros = jnp.dtype(cfg.dtype), nn.initializers.zeros_init()
        self.action_encoder = dense(cfg.executor_dim, (None, "embed"), name="action_encoder", dtype=dtype)
        self.time_embedding = TimeEmbedding(cfg.executor_dim, cfg.freq_dim)
        self.text_embedding = TextEmbedding(cfg.executor_dim, dtype)
        self.text_context = make_text_context(cfg) if self.deployed else None
        self.blocks = make_blocks(cfg, "executor", self.deployed)
        self.head = dense(cfg.action_dim, ("embed", None), name="head", dtype=jnp.float32, kernel_init=zeros)

    def __call__(
        self,
        actions: jax.Array,
        times: jax.Array,
        positions: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        states: jax.Array,
        routed: PlannerContext,
        branch: jax.Array,
        committed: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts velocity or clean actions (config.prediction) of C chunks.

        Args:
          actions: [B, C, T, d] noisy actions, T of one chunk.
          times: [B, C] diffusion time of each chunk in [0, 1000].
          positions: [C, T] position of each action, counted from the start of the horizon.
          text: [B, K, X]; text_mask: [B, K] bool.
          states: [B, C, X] one state token per chunk; a chunk sees its own only.
          routed: planner context after routing, k and v [L, B, C, S, N, H].
          branch: [D] what marks every token as one of the action branch.
          committed: [B, C] int, how many actions at the beginning of each chunk are clean, at time 0; None: none.

        Returns:
          [B, C, T, d] float32.
        """
        batch, chunks = actions.shape[:2]
        _, rows = self.time_embedding(times)
        if committed is not None:
            _, clean = self.time_embedding(jnp.zeros_like(times[:, :1]))
            rows = committed_rows(rows, clean, committed, actions.shape[2])
        own = jnp.broadcast_to(jnp.eye(chunks, dtype=bool), (batch, chunks, chunks))
        seen = jnp.broadcast_to(text_mask[:, None], (batch, chunks, text.shape[1]))
        tokens = jnp.concatenate([text, states.astype(text.dtype)], 1)
        condition = Condition(
            angles=rotary_angles_1d(positions, self.config.head_dim)[None],
            text_mask=jnp.concatenate([seen, own], -1),
            modulation=rows,
            text=self.text_embedding(tokens),
        )
        return self.run(_layer, actions, branch, (routed.k, routed.v), condition)[0]

    def step(
        self, actions: jax.Array, positions: jax.Array, text_mask: jax.Array, branch: jax.Array, seen: list[KV],
        given: list[Given],
    ) -> jax.Array:  # fmt: skip
        """Predicts one chunk, C = 1, from what was made before. Returns [B, 1, T, d] float32.

        seen: by layer k, v [B, 1, S, N, H], the routed context. given: by layer; k, v are those of the text and of the
        state. text_mask: [B, M] bool, see `with_state`.
        """
        angles = rotary_angles_1d(positions, self.config.head_dim)[None]
        condition = Condition(angles, text_mask[:, None], own=own_tokens(seen[0][0].shape[2], actions.shape[2]))
        return self.run(_layer_of_given, actions, branch, list(zip(seen, given, strict=True)), condition)[0]

    def read(self, text: jax.Array) -> KV:
        """Text or state tokens [B, K, X] -> k, v [L, B, K, N, H] of every layer's cross-attention."""
        return read_text(self.config, self.text_context, self.text_embedding(text))

    def run(
        self, layer: Callable[..., Any], actions: jax.Array, branch: jax.Array, of_layer: Any, condition: Condition
    ) -> tuple[jax.Array, Any]:
        cfg = self.config
        if actions.shape[-1] != cfg.action_dim:
            raise ValueError(
                f"Actions are {actions.shape[-1]} wide but this executor was built for action_dim {cfg.action_dim}; "
                "set config.model.action_dim to the dataset's width."
            )
        x = self.action_encoder(actions)
        self.sow("intermediates", "tokens", x)
        self.sow("intermediates", "condition", condition)
        x = constrain(x + branch.astype(x.dtype), RESIDUAL_AXES)
        x, out = scan_blocks(cfg, "executor", self.blocks, layer, x, of_layer, condition)
        self.sow("intermediates", "x", x)
        return self.head(x), out


def _layer(block: Block, x: jax.Array, prefix: KV, condition: Condition) -> tuple[jax.Array, None]:
    return block(x, prefix, condition)[0], None


def _layer_of_given(
    block: Block, x: jax.Array, of_layer: tuple[KV, Given], condition: Condition
) -> tuple[jax.Array, None]:
    seen, given = of_layer
    return block(x, seen, condition, given)[0], None
