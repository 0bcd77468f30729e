"""The video towers of the PyTorch twin: one image -> latents, as graphs of static shapes.

A single image is the first frame of a clip. Causal convolutions then see zeros at all temporal taps but the last,
which is all that is left of them, exactly; and the stages that halve the frame rate pass a first frame on as it is.
What remains is two-dimensional. Axis letters: B batch, c latent channels, h, w latent height and width, C features.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ahawam_jax.models.config import SPATIAL_STRIDE
from ahawam_jax.towers.stand_ins import block_transform, spread
from ahawam_jax.towers.vae import COLOURS, LATENT_MEAN, LATENT_STD, PATCH, VaeConfig, abstract_vae_params
from ahawam_jax.towers.vae_layers import Stage
from ahawam_jax.towers.vae_names import table
from ahawam_jax.weights.convert import check_names
from export.twin.layers import Views, as_torch, attention, check_dtype, fill, parameter


def pixels(canvas: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 in [-1, 1]."""
    return canvas.float() / 127.5 - 1.0


def fold(x: Tensor, stage: Stage) -> Tensor:
    """Shortcut of a shrinking stage for a clip's first frame; `ahawam_jax.towers.vae_layers.fold`.

    x [B, C, h, w] -> [B, features, h / space, w / space]: means over blocks of time x space x space inputs and over
    channels, where the frames before the first one are zeros.
    """
    space = stage.space
    x = x.unflatten(3, (-1, space)).unflatten(2, (-1, space)).permute(0, 1, 3, 5, 2, 4).flatten(2, 3)
    if stage.time == 2:
        x = torch.cat([torch.zeros_like(x), x], 2)  # [B, C, (time, dy, dx), h, w]
    return x.flatten(1, 2).unflatten(1, (stage.features, -1)).mean(2)


class Norm(nn.Module):
    """Root-mean-square norm over channels, in and to float32. x [B, C, h, w]."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = parameter(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().sum(1, keepdim=True).clamp_min(1e-24)) * len(self.gamma) ** 0.5 * self.gamma


class Conv(nn.Module):
    """Convolution of one image, x [B, I, h, w] -> [B, O, h, w], in its weights' dtype. Odd sizes keep the sides."""

    def __init__(self, inputs: int, outputs: int, size: int, dtype: torch.dtype):
        super().__init__()
        self.weight, self.bias = parameter(outputs, inputs, size, size, dtype=dtype), parameter(outputs, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.to(self.weight.dtype), self.weight, self.bias, padding=self.weight.shape[-1] // 2)

    def views(self, prefix: str) -> Views:
        yield f"{prefix}weight", self.weight
        yield f"{prefix}bias", self.bias


class HalvingConv(Conv):
    """3x3 convolution at every second pixel, padded below and on the right."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x.to(self.weight.dtype), (0, 1, 0, 1)), self.weight, self.bias, stride=2)


class NormConv(nn.Module):
    """Norm, SiLU, 3x3 convolution."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype):
        super().__init__()
        self.norm, self.conv = Norm(inputs), Conv(inputs, outputs, 3, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x)))

    def views(self, norm: str, conv: str) -> Views:
        yield f"{norm}gamma", self.norm.gamma
        yield from self.conv.views(conv)


