"""Video tower of Wan2.2: the causal autoencoder between images and latents, 16x16x4 to one.

The network is frozen; its parameters carry no logical axes. Activations are [B, T, h, w, C], latents outside `Vae`
[B, z, F, h, w].
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ahawam_jax.towers.vae_layers import CausalConv, DownStage, Middle, NormConv, Stage, UpStage

PATCH = 2  # image pixels along each side of one pixel of the first layer
COLOURS = 3
ONE_PASS = 3  # latent frames up to which a clip is coded at once: the model's own nine-frame windows

# Per-channel statistics of the latents, as published with Wan2.2.
LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of the autoencoder. Every stage but the last halves (decoder: doubles) height and width."""

    dim: int = 160  # encoder width, times dim_mult
    dec_dim: int = 256  # decoder width, times dim_mult
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # which stages halve the frame rate as well
    dtype: str = "bfloat16"  # of convolutions; norms, softmax and the latents are float32

    @property
    def spatial_stride(self) -> int:
        """Image pixels along each side of one latent pixel."""
        return PATCH * 2 ** (len(self.dim_mult) - 1)

    @property
    def frames_per_latent(self) -> int:
        """Frames of one latent frame after the first."""
        return 2 ** sum(self.temporal_downsample)

    def encoder_stages(self) -> Iterator[Stage]:
        """The encoder's stages, first to last."""
        return self._stages(self.dim, (1, *self.dim_mult), self.temporal_downsample)

    def decoder_stages(self) -> Iterator[Stage]:
        """The decoder's: the same way back."""
        mult = self.dim_mult[::-1]
        return self._stages(self.dec_dim, (mult[0], *mult), self.temporal_downsample[::-1])

    @staticmethod
    def _stages(dim: int, mult: tuple[int, ...], temporal: tuple[bool, ...]) -> Iterator[Stage]:
        factors = [(2 if in_time else 1, 2) for in_time in temporal] + [(1, 1)]
        for before, after, (time, space) in zip(mult[:-1], mult[1:], factors, strict=True):
            yield Stage(dim * before, dim * after, time, space)


