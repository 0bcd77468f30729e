"""Camera images -> latents, by whichever video tower."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ahawam_jax.towers.building import VideoTower


def pixels(images: jax.Array) -> jax.Array:
    """uint8 images -> float32 in [-1, 1], what every video tower takes."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def encode(batch: Mapping[str, jax.Array], tower: VideoTower) -> dict[str, jax.Array]:
    """Images of a batch -> latents, the keys `joint_loss` reads; what comes as latents from a cache stays."""

    def singles(images: jax.Array) -> jax.Array:  # [B, n, H, W, 3] -> [B, n, c, 1, h, w]
        batch, n = images.shape[:2]
        latents = tower.encode(pixels(images.reshape(-1, 1, *images.shape[2:])))
        return latents.reshape(batch, n, *latents.shape[1:])

    def clip(images: jax.Array) -> jax.Array:  # [B, 1+4n, H, W, 3] -> [B, c, 1+n, h, w]
        return tower.encode(pixels(images))

    encoded = dict(batch)
    for images, latents, by in (
        ("video", "input_latents", clip),
        ("observations", "obs_latents", singles),
        ("history", "history_latents", singles),
    ):
        if images in batch:
            encoded[latents] = by(encoded.pop(images))
        elif latents in batch:  # there may be no history
            encoded[latents] = batch[latents].astype(jnp.float32)
    return jax.lax.stop_gradient(encoded)
