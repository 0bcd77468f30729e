"""Executor: the action diffusion transformer with layerwise joint attention (Sec. 3.1, Eq. 3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ahawam_jax.models.attention import rotary_angles_1d
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.models.dit import (
    RESIDUAL_AXES,
    Block,
    Condition,
    TextEmbedding,
    TimeEmbedding,
    dense,
    scan_blocks,
)
from ahawam_jax.models.memory import PlannerContext
from ahawam_jax.models.partitioning import constrain


class Executor(nn.Module):
    """The action DiT. A chunk's tokens attend to each other and to that chunk's routed planner context."""

    config: ModelConfig

    @nn.compact
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

        Returns:
          [B, C, T, d] float32.
        """
        cfg = self.config
        dtype = jnp.dtype(cfg.dtype)
        batch, chunks = actions.shape[:2]
        if actions.shape[-1] != cfg.action_dim:
            raise ValueError(
                f"Actions are {actions.shape[-1]} wide but this executor was built for action_dim {cfg.action_dim}; "
                "set config.model.action_dim to the dataset's width."
            )
        x = dense(cfg.executor_dim, (None, "embed"), name="action_encoder", dtype=dtype)(actions)
        self.sow("intermediates", "tokens", x)
        x = constrain(x + branch.astype(dtype), RESIDUAL_AXES)
        _, rows = TimeEmbedding(cfg.executor_dim, cfg.freq_dim, name="time_embedding")(times)
        own = jnp.broadcast_to(jnp.eye(chunks, dtype=bool), (batch, chunks, chunks))
        seen = jnp.broadcast_to(text_mask[:, None], (batch, chunks, text.shape[1]))
        tokens = jnp.concatenate([text, states.astype(text.dtype)], 1)
        condition = Condition(
            modulation=rows,
            angles=rotary_angles_1d(positions, cfg.head_dim)[None],
            text=TextEmbedding(cfg.executor_dim, dtype, name="text_embedding")(tokens),
            text_mask=jnp.concatenate([seen, own], -1),
        )
        self.sow("intermediates", "condition", condition)
        x, _ = scan_blocks(cfg, "executor", _layer, x, (routed.k, routed.v), condition)
        self.sow("intermediates", "x", x)
        zeros = nn.initializers.zeros_init()
        return dense(cfg.action_dim, ("embed", None), name="head", dtype=jnp.float32, kernel_init=zeros)(x)


def _layer(
    block: Block, x: jax.Array, prefix: tuple[jax.Array, jax.Array], condition: Condition
) -> tuple[jax.Array, None]:
    return block(x, prefix, condition)[0], None