def patchify(images: jax.Array) -> jax.Array:
    """Frames [B, T, 2h, 2w, 3] -> [B, T, h, w, 12]; a patch is written as (colour, dx, dy)."""
    batch, frames, height, width, colours = images.shape
    x = images.reshape(batch, frames, height // PATCH, PATCH, width // PATCH, PATCH, colours)
    return x.transpose(0, 1, 2, 4, 6, 5, 3).reshape(batch, frames, height // PATCH, width // PATCH, -1)


def unpatchify(x: jax.Array) -> jax.Array:
    """The inverse of `patchify`: [B, T, h, w, 12] -> [B, T, 2h, 2w, 3]."""
    batch, frames, height, width, _ = x.shape
    x = x.reshape(batch, frames, height, width, COLOURS, PATCH, PATCH).transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(batch, frames, height * PATCH, width * PATCH, COLOURS)


class Encoder(nn.Module):
    """Images [B, T, H, W, 3] -> features [B, F, H/16, W/16, 2z]."""

    config: VaeConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        x = CausalConv(cfg.dim, (3, 3, 3), dtype, name="input")(patchify(images))
        for i, stage in enumerate(cfg.encoder_stages()):
            x = DownStage(stage, cfg.num_res_blocks, dtype, name=f"stage{i}")(x)
        x = Middle(dtype, name="middle")(x)
        return NormConv(2 * cfg.z_dim, dtype, name="head")(x)


class Decoder(nn.Module):
    """Features [B, F, h, w, z] -> images [B, T, 16h, 16w, 3]."""

    config: VaeConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        x = CausalConv(cfg.dec_dim * cfg.dim_mult[-1], (3, 3, 3), dtype, name="input")(x)
        x = Middle(dtype, name="middle")(x)
        for i, stage in enumerate(cfg.decoder_stages()):
            x = UpStage(stage, cfg.num_res_blocks + 1, dtype, name=f"stage{i}")(x)
        return unpatchify(NormConv(COLOURS * PATCH * PATCH, dtype, name="head")(x))


class Vae(nn.Module):
    """Encoder and decoder of one segment; latents [B, F, h, w, z] are not normalised."""

    config: VaeConfig

    def setup(self) -> None:
        z_dim, pointwise = self.config.z_dim, (1, 1, 1)
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)
        self.to_latent = CausalConv(2 * z_dim, pointwise, jnp.float32)
        self.from_latent = CausalConv(z_dim, pointwise, jnp.float32)

    def encode(self, images: jax.Array) -> jax.Array:
        """Posterior mean, float32; the other half of the channels is its log-variance."""
        return self.to_latent(self.encoder(images))[..., : self.config.z_dim]

    def decode(self, latents: jax.Array) -> jax.Array:
        """Frames, float32."""
        return self.decoder(self.from_latent(latents)).astype(jnp.float32)

    def __call__(self, images: jax.Array) -> jax.Array:
        """There and back, through every parameter."""
        return self.decode(self.encode(images))


def abstract_vae_params(config: VaeConfig) -> Any:
    """Shapes and dtypes of the parameter tree; allocates nothing."""
    image = jax.ShapeDtypeStruct((1, 1, config.spatial_stride, config.spatial_stride, COLOURS), jnp.float32)
    return jax.eval_shape(Vae(config).init, jax.random.key(0), image)["params"]


@flax.struct.dataclass
class WanVae:
    """The video tower with its parameters: a pytree, so that these are arguments of a jitted function.

    Both methods take `segment`, the number of latent frames to code at a time after the first, which is then coded
    alone: activations need memory for one segment and not for the clip, and the result is the same. It must divide
    the number of later latent frames; as many as there are means one pass. By default clips of up to ONE_PASS latent
    frames are coded in one pass, longer ones frame by frame.
    """

    params: Any
    config: VaeConfig = flax.struct.field(pytree_node=False, default=VaeConfig())
    mean: jax.Array = flax.struct.field(default_factory=lambda: np.array(LATENT_MEAN, np.float32))  # [z]
    std: jax.Array = flax.struct.field(default_factory=lambda: np.array(LATENT_STD, np.float32))  # [z]

    def encode(self, images: jax.Array, segment: int | None = None) -> jax.Array:
        """Clips [B, 1 + 4n, H, W, 3] in [-1, 1], H and W multiples of 16 -> [B, z, 1 + n, H/16, W/16] float32.

        The latents are normalised posterior means. Raises ValueError for other sizes.
        """
        _, frames, height, width, colours = images.shape
        stride, rate = self.config.spatial_stride, self.config.frames_per_latent
        if (frames - 1) % rate or height % stride or width % stride or colours != COLOURS:
            raise ValueError(
                f"A clip of {frames} frames of {height}x{width}x{colours} cannot be encoded: expected 1 + {rate}n "
                f"frames whose sides are multiples of {stride}, in {COLOURS} colours; change config.data.head_size "
                "or the window."
            )
        latents = self._code("encode", images, rate, segment)
        return ((latents - self.mean) / self.std).transpose(0, 4, 1, 2, 3)

    def decode(self, latents: jax.Array, segment: int | None = None) -> jax.Array:
        """Latents [B, z, 1 + n, h, w] -> frames [B, 1 + 4n, 16h, 16w, 3] float32, clipped to [-1, 1]."""
        return jnp.clip(self.decode_raw(latents, segment), -1, 1)

    def decode_raw(self, latents: jax.Array, segment: int | None = None) -> jax.Array:
        """`decode` without clipping."""
        if latents.ndim != 5 or latents.shape[1] != self.config.z_dim:
            raise ValueError(
                f"Latents of shape {latents.shape} cannot be decoded: expected [B, {self.config.z_dim}, F, h, w]."
            )
        return self._code("decode", latents.transpose(0, 2, 3, 4, 1) * self.std + self.mean, 1, segment)

    def _code(self, method: str, x: jax.Array, rate: int, segment: int | None) -> jax.Array:
        """Runs a method of `Vae` on x [B, 1 + rate * n, ...], at once or segment by segment."""

        def run(past: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            y, past = Vae(self.config).apply({"params": self.params, **past}, x, method=method, mutable="past")
            return past, y

        later = (x.shape[1] - 1) // rate
        if segment is None:
            segment = later if later < ONE_PASS else 1
        if segment >= later:
            return Vae(self.config).apply({"params": self.params}, x, method=method)
        if segment < 1 or later % segment:
            raise ValueError(
                f"A clip of {1 + later} latent frames cannot be coded in segments of {segment}: expected a divisor of "
                f"{later}, the frames after the first."
            )
        past, first = run({}, x[:, :1])
        parts = x[:, 1:].reshape(x.shape[0], later // segment, rate * segment, *x.shape[2:]).swapaxes(0, 1)
        _, y = jax.lax.scan(run, past, parts)
        y = y.swapaxes(0, 1)
        return jnp.concatenate([first, y.reshape(y.shape[0], -1, *y.shape[3:])], 1)
