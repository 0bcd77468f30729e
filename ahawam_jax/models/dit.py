"""What the planner's and the executor's diffusion transformers share: embeddings, modulation, block.

Tokens come in groups, x [B, G, S, D]: a group is a latent frame for the planner (G = F) and a chunk for the
executor (G = C). All tokens of a group share one diffusion time, so modulation is per group, [B, G, 6, D]; where a
chunk begins with committed actions, which are clean, it is per token, [B, G, S, 6, D].
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ahawam_jax.models.attention import attention, behind, phase, rms_norm, rotate, standardize, turn
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.models.partitioning import Axes, constrain, partitioned
from ahawam_jax.models.products import product, promote, read

SMALL_NET_EPS = 1e-5  # LayerNorm epsilon outside the two transformers
RESIDUAL_AXES = ("batch", None, None, "activation_embed")
KV = tuple[jax.Array, jax.Array]  # keys and values


def dense(features: int | tuple[int, ...], axes: Axes, *, name: str, dtype: Any, axis: int | tuple[int, ...] = -1,
          kernel_init: Callable | None = None) -> nn.DenseGeneral:  # fmt: skip
    """A linear layer with bias. `axes` names the kernel's axes, inputs first; the bias takes the output's."""
    outputs = features if isinstance(features, tuple) else (features,)
    return nn.DenseGeneral(
        features,
        axis=axis,
        dtype=dtype,
        promote_dtype=promote,
        dot_general=product,
        name=name,
        kernel_init=partitioned(kernel_init or nn.initializers.xavier_uniform(), axes),
        bias_init=partitioned(nn.initializers.zeros_init(), axes[-len(outputs) :]),
    )


def layer_norm(name: str, eps: float, axis: str | None = "embed") -> nn.LayerNorm:
    """LayerNorm with scale and bias, in float32."""
    return nn.LayerNorm(
        epsilon=eps,
        dtype=jnp.float32,
        use_fast_variance=False,
        name=name,
        scale_init=partitioned(nn.initializers.ones_init(), (axis,)),
        bias_init=partitioned(nn.initializers.zeros_init(), (axis,)),
    )


class SmallNet(nn.Module):
    """LayerNorm, linear, exact GELU, linear: the shape of every auxiliary network. [..., I] -> [..., *features]."""

    hidden: int
    features: int | tuple[int, ...]
    dtype: Any
    out_axes: Axes = ("mlp", "embed")  # of the second kernel

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = layer_norm("norm", SMALL_NET_EPS, None)(x)
        x = nn.gelu(dense(self.hidden, ("embed", "mlp"), name="hidden", dtype=self.dtype)(x), approximate=False)
        return dense(self.features, self.out_axes, name="out", dtype=self.dtype)(x)


def sinusoid(times: jax.Array, width: int) -> jax.Array:
    """Diffusion times in [0, 1000], [...] -> [..., width] float32: all cosines, then all sines."""
    half = width // 2
    angles = phase(times, 10000.0 ** (-np.arange(half) / half))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class TimeEmbedding(nn.Module):
    """Diffusion times [B, G] -> embedding [B, G, D] and its six modulation rows [B, G, 6, D], float32."""

    dim: int
    freq_dim: int

    @nn.compact
    def __call__(self, times: jax.Array) -> tuple[jax.Array, jax.Array]:
        normal = nn.initializers.normal(0.02)
        x = sinusoid(times, self.freq_dim)
        x = nn.silu(dense(self.dim, (None, "embed"), name="hidden", dtype=jnp.float32, kernel_init=normal)(x))
        x = dense(self.dim, ("embed", "mlp"), name="out", dtype=jnp.float32, kernel_init=normal)(x)
        # Pinned: left to itself, XLA's partitioner (JAX 0.10.2) makes wrong gradients of this on a 2x2x2 mesh.
        x = constrain(x, ("batch", None, "activation_embed"))
        rows = dense((6, self.dim), ("embed", None, "mlp"), name="modulation", dtype=jnp.float32)(nn.silu(x))
        return x, constrain(rows, ("batch", None, None, "activation_embed"))


class TextEmbedding(nn.Module):
    """Text (and state) tokens [B, K, X] -> [B, K, D]."""

    dim: int
    dtype: Any

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        normal = nn.initializers.normal(0.02)
        x = dense(self.dim, ("embed", "mlp"), name="hidden", dtype=self.dtype, kernel_init=normal)(text)
        x = nn.gelu(x, approximate=True)
        return dense(self.dim, ("mlp", "embed"), name="out", dtype=self.dtype, kernel_init=normal)(x)


@flax.struct.dataclass
class Condition:
    """What every block of one transformer sees besides its tokens."""

    angles: jax.Array  # [B, G, S, H/2] float32, rotary
    text_mask: jax.Array  # [B, 1 or G, K] bool
    modulation: jax.Array | None = None  # [B, G, (S,) 6, D] float32; None where blocks are `Given` their own
    text: jax.Array | None = None  # [B, K, D] embedded text (and state) tokens; None likewise
    mask: jax.Array | None = None  # [B, S_q, S_k] bool over prefix and own tokens, or None for all
    place: jax.Array | None = None  # own k, v overwrite those of the prefix from here on; None: they lie behind
    own: jax.Array | None = None  # [S_k] bool, own among prefix and own tokens, where `behind` gains by it


@flax.struct.dataclass
class Given:
    """What one block can compute before it sees a token."""

    rows: jax.Array  # [B, G, (S,) 6, D] float32, its table of modulation added to that of the time
    text_k: jax.Array  # [B, K, N, H]
    text_v: jax.Array


def committed_rows(rows: jax.Array, clean: jax.Array, committed: jax.Array, tokens: int) -> jax.Array:
    """Modulation of chunks whose first actions are committed: those are at time 0, the rest at the chunk's time.

    rows [B, C, 6, D] at the chunk's time, clean [B, 1, 6, D] at time 0, committed int [B, C] -> [B, C, T, 6, D].
    """
    first = jnp.arange(tokens) < committed[..., None]
    return jnp.where(first[..., None, None], clean[:, :, None], rows[:, :, None])


def _six(rows: jax.Array) -> tuple[jax.Array, ...]:
    """Shift, scale and gate of attention, then of the feed-forward net, [B, G, 1 or S, D] each."""
    return tuple(rows[:, :, i, None] if rows.ndim == 4 else rows[:, :, :, i] for i in range(6))


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float, dtype: Any) -> jax.Array:
    """Adaptive layer norm: x [B, G, S, D], shift and scale [B, G, 1 or S, D]."""
    return (standardize(x, eps) * (1 + scale) + shift).astype(dtype)


class TextContext(nn.Module):
    """The part of a `Block` that sees the text alone: tokens [B, K, D] -> k, v [B, K, N, H] of its cross-attention.

    fused: linear layers of one input are one product, as at deployment.
    """

    num_heads: int
    head_dim: int
    eps: float
    dtype: Any
    fused: bool

    @nn.compact
    def __call__(self, text: jax.Array) -> KV:
        return self.read(text)

    def read(self, text: jax.Array) -> KV:
        k, v = self.project("cross_", "kv", text)
        return self.normed("cross_k", k), v

    def project(self, prefix: str, parts: str, y: jax.Array) -> tuple[jax.Array, ...]:
        """y [..., I] -> [..., N, H] of each layer prefix + part."""
        heads, axes = (self.num_heads, self.head_dim), ("heads", "head_dim")
        if self.fused:
            out = self.rows(prefix + parts, len(parts), y).reshape(*y.shape[:-1], len(parts), *heads)
            return tuple(out[..., i, :, :] for i in range(len(parts)))
        return tuple(flat(dense(heads, ("embed", *axes), name=prefix + x, dtype=self.dtype), y) for x in parts)

    def rows(self, name: str, parts: int, y: jax.Array) -> jax.Array:
        """y [..., I] -> [tokens, P, N * H] of P layers that are one."""
        width = self.num_heads * self.head_dim
        out = dense(parts * width, ("embed", "heads"), name=name, dtype=self.dtype)(y.reshape(-1, y.shape[-1]))
        return out.reshape(-1, parts, width)

    def normed(self, name: str, y: jax.Array) -> jax.Array:
        scale = self.norm_scale(name)
        if not self.fused:
            return rms_norm(y, scale, self.eps)
        # As rows of one axis, of which XLA (JAX 0.10.2) makes one kernel on GPUs and not two.
        return rms_norm(y.reshape(-1, 1, scale.size), scale.reshape(1, -1), self.eps).reshape(y.shape)

    def norm_scale(self, name: str, *parts: int) -> jax.Array:
        ones = partitioned(nn.initializers.ones_init(), (*[None] * len(parts), "heads", "head_dim"))
        return self.param(f"{name}_norm", ones, (*parts, self.num_heads, self.head_dim))


def flat(layer: nn.DenseGeneral, y: jax.Array, inputs: int = 1) -> jax.Array:
    """A linear layer of the last `inputs` axes, tokens as rows of one matrix.

    That is a plain product, whose gradient CPUs run twice as fast.
    """
    rows = layer(y.reshape(-1, *y.shape[y.ndim - inputs :]))
    return rows.reshape(*y.shape[: y.ndim - inputs], *rows.shape[1:])


class Block(TextContext):
    """One transformer block: modulated self-attention, text cross-attention, modulated feed-forward net.

    With `across_groups` every token attends over the tokens of all groups and a prefix k, v [B, M, N, H]
    (planner: its memory); without, over its own group and that group's prefix [B, G, M, N, H]
    (executor: the routed planner context, Eq. 3).
    """

    dim: int
    ffn_dim: int
    across_groups: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, prefix: KV | None, cond: Condition, given: Given | None = None
    ) -> tuple[jax.Array, KV, KV]:
        """x [B, G, S, D] -> x [B, G, S, D], this block's own k, v [B, G, S, N, H], and all k, v that it attended over.

        given: what was made before; otherwise it is made here, of the condition.
        """
        eps, dtype = self.eps, self.dtype
        if given is None:
            row_init = nn.initializers.normal(self.dim**-0.5)
            table = self.param("modulation", partitioned(row_init, (None, "embed")), (6, self.dim))
            given = Given(table + cond.modulation, *self.read(cond.text))
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = _six(given.rows)

        def output(name: str, y: jax.Array) -> jax.Array:
            layer = dense(self.dim, ("heads", "head_dim", "embed"), name=name, dtype=dtype, axis=(-2, -1))
            return flat(layer, y, 2)

        y = modulate(x, shift, scale, eps, dtype)
        q, k, v = self.heads(y, cond.angles)
        mixed, whole = self.self_attention(q, k, v, prefix, cond)
        x = x + (gate * output("o", mixed)).astype(x.dtype)

        y = layer_norm("cross_norm", eps)(x).astype(dtype)
        (q,) = self.project("cross_", "q", y)
        mask = cond.text_mask[:, :, None]
        mixed = attention(self.normed("cross_q", q), given.text_k[:, None], given.text_v[:, None], mask)
        x = x + output("cross_o", mixed).astype(x.dtype)

        y = modulate(x, shift_ffn, scale_ffn, eps, dtype)
        y = flat(dense(self.ffn_dim, ("embed", "mlp"), name="ffn_in", dtype=dtype), y)
        y = flat(dense(self.dim, ("mlp", "embed"), name="ffn_out", dtype=dtype), nn.gelu(y, approximate=True))
        x = x + (gate_ffn * y).astype(x.dtype)
        x = constrain(x, RESIDUAL_AXES)
        self.sow("intermediates", "x", x)
        self.sow("intermediates", "kv", (k, v))
        return x, (k, v), whole

    def heads(self, y: jax.Array, angles: jax.Array) -> tuple[jax.Array, ...]:
        """y [B, G, S, D] -> q, k, v [B, G, S, N, H], q and k normed and turned by angles [B, G, S, H/2].

        A product reads arrays and no parts of them. So where q and k are made in one kernel and tokens are few, q is
        the array of both, [B, G, 2 S, N, H], the queries first.
        """
        if not self.fused:
            q, k, v = self.project("", "qkv", y)
            return *(rotate(self.normed(name, x), angles) for name, x in (("q", q), ("k", k))), v
        shape = (*y.shape[:-1], self.num_heads, self.head_dim)
        rows = self.rows("qkv", 3, y)
        both = rms_norm(rows[:, :2], self.norm_scale("qk", 2).reshape(2, -1), self.eps, -1)
        both = turn(both.reshape(*shape[:3], 2, *shape[3:]), angles[..., None, :])
        both = jnp.moveaxis(both, 3, 2)
        q = both[:, :, 0] if self.across_groups else both.reshape(*shape[:2], -1, *shape[3:])
        return q, both[:, :, 1], rows[:, 2].reshape(shape)

    def self_attention(
        self, q: jax.Array, k: jax.Array, v: jax.Array, prefix: KV | None, cond: Condition
    ) -> tuple[jax.Array, KV]:
        shape = k.shape
        if self.across_groups:
            q, k, v = (y.reshape(y.shape[0], -1, *y.shape[3:]) for y in (q, k, v))
        queries = k.shape[-3]
        if cond.place is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), cond.place, new.ndim - 3)
                for old, new in zip(prefix, (k, v), strict=True)
            )
        elif prefix is not None:
            k, v = (behind(old, new, cond.own) for old, new in zip(prefix, (k, v), strict=True))
        return attention(q, k, v, cond.mask, queries).reshape(shape), (k, v)


PLANNED = "planned history"  # the name of k, v that no backward pass computes again
_SAVED = jax.checkpoint_policies.save_only_these_names(PLANNED)
REMAT = {
    "full": _SAVED,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _SAVED, jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


def remat(layer: Any, policy: str) -> Any:
    """A layer or a function of one, to be scanned, of which the backward pass computes again what the policy says."""
    return layer if policy == "none" else nn.remat(layer, policy=REMAT[policy], prevent_cse=False)


def cast_once(body: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    """A function of a layer that finds the weights of its products in dtype: calls of the layer share one cast.

    And what XLA's partitioner does with it: a cast is gathered once, two casts of the same weights twice.
    """

    def cast(variables: dict[str, Any]) -> dict[str, Any]:
        layers = variables["params"]
        return {"params": {
            name: {"kernel": read(layer["kernel"], dtype), "bias": layer["bias"].astype(dtype)}
            if _is_dense(layer) else layer
            for name, layer in layers.items()
        }}  # fmt: skip

    return nn.map_variables(body, "params", cast)


def _is_dense(layer: Any) -> bool:
    return isinstance(layer, Mapping) and "kernel" in layer


def over_layers(lift: Callable[..., Any], body: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A function of one layer, body(layer, ...), lifted by nn.scan or nn.vmap: parameters get a leading layer axis."""
    return lift(
        body,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        metadata_params={nn.PARTITION_NAME: "layers"},
        **options,
    )


