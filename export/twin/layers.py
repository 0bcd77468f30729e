"""Layers of the PyTorch twin: what planner, router and executor share, arranged for inference and for export.

Axis letters: B batch, S tokens, K text tokens, L layers, N heads, H head width, D model width, X text width. Weights
and products have the dtype given to the constructor; norms, modulation, softmax and rotary angles are float32, and
the residual stream is rounded to the dtype after every addition, as in `ahawam_jax.models.dit`.

Parameters are allocated, not initialised. Every module has `views`, which pairs each name of the release's layout
with the part of a parameter that holds it, so that fused and stacked weights are filled, and read back, tensor by
tensor.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ahawam_jax.models.attention import MASKED, rotary_rates
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.models.dit import SMALL_NET_EPS
from ahawam_jax.weights.convert import is_finite
from ahawam_jax.weights.tensors import WeightsError

Views = Iterator[tuple[str, Tensor]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ------------------------------------------------------------------------------------------------------- tensors
def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Memory for a weight, whose values come from a file."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def check_dtype(dtype: torch.dtype) -> None:
    """Raises WeightsError for a dtype in which the modules do not compute."""
    if dtype not in DTYPES.values():
        raise WeightsError(
            f"The modules cannot be built in {dtype}: their products are {' or '.join(DTYPES)} (float16 overflows in "
            "the planner's residual stream, int8 needs calibration); ask for one of these."
        )


def as_torch(x: Any) -> Tensor:
    """A torch tensor, or a copy of an array (or of a tensor that still lies in a file), in its own dtype.

    Raises WeightsError if that is neither float32 nor bfloat16.
    """
    if str(x.dtype).removeprefix("torch.") not in DTYPES:
        raise WeightsError(
            f"{getattr(x, 'file', 'The checkpoint')} stores a tensor {list(x.shape)} as {x.dtype}; weights are "
            f"exported from {' or '.join(DTYPES)}, so write the checkpoint again in one of these."
        )
    if isinstance(x, Tensor):
        return x.detach()
    array = np.asarray(x).copy(order="C")  # a mapped file is read-only, which torch cannot express
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def fill(views: Views, state: Mapping[str, Any]) -> None:
    """Copies the tensors that `views` name into their places, one at a time.

    Raises WeightsError for a missing name, another shape, another dtype than float32 or bfloat16, NaN or infinity.
    """
    for name, place in views:
        if name not in state:
            raise WeightsError(f"{name} is missing; expected a tensor {list(place.shape)} of the release's layout.")
        x = as_torch(state[name])
        if x.shape != place.shape:
            raise WeightsError(
                f"{name} is {list(x.shape)}, expected {list(place.shape)}; use the configuration of this checkpoint."
            )
        finite = torch.isfinite(x).all() if isinstance(state[name], Tensor) else is_finite(np.asarray(state[name]))
        if not finite:
            raise WeightsError(f"{name} holds NaN or infinity; the file is damaged or its training diverged.")
        place.copy_(x)


# ------------------------------------------------------------------------------------------------------ functions
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention. q [B, S, N, H], k and v [B, K, N, H], mask [B, 1, 1, K] bool -> [B, S, N, H], dtype of v.

    Every query must be allowed one key. Exported graphs spell out the float32 softmax, which PyTorch's kernels keep
    inside.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if torch.compiler.is_exporting():
        scores = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = torch.where(mask, scores, MASKED)
        mixed = torch.softmax(scores, -1).to(v.dtype) @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask)
    return mixed.transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbouring feature pairs of every head. x [B, S, N, H], cos and sin [1 or B, S, H/2] float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Adaptive layer norm: x [B, S, D], scale (1 already added) and shift [D], or [B, S, D] for a time per token."""
    if scale.ndim > 1:
        return (F.layer_norm(x.float(), x.shape[-1:], eps=eps) * scale + shift).to(x.dtype)
    return F.layer_norm(x.float(), x.shape[-1:], scale, shift, eps).to(x.dtype)