class Residual(nn.Module):
    """Two convolutions beside an identity, or beside a 1x1 convolution where the width changes."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype):
        super().__init__()
        self.first, self.second = NormConv(inputs, outputs, dtype), NormConv(outputs, outputs, dtype)
        self.shortcut = Conv(inputs, outputs, 1, dtype) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return y + (x if self.shortcut is None else self.shortcut(x))

    def views(self, prefix: str) -> Views:
        yield from self.first.views(f"{prefix}residual.0.", f"{prefix}residual.2.")
        yield from self.second.views(f"{prefix}residual.3.", f"{prefix}residual.6.")
        if self.shortcut is not None:
            yield from self.shortcut.views(f"{prefix}shortcut.")


class Middle(nn.Module):
    """Residual block, attention with one head over the pixels, residual block."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self.before, self.after = Residual(width, width, dtype), Residual(width, width, dtype)
        self.norm, self.qkv, self.out = Norm(width), Conv(width, 3 * width, 1, dtype), Conv(width, width, 1, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(2).chunk(3, -1)  # [B, h*w, 1, C]
        y = attention(q, k, v).squeeze(2).transpose(1, 2).reshape(x.shape)
        return self.after(x + self.out(y))

    def views(self, prefix: str) -> Views:
        yield from self.before.views(f"{prefix}0.")
        yield f"{prefix}1.norm.gamma", self.norm.gamma
        yield from self.qkv.views(f"{prefix}1.to_qkv.")
        yield from self.out.views(f"{prefix}1.proj.")
        yield from self.after.views(f"{prefix}2.")


class DownStage(nn.Module):
    """Residual blocks, then fewer pixels; beside all of it runs `fold`."""

    def __init__(self, stage: Stage, blocks: int, dtype: torch.dtype):
        super().__init__()
        self.stage = stage
        widths = (stage.before, *[stage.features] * blocks)
        self.blocks = nn.ModuleList(Residual(a, b, dtype) for a, b in zip(widths, widths[1:], strict=False))
        self.space = HalvingConv(stage.features, stage.features, 3, dtype) if stage.space == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            y = block(y)
        if self.space is not None:
            y = self.space(y)
        return y + fold(x, self.stage)

    def views(self, prefix: str) -> Views:
        for i, block in enumerate(self.blocks):
            yield from block.views(f"{prefix}{i}.")
        if self.space is not None:
            yield from self.space.views(f"{prefix}{len(self.blocks)}.resample.1.")


class VaeEncoder(nn.Module):
    """The Wan2.2 VAE's encoder for one image; convolutions in `dtype`, norms, softmax and latents in float32."""

    def __init__(self, config: VaeConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        stages = list(config.encoder_stages())
        self.input = Conv(COLOURS * PATCH**2, config.dim, 3, dtype)
        self.stages = nn.ModuleList(DownStage(stage, config.num_res_blocks, dtype) for stage in stages)
        width = stages[-1].features
        self.middle, self.head = Middle(width, dtype), NormConv(width, 2 * config.z_dim, dtype)
        self.to_latent = Conv(2 * config.z_dim, config.z_dim, 1, torch.float32)  # the mean; not the log-variance
        self.register_buffer("mean", torch.empty(config.z_dim, 1, 1))
        self.register_buffer("std", torch.empty(config.z_dim, 1, 1))

    @classmethod
    def from_wan(
        cls, tensors: Mapping[str, Any], config: VaeConfig, dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu", mean: Any = LATENT_MEAN, std: Any = LATENT_STD,
    ) -> "VaeEncoder":  # fmt: skip
        """From tensors under Wan's names (`weights.vae.vae_tensors`); those of the decoder may be there.

        mean, std: of the latents' channels, [c]. Raises WeightsError for names, shapes and values that do not fit.
        """
        check_dtype(dtype)
        tensors = {name: x for name, x in tensors.items() if not name.startswith(("decoder.", "conv2."))}
        check_names(tensors, encoder_table(config), abstract_vae_params(config))
        with torch.device(device):
            vae = cls(config, dtype)
        for name, place in vae.views():
            fill(iter([(name, place)]), {name: _last_tap(tensors[name], place)})
        for buffer, values in ((vae.mean, mean), (vae.std, std)):
            buffer.copy_(torch.from_numpy(np.array(values, np.float32)).reshape(-1, 1, 1))
        return vae

    def forward(self, canvas: Tensor) -> Tensor:
        """uint8 [B, H, W, 3], H and W multiples of 16 -> normalised posterior means [B, c, h, w] float32."""
        x = pixels(canvas).unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH))  # [B, h, dy, w, dx, colour]
        x = self.input(x.permute(0, 5, 4, 2, 1, 3).flatten(1, 3))  # a patch is read as (colour, dx, dy)
        for stage in self.stages:
            x = stage(x)
        latents = self.to_latent(self.head(self.middle(x)))
        return (latents - self.mean) / self.std

    def views(self) -> Views:
        yield from self.input.views("encoder.conv1.")
        for i, stage in enumerate(self.stages):
            yield from stage.views(f"encoder.downsamples.{i}.downsamples.")
        yield from self.middle.views("encoder.middle.")
        yield from self.head.views("encoder.head.0.", "encoder.head.2.")
        yield from self.to_latent.views("conv1.")


def _last_tap(x: Any, place: Tensor) -> Tensor:
    """A tensor of the file as it is held here: the last tap in time; of conv1's outputs, the means come first."""
    x = as_torch(x)
    if x.ndim == 5:
        x = x[:, :, -1]
    return x[: len(place)].reshape(place.shape)


def encoder_table(config: VaeConfig) -> list[tuple[str, str, str]]:
    """Rows of the VAE's name table for what encoding needs."""
    return [row for row in table(config) if not row[1].startswith(("decoder/", "from_latent/"))]


class BlockTransformEncoder(nn.Module):
    """The demo's video tower, `ahawam_jax.towers.stand_ins.BlockTransform`: a fixed linear map of 16x16 blocks.

    places: the last two channels say where a block is.
    """

    def __init__(self, places: bool = False) -> None:
        super().__init__()
        matrix = np.float32(block_transform() / spread())
        self.places = places
        self.register_buffer("matrix", torch.from_numpy(matrix))  # [16 * 16 * 3, 48]

    def forward(self, canvas: Tensor) -> Tensor:
        """uint8 [B, H, W, 3], H and W multiples of 16 -> latents [B, 48, h, w] float32."""
        x = pixels(canvas).unflatten(2, (-1, SPATIAL_STRIDE)).unflatten(1, (-1, SPATIAL_STRIDE))
        x = x.permute(0, 1, 3, 2, 4, 5).flatten(3)  # [B, h, w, (y, x, colour)]
        latents = x @ self.matrix
        if self.places:
            axes = ((2 * torch.arange(n, device=x.device, dtype=x.dtype) + 1) / n - 1 for n in latents.shape[1:3])
            where = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
            latents = torch.cat((latents[..., :-2], where.expand(len(latents), -1, -1, -1)), -1)
        return latents.permute(0, 3, 1, 2)
