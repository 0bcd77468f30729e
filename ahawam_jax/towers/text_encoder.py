"""umT5 encoder: the frozen transformer that turns token ids into the text tokens of planner and executor.

Pre-norm blocks without biases. Attention scores are not scaled; each layer adds its own learned bias per bucketed
distance. The residual stream, norms, softmax and position bias are float32; matrix products run in `config.dtype`,
in which the frozen matrices are kept.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ahawam_jax.models.attention import MASKED, rms_norm
from ahawam_jax.models.partitioning import Axes, constrain, partitioned

NORM_EPS = 1e-6
RESIDUAL_AXES = ("batch", None, "activation_embed")


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the encoder; the defaults are umT5-xxl's. Raises ValueError when they cannot form one."""

    vocab: int = 256384
    dim: int = 4096  # X, width of the text tokens
    dim_attn: int = 4096  # all heads together; umT5 does not tie it to dim
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128  # tokens; everything farther shares one bucket per direction
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dim_attn % self.num_heads:
            raise ValueError(f"dim_attn {self.dim_attn} must be a multiple of num_heads {self.num_heads}.")
        if self.num_buckets < 4 or self.num_buckets % 2 or self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"num_buckets {self.num_buckets} and max_distance {self.max_distance} cannot sort distances: expected "
                "an even number of at least 4 buckets and a distance above a quarter of it."
            )


def distance_bucket(offset: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every offset = key position - query position. int [...] -> int64 [...] in [0, buckets).

    Each direction has half of the buckets; of these, half hold one distance each, the others widen geometrically.
    """
    side = buckets // 2
    single = side // 2
    gap = np.abs(offset)
    # Step by step in float32, as the encoder was trained: rounding decides about distances on an edge.
    octaves = np.log(np.maximum(gap, 1).astype(np.float32) / np.float32(single))
    growth = octaves / np.float32(math.log(max_distance / single)) * np.float32(side - single)
    wide = np.minimum(single + growth.astype(np.int64), side - 1)
    return (offset > 0) * side + np.where(gap < single, gap, wide)


class EncoderBlock(nn.Module):
    """Self-attention with position bias, then a gated feed-forward net."""

    config: TextEncoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, buckets: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """x [B, K, X] float32, buckets [K, K] int, mask [B, K] bool over keys -> x and nothing to collect."""
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        heads = (cfg.num_heads, cfg.dim_attn // cfg.num_heads)

        def linear(name: str, y: jax.Array, features: Any, axes: Axes, axis: Any = -1) -> jax.Array:
            init = partitioned(nn.initializers.xavier_uniform(), axes)
            layer = nn.DenseGeneral(
                features, axis=axis, use_bias=False, dtype=dtype, param_dtype=dtype, kernel_init=init, name=name
            )
            return layer(y)

        y = _norm(self, "attn_norm", x)
        q, k, v = (linear(name, y, heads, ("embed", "heads", "head_dim")) for name in "qkv")
        bias_init = partitioned(nn.initializers.normal(0.02), (None, "heads"))
        bias = self.param("position_bias", bias_init, (cfg.num_buckets, cfg.num_heads))[buckets]  # [K, K, N]
        scores = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None], scores + bias.astype(jnp.float32).transpose(2, 0, 1), MASKED)
        mixed = jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores, -1).astype(dtype), v)
        x = x + linear("o", mixed, cfg.dim, ("heads", "head_dim", "embed"), (-2, -1))

        y = _norm(self, "ffn_norm", x)
        gate = nn.gelu(linear("ffn_gate", y, cfg.dim_ffn, ("embed", "mlp")), approximate=True)
        y = gate * linear("ffn_in", y, cfg.dim_ffn, ("embed", "mlp"))
        x = x + linear("ffn_out", y, cfg.dim, ("mlp", "embed"))
        return constrain(x, RESIDUAL_AXES), None


class TextEncoder(nn.Module):
    """Token embedding, L blocks, final norm."""

    config: TextEncoderConfig

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """ids [B, K] int, mask [B, K] bool, true for real tokens -> text tokens [B, K, X] float32.

        Padding is never read; what stands in its own rows means nothing.
        """
        cfg = self.config
        table_init = partitioned(nn.initializers.normal(1.0), (None, "embed"))
        table = self.param("token_embedding", table_init, (cfg.vocab, cfg.dim), jnp.dtype(cfg.dtype))
        place = np.arange(ids.shape[1])
        buckets = jnp.asarray(distance_bucket(place[None] - place[:, None], cfg.num_buckets, cfg.max_distance))
        blocks = nn.scan(
            EncoderBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg, name="blocks")
        x = constrain(table[ids].astype(jnp.float32), RESIDUAL_AXES)
        x, _ = blocks(x, buckets, mask.astype(bool))
        return _norm(self, "norm", x)


def _norm(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """Root-mean-square norm over the last axis, with a scale `name` of the module. [..., X] -> [..., X] float32."""
    scale = module.param(name, partitioned(nn.initializers.ones_init(), ("embed",)), (x.shape[-1],))
    return rms_norm(x[..., None, :], scale, NORM_EPS)[..., 0, :]


def abstract_text_encoder_params(config: TextEncoderConfig) -> Any:
    """Shapes, dtypes and logical axes of every parameter, without allocating anything."""
    key, ids = jax.ShapeDtypeStruct((2,), jnp.uint32), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(TextEncoder(config).init, key, ids, jax.ShapeDtypeStruct((1, 1), bool))["params"]