def rotary_1d(positions: np.ndarray, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin [..., width / 2] float32 of positions [...], from angles in float64: no table, no limit."""
    angles = np.asarray(positions, np.float64)[..., None] * rotary_rates(width)
    return torch.from_numpy(np.float32(np.cos(angles))), torch.from_numpy(np.float32(np.sin(angles)))


def modulation(state: Mapping[str, Any], prefix: str, times: np.ndarray, config: ModelConfig) -> Tensor:
    """The six modulation rows of every block at the given diffusion times, [n, L, 6, D] float32.

    times float32 [n] in [0, 1000]. A row is the block's own table plus the time's projection; rows 1 and 4, the
    scales, have the 1 of "1 + scale" added. Computed in float32 from the release's tensors below `prefix`.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, *(as_torch(state[f"{prefix}{name}.{part}"]).float() for part in ("weight", "bias")))

    half = config.freq_dim // 2
    angles = np.asarray(times, np.float64)[:, None] * 10000.0 ** (-np.arange(half) / half)
    x = torch.from_numpy(np.float32(np.concatenate([np.cos(angles), np.sin(angles)], -1)))
    x = linear("time_embedding.2", F.silu(linear("time_embedding.0", x)))
    x = linear("time_projection.1", F.silu(x)).unflatten(-1, (1, 6, -1))
    layers = range(config.num_layers)
    rows = x + torch.cat([as_torch(state[f"{prefix}blocks.{i}.modulation"]).float() for i in layers])
    rows[:, :, [1, 4]] += 1
    if not torch.isfinite(rows).all():
        raise WeightsError(f"{prefix}time_embedding or a modulation table below {prefix} holds NaN or infinity.")
    return rows


# --------------------------------------------------------------------------------------------------------- layers
class Linear(nn.Module):
    """y = W x + b, [..., I] -> [..., O]; x is cast to the dtype of the weights."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype):
        super().__init__()
        self.weight, self.bias = parameter(outputs, inputs, dtype=dtype), parameter(outputs, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def views(self, *prefixes: str) -> Views:
        """One release layer, or several of the same size that are fused, one below the other."""
        parts = (self.weight.chunk(len(prefixes)), self.bias.chunk(len(prefixes)))
        for prefix, weight, bias in zip(prefixes, *parts, strict=True):
            yield f"{prefix}weight", weight
            yield f"{prefix}bias", bias


class Norm(nn.Module):
    """Layer norm with scale and bias, to float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.bias, self.eps = parameter(width), parameter(width), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], self.weight, self.bias, self.eps)

    def views(self, prefix: str) -> Views:
        yield f"{prefix}weight", self.weight
        yield f"{prefix}bias", self.bias


class Stacked(nn.Module):
    """A linear layer per layer of the model, x [L, R, I] -> [L, R, O], as one batched product."""

    def __init__(self, layers: int, inputs: int, outputs: int, dtype: torch.dtype):
        super().__init__()
        self.weight = parameter(layers, outputs, inputs, dtype=dtype)
        self.bias = parameter(layers, outputs, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias[:, None], x.to(self.weight.dtype), self.weight.transpose(1, 2))

    def views(self, prefix: str) -> Views:
        """prefix has {i} for the layer."""
        for i, (weight, bias) in enumerate(zip(self.weight, self.bias, strict=True)):
            yield f"{prefix.format(i=i)}weight", weight
            yield f"{prefix.format(i=i)}bias", bias


class StackedNorm(nn.Module):
    """A layer norm per layer of the model: x [1 or L, R, I] -> [L, R, I] float32."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.weight, self.bias = parameter(layers, width), parameter(layers, width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.float(), x.shape[-1:], eps=SMALL_NET_EPS)
        return y * self.weight[:, None] + self.bias[:, None]

    views = Stacked.views


class HeadNorm(nn.Module):
    """Root-mean-square norm over all heads at once, [..., N*H] -> [..., N, H], in float32, in the dtype of x."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.eps = (config.num_heads, config.head_dim), config.norm_eps
        self.weight = parameter(config.num_heads * config.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).to(x.dtype).unflatten(-1, self.heads)


class SmallNet(nn.Module):
    """Norm, linear, exact GELU, linear: [..., I] -> [..., O]."""

    def __init__(self, inputs: int, hidden: int, outputs: int, dtype: torch.dtype):
        super().__init__()
        self.norm = Norm(inputs, SMALL_NET_EPS)
        self.hidden, self.out = Linear(inputs, hidden, dtype), Linear(hidden, outputs, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.hidden(self.norm(x))))

    def views(self, prefix: str) -> Views:
        yield from self.norm.views(f"{prefix}0.")
        yield from self.hidden.views(f"{prefix}1.")
        yield from self.out.views(f"{prefix}3.")


