"""The video tower written the released way; see `export.released.way`.

One image passes through three-dimensional causal convolutions behind two frames of zeros. Left out, to the benefit of
this side, are the copies of past frames that the released convolutions keep.

Axis letters: B batch, C features, F frames, h, w height and width.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ahawam_jax.towers.vae import COLOURS, LATENT_MEAN, LATENT_STD, PATCH, VaeConfig
from ahawam_jax.towers.vae_layers import Stage
from export.released.way import attention


class CausalConv(nn.Conv3d):
    """x [B, C, F, h, w], behind frames of zeros."""

    def __init__(self, inputs: int, outputs: int, window: tuple[int, int, int], stride: int = 1):
        super().__init__(inputs, outputs, window, (stride, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        time, height, width = self.kernel_size
        return super().forward(F.pad(x, (width // 2, width // 2, height // 2, height // 2, time - 1, 0)))


class ChannelNorm(nn.Module):
    def __init__(self, width: int, ones: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width, *[1] * ones))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * len(self.gamma) ** 0.5 * self.gamma


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        window = (3, 3, 3)
        self.residual = nn.Sequential(
            ChannelNorm(inputs, 3), nn.SiLU(), CausalConv(inputs, outputs, window),
            ChannelNorm(outputs, 3), nn.SiLU(), nn.Identity(), CausalConv(outputs, outputs, window),
        )  # fmt: skip
        self.shortcut = CausalConv(inputs, outputs, (1, 1, 1)) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


class PixelAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = ChannelNorm(width, 2)
        self.to_qkv, self.proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2).flatten(0, 1)  # [B * F, C, h, w]
        q, k, v = self.to_qkv(self.norm(y)).flatten(2).transpose(1, 2).chunk(3, -1)
        y = self.proj(attention(q, k, v, 1).transpose(1, 2).reshape(y.shape))
        return x + y.unflatten(0, (len(x), -1)).transpose(1, 2)


class Resample(nn.Module):
    def __init__(self, width: int, time: int):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))
        if time == 2:
            self.time_conv = CausalConv(width, width, (3, 1, 1), 2)  # a clip's first frame passes it by

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


class Down(nn.Module):
    def __init__(self, stage: Stage, blocks: int):
        super().__init__()
        self.stage = stage
        widths = (stage.before, *[stage.features] * blocks)
        layers: list[nn.Module] = [Residual(*pair) for pair in pairwise(widths)]
        if stage.space == 2:
            layers.append(Resample(stage.features, stage.time))
        self.downsamples = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        _, features, time, space = self.stage
        y = F.pad(x, (0, 0, 0, 0, -x.shape[2] % time, 0))
        y = y.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))
        y = y.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4).unflatten(1, (features, -1)).mean(2)
        return self.downsamples(x) + y


class ReleasedVae(nn.Module):
    """The encoder; its parameters are named as in Wan's file."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        stages = list(config.encoder_stages())
        width, latent = stages[-1].features, 2 * config.z_dim
        self.encoder = nn.Module()
        self.encoder.conv1 = CausalConv(COLOURS * PATCH**2, config.dim, (3, 3, 3))
        self.encoder.downsamples = nn.Sequential(*(Down(stage, config.num_res_blocks) for stage in stages))
        self.encoder.middle = nn.Sequential(Residual(width, width), PixelAttention(width), Residual(width, width))
        self.encoder.head = nn.Sequential(ChannelNorm(width, 3), nn.SiLU(), CausalConv(width, latent, (3, 3, 3)))
        self.conv1 = CausalConv(latent, latent, (1, 1, 1))

    @classmethod
    def load(
        cls, tensors: Mapping[str, Tensor], config: VaeConfig, mean: Sequence[float] = LATENT_MEAN,
        std: Sequence[float] = LATENT_STD,
    ) -> "ReleasedVae":  # fmt: skip
        """Around tensors under Wan's names, all in one dtype and on one device; they are not copied."""
        with torch.device("meta"):
            vae = cls(config).requires_grad_(False)
        vae.load_state_dict({name: tensors[name] for name in vae.state_dict()}, assign=True)
        weight = vae.conv1.weight
        vae.mean, vae.std = (weight.new_tensor(x).view(-1, 1, 1, 1) for x in (mean, std))
        return vae

    def forward(self, canvas: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> normalised posterior means [B, c, h, w]."""
        x = (canvas.permute(0, 3, 1, 2)[:, :, None] / 127.5 - 1.0).to(self.conv1.weight.dtype)
        x = x.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))
        x = self.encoder.conv1(x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3))
        x = self.encoder.head(self.encoder.middle(self.encoder.downsamples(x)))
        means, _ = self.conv1(x).chunk(2, 1)
        return ((means - self.mean) / self.std)[:, :, 0]