def make_blocks(cfg: ModelConfig, component: str, deployed: bool) -> Block | list[Block]:
    """The blocks of planner or executor: one, to be scanned over parameters of all layers, or at deployment L."""

    def block() -> Block:
        return Block(
            cfg.num_heads, cfg.head_dim, cfg.norm_eps, jnp.dtype(cfg.dtype), deployed,
            getattr(cfg, f"{component}_dim"), getattr(cfg, f"{component}_ffn_dim"), component == "planner",
        )  # fmt: skip

    return [block() for _ in range(cfg.num_layers)] if deployed else block()


def scan_blocks(
    cfg: ModelConfig, component: str, blocks: Block | list[Block], body: Callable[..., Any], carry: Any, of_layer: Any,
    shared: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """L blocks of planner or executor in a row: body(block, carry, of this layer, of all layers) -> (carry, out).

    of_layer: has a leading layer axis, and so has out; or is a list of L, and so is out.
    """
    if not isinstance(blocks, Block):
        outs = []
        for block, own in zip(blocks, of_layer, strict=True):
            carry, out = body(block, carry, own, shared)
            outs.append(out)
        return carry, outs
    listed = isinstance(of_layer, list)
    if listed:
        of_layer = jax.tree.map(lambda *xs: jnp.stack(xs), *of_layer)
    layer = remat(body, cfg.remat_of(component))
    scan = over_layers(nn.scan, layer, in_axes=(0, nn.broadcast), length=cfg.num_layers)
    carry, out = scan(blocks, carry, of_layer, shared)
    return carry, [jax.tree.map(lambda x, i=i: x[i], out) for i in range(cfg.num_layers)] if listed else out


def make_text_context(cfg: ModelConfig) -> TextContext:
    """`TextContext` of all layers, for `read_text`."""
    return TextContext(cfg.num_heads, cfg.head_dim, cfg.norm_eps, jnp.dtype(cfg.dtype), fused=True)


def read_text(cfg: ModelConfig, context: TextContext, text: jax.Array) -> KV:
    """Embedded tokens [B, K, D] -> k, v [L, B, K, N, H], all layers at once."""
    # Every layer has a text of its own: of one for all XLA makes one product, for which it copies their kernels.
    texts = jax.lax.optimization_barrier(jnp.broadcast_to(text, (cfg.num_layers, *text.shape)))
    return over_layers(nn.vmap, lambda layer, text: layer(text), axis_size=cfg.num_layers)(context, texts)
