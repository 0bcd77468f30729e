"""Observation-Guided Video-Context Routing, OVCR (Sec. 3.2, Eq. 8-10).

The newest observation becomes Q queries; in every layer they read the planner context of the current frame, and
the frame's tokens read the result back. What comes of it, gated, is added to the frame's keys and values.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ahawam_jax.models.attention import attention
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.models.dit import SMALL_NET_EPS, SmallNet, dense, layer_norm, over_layers, remat
from ahawam_jax.models.memory import PlannerContext
from ahawam_jax.models.partitioning import partitioned


class QueryEncoder(nn.Module):
    """Learned queries read the observation (Eq. 8). seen [B, C, P, X] -> queries [B, C, Q, X]."""

    num_queries: int
    dim: int
    dtype: Any

    @nn.compact
    def __call__(self, seen: jax.Array) -> jax.Array:
        init = partitioned(nn.initializers.normal(0.02), (None, "embed"))
        base = self.param("base_queries", init, (self.num_queries, self.dim)).astype(self.dtype)
        y = layer_norm("key_norm", SMALL_NET_EPS, None)(seen)
        keys = dense(self.dim, ("embed", "mlp"), name="key", dtype=self.dtype)(y)
        values = SmallNet(self.dim, self.dim, self.dtype, name="value")(seen)
        scores = jnp.einsum("qx,bcpx->bcqp", base, keys, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / math.sqrt(self.dim), -1).astype(self.dtype)
        queries = SmallNet(self.dim, self.dim, self.dtype, name="query")(
            jnp.einsum("bcqp,bcpx->bcqx", weights, values)
        )
        self.sow("intermediates", "queries", queries)
        return queries


class ObservationQueries(nn.Module):
    """Observation latents, one image per chunk, [B, C, c, 1, h, w] -> routing queries [B, C, Q, X]."""

    config: ModelConfig

    def setup(self):
        cfg = self.config
        dtype = jnp.dtype(cfg.dtype)
        self.projection = SmallNet(cfg.text_dim, cfg.text_dim, dtype)
        self.encoder = QueryEncoder(cfg.num_queries, cfg.text_dim, dtype)

    def __call__(self, latents: jax.Array) -> jax.Array:
        pixels = latents.reshape(*latents.shape[:3], -1)  # [B, C, c, h*w]
        return self.encoder(self.projection(pixels.swapaxes(-1, -2)))


class LayerRouter(nn.Module):
    """Routing in one layer (Eq. 9-10). queries [B, C, Q, X], k and v [B, S, N, H] -> k, v [B, C, S, N, H]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, queries: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        heads, width = (cfg.num_heads, cfg.head_dim), cfg.num_heads * cfg.head_dim
        y = layer_norm("query_norm", SMALL_NET_EPS, None)(queries)
        q = dense(heads, ("embed", "heads", "head_dim"), name="query", dtype=dtype)(y)
        frame_k, frame_v = k[:, None], v[:, None]
        gathered = attention(q, frame_k, frame_v)  # queries read the frame
        returned = attention(frame_k, gathered, gathered)  # the frame's tokens read the queries
        net = SmallNet(width, (2, *heads), dtype, ("embed", None, "heads", "head_dim"), name="delta")
        change = net(returned.reshape(*returned.shape[:3], width))  # [B, C, S, 2, N, H]
        delta_k, delta_v = change[..., 0, :, :], change[..., 1, :, :]
        self.sow("intermediates", "change", (delta_k, delta_v))
        gate = nn.sigmoid(self.param("gate", nn.initializers.constant(cfg.initial_gate), ())).astype(k.dtype)
        return frame_k + gate * delta_k, frame_v + gate * delta_v


class Router(nn.Module):
    """LayerRouter in every layer; a layer's routing does not depend on the layer before it."""

    config: ModelConfig

    @nn.compact
    def __call__(self, queries: jax.Array, context: PlannerContext, scanned: bool = False) -> PlannerContext:
        """queries [B, C, Q, X], context of the current frame [L, B, 1, S, N, H] -> routed [L, B, C, S, N, H].

        All layers at once, which is quickest; or scanned, one after the other and with remat, which leaves
        the gradient a third of the memory.
        """
        cfg = self.config
        body = remat(LayerRouter, cfg.remat_of("router")) if scanned else LayerRouter
        layers = body(cfg, name="layers")
        k, v = context.k[:, :, 0], context.v[:, :, 0]
        if scanned:
            scan = over_layers(nn.scan, lambda layer, _, k, v: (None, layer(queries, k, v)), length=cfg.num_layers)
            return PlannerContext(*scan(layers, None, k, v)[1])
        vmap = over_layers(nn.vmap, lambda layer, k, v: layer(queries, k, v), axis_size=cfg.num_layers)
        return PlannerContext(*vmap(layers, k, v))
