"""The towers that need no weights: a truncated block transform for images, hashed words for instructions.

Every video tower has `encode` and `decode`, every text tower `tokens`, with the signatures below. These two stand in
for the Wan2.2 VAE and umT5 where those weights are absent, with the same 16x16x4 compression and 48 channels, so
nothing else in the model changes.
"""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from ahawam_jax.models.config import FRAMES_PER_LATENT, SPATIAL_STRIDE

LUMA_COEFFICIENTS, CHROMA_COEFFICIENTS = 28, 10  # 28 + 2 * 10 = 48 channels
# Orthonormal opponent colours: luminance, red-green, blue-yellow.
COLOUR_AXES = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]]) / np.sqrt([[3], [2], [6]])
CHROMA_GAIN = 4.0  # camera images are mostly grey; this gives colour latents about the spread of the others


def block_transform() -> np.ndarray:
    """Analysis matrix [16 * 16 * 3, 48]: the lowest 2-D cosine coefficients of each opponent colour."""
    n = SPATIAL_STRIDE
    k, x = np.arange(n)[:, None], np.arange(n)[None]
    cosine = np.cos(np.pi * (x + 0.5) * k / n) * np.sqrt(np.where(k == 0, 1, 2) / n)  # orthonormal [k, x]
    order = sorted((v * v + u * u, v, u) for v in range(n) for u in range(n))
    columns = []
    for colour, count in zip(COLOUR_AXES, (LUMA_COEFFICIENTS, CHROMA_COEFFICIENTS, CHROMA_COEFFICIENTS), strict=True):
        for _, v, u in order[:count]:
            columns.append(np.einsum("y,x,c->yxc", cosine[v], cosine[u], colour).ravel())
    return np.stack(columns, 1)


def spread() -> np.ndarray:
    """Typical size of each channel, [48]: natural images fall off as 1 / frequency."""
    n = SPATIAL_STRIDE
    order = sorted((v * v + u * u) for v in range(n) for u in range(n))
    fall = n * 0.5 / (1 + np.sqrt(np.array(order, float))) ** 1.5
    chroma = fall[:CHROMA_COEFFICIENTS] / CHROMA_GAIN
    return np.concatenate([fall[:LUMA_COEFFICIENTS], chroma, chroma])


def middles(rows: int, columns: int) -> np.ndarray:
    """Where the middle of each block lies in the picture, [rows, columns, 2] of (down, across) in -1 .. 1, float32."""
    down, across = ((2 * np.arange(n, dtype=np.float32) + 1) / n - 1 for n in (rows, columns))
    return np.stack(np.meshgrid(down, across, indexing="ij"), -1)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BlockTransform:
    """A video tower without parameters: truncated cosine transform of 16x16 blocks, mean over four frames.

    places: the last two channels, else the finest of blue against yellow, say which block of the picture it is. The
    router reads latents without positions (Eq. 8): it learns from a VAE's convolutions, which see the picture's edges,
    where something is, and from plain blocks it cannot.
    """

    places: bool = False
    channels: int = LUMA_COEFFICIENTS + 2 * CHROMA_COEFFICIENTS

    def encode(self, images: jax.Array) -> jax.Array:
        """Clips [B, 1 + 4n, H, W, 3] in [-1, 1], H and W multiples of 16 -> [B, 48, 1 + n, H/16, W/16] float32.

        The first frame is coded alone, later ones in groups of four, of which the mean is kept.
        """
        batch, frames, height, width, _ = images.shape
        if (frames - 1) % FRAMES_PER_LATENT or height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
            raise ValueError(
                f"A clip of {frames} frames of {height}x{width} cannot be encoded: expected 1 + 4n frames whose "
                "sides are multiples of 16; change config.data.head_size or the window."
            )
        later = images[:, 1:].reshape(batch, -1, FRAMES_PER_LATENT, height, width, 3).mean(2)
        x = jnp.concatenate([images[:, :1], later], 1)
        stride = SPATIAL_STRIDE
        x = x.reshape(batch, -1, height // stride, stride, width // stride, stride, 3)
        x = x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(*x.shape[:3], width // stride, -1)
        latents = x @ jnp.asarray(block_transform() / spread(), jnp.float32)  # [B, F, h, w, 48]
        if self.places:
            latents = latents.at[..., -2:].set(middles(*latents.shape[2:4]))
        return latents.transpose(0, 4, 1, 2, 3)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [B, 48, F, h, w] -> frames [B, F, 16h, 16w, 3], one per latent; clipped to [-1, 1]."""
        if self.places:
            latents = latents.at[:, -2:].set(0)
        x = latents.transpose(0, 2, 3, 4, 1) @ jnp.asarray((block_transform() * spread()).T, jnp.float32)
        batch, frames, rows, columns, _ = x.shape
        stride = SPATIAL_STRIDE
        x = x.reshape(batch, frames, rows, columns, stride, stride, 3).transpose(0, 1, 2, 4, 3, 5, 6)
        return jnp.clip(x.reshape(batch, frames, rows * stride, columns * stride, 3), -1, 1)


@dataclasses.dataclass(frozen=True)
class HashedWords:
    """A text tower without parameters: every word is a fixed unit-variance vector drawn from its hash."""

    dim: int
    length: int
    dtype = np.dtype(np.float32)

    def tokens(self, instruction: str) -> tuple[np.ndarray, np.ndarray]:
        """One instruction -> tokens [K, X] float32, zero after the last word, and mask [K] bool.

        Raises ValueError if it has no words or more than `length`.
        """
        words = instruction.lower().split()
        if not 0 < len(words) <= self.length:
            raise ValueError(
                f"Instruction {instruction!r} has {len(words)} words; expected 1 to {self.length} "
                "(config.towers.text_length)."
            )
        tokens = np.zeros((self.length, self.dim), np.float32)
        for i, word in enumerate(words):
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
            tokens[i] = np.random.default_rng(seed).standard_normal(self.dim)
        return tokens, np.arange(self.length) < len(words)