class CrossContext(nn.Module):
    """Text tokens -> keys and values of the cross-attention of many layers, in one product.

    They depend on the text alone, so they are made once an episode and not in every block of every step.
    """

    def __init__(self, layers: Sequence[int], dim: int, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.layers, self.heads, self.eps = tuple(layers), (config.num_heads, config.head_dim), config.norm_eps
        inner = config.num_heads * config.head_dim
        self.hidden, self.out = Linear(config.text_dim, dim, dtype), Linear(dim, dim, dtype)
        self.kv = Linear(dim, len(layers) * 2 * inner, dtype)
        self.k_norm = parameter(len(layers), 1, 1, inner)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text [B, K, X] -> k, v [L, B, K, N, H]."""
        x = self.kv(self.out(F.gelu(self.hidden(text), approximate="tanh")))
        k, v = x.unflatten(-1, (len(self.layers), 2, -1)).permute(2, 3, 0, 1, 4).unbind(1)  # [L, B, K, N*H]
        k = (F.rms_norm(k.float(), k.shape[-1:], None, self.eps) * self.k_norm).to(x.dtype)
        return k.unflatten(-1, self.heads), v.unflatten(-1, self.heads).contiguous()

    def views(self, prefix: str) -> Views:
        yield from self.hidden.views(f"{prefix}text_embedding.0.")
        yield from self.out.views(f"{prefix}text_embedding.2.")
        attentions = [f"{prefix}blocks.{i}.cross_attn." for i in self.layers]
        yield from self.kv.views(*(f"{name}{part}." for name in attentions for part in "kv"))
        for name, norm in zip(attentions, self.k_norm, strict=True):
            yield f"{name}norm_k.weight", norm.view(-1)


class KeyValue(nn.Module):
    """The beginning of a block: keys and values of its self-attention. All that the planner's last block has to do."""

    parts = "kv"

    def __init__(self, dim: int, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.heads, self.eps = (config.num_heads, config.head_dim), config.norm_eps
        self.qkv = Linear(dim, len(self.parts) * config.num_heads * config.head_dim, dtype)
        self.k_norm = HeadNorm(config)

    def project(self, x: Tensor, rows: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """x [B, S, D] -> q (where the block has it), k, v [B, S, N, H] behind norms and rotation."""
        *q, k, v = self.qkv(modulate(x, rows[1], rows[0], self.eps)).chunk(len(self.parts), -1)
        q = [rotate(self.q_norm(y), cos, sin) for y in q]
        return *q, rotate(self.k_norm(k), cos, sin), v.unflatten(-1, self.heads)

    def views(self, prefix: str) -> Views:
        """prefix names the block, with its dot."""
        yield from self.qkv.views(*(f"{prefix}self_attn.{part}." for part in self.parts))
        yield f"{prefix}self_attn.norm_k.weight", self.k_norm.weight


class Block(KeyValue):
    """One transformer block; `ahawam_jax.models.dit.Block`."""

    parts = "qkv"

    def __init__(self, dim: int, ffn_dim: int, config: ModelConfig, dtype: torch.dtype):
        super().__init__(dim, config, dtype)
        inner = config.num_heads * config.head_dim
        self.q_norm, self.cross_q_norm = HeadNorm(config), HeadNorm(config)
        self.o, self.cross_o = Linear(inner, dim, dtype), Linear(inner, dim, dtype)
        self.cross_norm, self.cross_q = Norm(dim, config.norm_eps), Linear(dim, inner, dtype)
        self.ffn_in, self.ffn_out = Linear(dim, ffn_dim, dtype), Linear(ffn_dim, dim, dtype)

    def forward(
        self, x: Tensor, rows: Tensor, cos: Tensor, sin: Tensor, prefix_k: Tensor, prefix_v: Tensor,
        mask: Tensor | None, cross_k: Tensor, cross_v: Tensor, cross_mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Tokens attend to a prefix and each other, then to the text.

        x [B, S, D]; rows [6, D] of `modulation`, or [6, B, S, D] where tokens are at two times; cos, sin
        [1 or B, S, H/2]; prefix [B, M, N, H]; mask [B, 1, 1, M + S] bool or None for all; cross k, v [B, K, N, H] with
        mask [B, 1, 1, K]. Returns x and its own k, v [B, S, N, H].
        """
        q, k, v = self.project(x, rows, cos, sin)
        keys, values = (torch.cat([old.to(new.dtype), new], 1) for old, new in ((prefix_k, k), (prefix_v, v)))
        x = x + (rows[2] * self.o(attention(q, keys, values, mask).flatten(-2))).to(x.dtype)
        q = self.cross_q_norm(self.cross_q(self.cross_norm(x)))
        x = x + self.cross_o(attention(q, cross_k, cross_v, cross_mask).flatten(-2))
        y = self.ffn_in(modulate(x, rows[4], rows[3], self.eps))
        y = self.ffn_out(F.gelu(y, approximate="tanh"))
        return x + (rows[5] * y).to(x.dtype), k, v

    def views(self, prefix: str) -> Views:
        yield from super().views(prefix)
        yield f"{prefix}self_attn.norm_q.weight", self.q_norm.weight
        yield from self.o.views(f"{prefix}self_attn.o.")
        yield from self.cross_norm.views(f"{prefix}norm3.")
        yield from self.cross_q.views(f"{prefix}cross_attn.q.")
        yield f"{prefix}cross_attn.norm_q.weight", self.cross_q_norm.weight
        yield from self.cross_o.views(f"{prefix}cross_attn.o.")
        yield from self.ffn_in.views(f"{prefix}ffn.0.")
        yield from self.ffn_out.views(f"{prefix}ffn.2.")
