"""Checks of `ahawam verify` for the frozen towers and for the executor's beginning in Wan."""

from typing import Any

import jax
import numpy as np

from ahawam_jax.towers import text_encoder_names as umt5
from ahawam_jax.towers import vae_names as vae
from ahawam_jax.towers.text_encoder import (
    TextEncoder,
    TextEncoderConfig,
    abstract_text_encoder_params,
    distance_bucket,
)
from ahawam_jax.towers.vae import PATCH, VaeConfig, WanVae, abstract_vae_params
from ahawam_jax.verification.fixtures import Fixture, Suite
from ahawam_jax.weights.convert import load
from ahawam_jax.weights.wan import VIDEO, resample


def check_vae(suite: Suite, f: Fixture) -> None:
    """Encoder on a clip and on single images, decoder with and without clipping."""
    sizes = {name: tuple(x) if isinstance(x, list) else x for name, x in suite.config["vae"].items()}
    if sizes.pop("patch") != PATCH:
        raise ValueError(f"config.json asks for another patch than {PATCH} in the VAE.")
    config = VaeConfig(**sizes, dtype="float32")
    tensors = {name.removeprefix("model."): x for name, x in suite.weights("vae_weights").items()}
    params = load(tensors, list(vae.table(config)), abstract_vae_params(config))
    tower = WanVae(params, config, mean=f["mean"], std=f["std"])

    def channels_last(x: np.ndarray) -> np.ndarray:  # [B, 3, T, H, W] -> [B, T, H, W, 3]
        return x.transpose(0, 2, 3, 4, 1)

    encode = jax.jit(lambda tower, images: tower.encode(images))
    f.compare("latent", encode(tower, channels_last(f["video"])))
    f.compare("image_latents", encode(tower, channels_last(f["images"])))
    frames = jax.jit(lambda tower, latents: tower.decode_raw(latents))(tower, f["dec_in"]).transpose(0, 4, 1, 2, 3)
    f.compare("dec_out_raw", frames)
    f.compare("dec_out_clamped", frames.clip(-1, 1))


def check_umt5(suite: Suite, f: Fixture) -> None:
    """Distance buckets exactly, then the encoder's output with and without its padding rows."""
    config = TextEncoderConfig(**suite.config["umt5"], dtype="float32")
    place = np.arange(len(f["rel_buckets_300"]))
    buckets = distance_bucket(place[None] - place[:, None], config.num_buckets, config.max_distance)
    f.compare("rel_buckets_300", buckets, tolerance=0.0)
    params = load(suite.weights("umt5_weights"), umt5.TABLE, abstract_text_encoder_params(config))
    ids, mask = f["ids"], f["mask"].astype(bool)
    out = jax.jit(lambda params: TextEncoder(config).apply({"params": params}, ids, mask))(params)
    f.compare("out", out)
    f.compare("out_padding_zeroed", np.where(mask[..., None], out, 0))


def check_action_init(suite: Suite, f: Fixture) -> None:
    """Every tensor of the executor that is interpolated from the planner's."""
    planner: dict[str, Any] = suite.weights()
    for name, want in f.stored.items():
        f.compare(name, resample(planner[VIDEO + name], want.shape))


CHECKS = {"vae_golden": check_vae, "umt5_golden": check_umt5, "p_action_init_from_video": check_action_init}
