"""The frozen towers a configuration names, with their weights: images <-> latents, instructions -> text tokens."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import unflatten_dict
from jax.sharding import Sharding

from ahawam_jax.models.config import FRAMES_PER_LATENT, SPATIAL_STRIDE, ModelConfig
from ahawam_jax.towers.stand_ins import BlockTransform, HashedWords
from ahawam_jax.towers.text_cache import CachedText
from ahawam_jax.towers.vae import VaeConfig, WanVae, abstract_vae_params
from ahawam_jax.towers.vae_names import table, vae_tensors
from ahawam_jax.weights.convert import digest, flatten, load
from ahawam_jax.weights.files import open_weights
from ahawam_jax.weights.tensors import WeightsError

STAND_INS = {"block_transform": BlockTransform(), "placed_block_transform": BlockTransform(places=True)}
VIDEO = (*STAND_INS, "wan2.2_vae")
TEXT = ("hashed_words", "umt5")

VideoTower = BlockTransform | WanVae
TextTower = HashedWords | CachedText


def build_text_tower(towers: Mapping[str, Any], model: ModelConfig) -> TextTower:
    """The text tower of config.towers. An unknown name is a ValueError listing what exists."""
    _check_name("text", towers["text"], TEXT)
    if towers["text"] == "hashed_words":
        return HashedWords(model.text_dim, towers["text_length"])
    if not towers["text_cache"]:
        raise WeightsError(
            "config.towers.text_cache is empty; give a folder of text tokens, which ahawam encode-text writes."
        )
    return CachedText(towers["text_cache"], model.text_dim, towers["text_length"])


def build_video_tower(
    towers: Mapping[str, Any], model: ModelConfig, sharding: Sharding, decoder: bool = False
) -> VideoTower:
    """The video tower of config.towers, its weights laid out by `sharding`; a decoder only where one is asked for."""
    _check_name("video", towers["video"], VIDEO)
    if towers["video"] in STAND_INS:
        return STAND_INS[towers["video"]]
    if not towers["video_weights"]:
        raise WeightsError(
            "config.towers.video_weights is empty; give the folder of Wan2.2-TI2V-5B or its Wan2.2_VAE.pth."
        )
    tower = load_vae(towers["video_weights"], sharding, model.dtype, decoder)
    sizes = (tower.config.z_dim, tower.config.spatial_stride, tower.config.frames_per_latent)
    wanted = (model.latent_channels, SPATIAL_STRIDE, FRAMES_PER_LATENT)
    if sizes != wanted:
        raise WeightsError(
            f"{towers['video_weights']} makes {sizes[0]} channels of {sizes[1]}x{sizes[1]}x{sizes[2]} pixels and "
            f"frames, the model reads {wanted[0]} of {wanted[1]}x{wanted[1]}x{wanted[2]}; use the VAE of Wan2.2."
        )
    return tower


def abstract_video_tower(towers: Mapping[str, Any], model: ModelConfig) -> VideoTower:
    """Shapes and dtypes of the tower that `build_video_tower` makes, without a decoder and without its weights."""
    _check_name("video", towers["video"], VIDEO)
    if towers["video"] in STAND_INS:
        return STAND_INS[towers["video"]]
    params = nn.unbox(abstract_vae_params(VaeConfig()))
    params = {name: x for name, x in params.items() if name not in ("decoder", "from_latent")}
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype if x.ndim > 1 else x.dtype), params)
    return jax.eval_shape(lambda params: WanVae(params), params)


def abstract_text(towers: Mapping[str, Any], model: ModelConfig, batch: int) -> jax.ShapeDtypeStruct:
    """Tokens [B, K, X] of so many instructions, in the dtype in which the text tower hands them out."""
    _check_name("text", towers["text"], TEXT)
    dtype = (HashedWords if towers["text"] == "hashed_words" else CachedText).dtype
    return jax.ShapeDtypeStruct((batch, towers["text_length"], model.text_dim), dtype)


def fingerprint(tower: VideoTower) -> str:
    """What tells one video tower from another: its kind, sizes, weights, and the dtypes they are computed in.

    Every weight counts, and takes part in a second for a VAE: ask once for all datasets.
    """
    leaves, structure = jax.tree.flatten(tower)
    return f"{type(tower).__name__} {hashlib.sha256(repr(structure).encode()).hexdigest()} {digest(leaves)}"


def _check_name(kind: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"config.towers.{kind} is {name!r}; expected one of {', '.join(known)}.")


def load_vae(path: str | Path, sharding: Sharding, dtype: str, decoder: bool = True) -> WanVae:
    """The Wan2.2 VAE from Wan's, DiffSynth's or diffusers' file; its sizes are read off the tensors.

    dtype is that of the convolutions and their kernels; gains and biases stay float32.
    """
    tensors, config = vae_tensors(open_weights(path, "vae"), dtype)
    rows = list(table(config))
    if not decoder:
        rows = [row for row in rows if not row[1].startswith(("decoder/", "from_latent/"))]
        tensors = {name: x for name, x in tensors.items() if not name.startswith(("decoder.", "conv2."))}
    leaves = flatten(abstract_vae_params(config))
    like = {
        path: jax.ShapeDtypeStruct(
            leaves[path].shape, dtype if leaves[path].ndim > 1 else leaves[path].dtype, sharding=sharding
        )
        for _, path, _ in rows
    }
    return WanVae(load(tensors, rows, unflatten_dict(like, sep="/")), config)
