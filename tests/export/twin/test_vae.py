"""The twin's video towers against JAX and against the reference fixture."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from ahawam_jax.towers.stand_ins import BlockTransform
from ahawam_jax.towers.vae import VaeConfig, WanVae, abstract_vae_params
from ahawam_jax.towers.vae_names import table
from ahawam_jax.verification.fixtures import Suite
from ahawam_jax.weights.convert import load, rows
from ahawam_jax.weights.tensors import WeightsError
from export.twin.layers import DTYPES
from export.twin.vae import BlockTransformEncoder, VaeEncoder
from tests.tiny_model import assert_close, normal

TOLERANCE = 2e-5  # float32 on both sides, about twenty layers
PLAIN = VaeConfig(dim=4, dec_dim=6, z_dim=5, num_res_blocks=1, dtype="float32")
# Other strides, widths that shrink again in the last stage, and no stage that halves height and width alone.
OTHER = VaeConfig(
    dim=6, dec_dim=4, z_dim=3, dim_mult=(1, 4, 2), num_res_blocks=2, temporal_downsample=(True, True), dtype="float32"
)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


def random_tensors(config: VaeConfig) -> dict[str, np.ndarray]:
    """Under Wan's names; gains around 1, kernels scaled by their inputs, all temporal taps alive."""
    rng, tensors = np.random.default_rng(0), {}
    for row in rows(table(config), abstract_vae_params(config)):
        x = rng.standard_normal(row.foreign_shape)
        if row.name.endswith("gamma"):
            x = 1 + 0.3 * x
        elif row.name.endswith("weight"):
            x = x / np.sqrt(np.prod(row.foreign_shape[1:]))
        tensors[row.name] = np.float32(x)
    return tensors


def canvas(config: VaeConfig) -> np.ndarray:
    """Two random images, 2 x 3 latent pixels large."""
    stride = config.spatial_stride
    return np.random.default_rng(1).integers(0, 256, (2, 2 * stride, 3 * stride, 3), np.uint8)


def jax_latents(tower: Any, images: np.ndarray) -> np.ndarray:
    clip = images[:, None].astype(np.float32) / 127.5 - 1.0
    return np.asarray(jax.jit(lambda tower, x: tower.encode(x))(tower, clip))[:, :, 0]


@pytest.mark.parametrize("config", [PLAIN, OTHER])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_image_is_encoded_like_jax(config: VaeConfig, dtype: str) -> None:
    config, tensors = dataclasses.replace(config, dtype=dtype), random_tensors(config)
    mean, std = 0.3 * normal(1, config.z_dim), np.exp(0.3 * normal(2, config.z_dim))
    params = load(tensors, table(config), abstract_vae_params(config))
    want = jax_latents(WanVae(params, config, mean, std), canvas(config))
    encoder = VaeEncoder.from_wan(tensors, config, DTYPES[dtype], mean=mean, std=std)
    got = encoder(torch.from_numpy(canvas(config)))
    assert got.dtype == torch.float32 and got.shape == want.shape
    if dtype == "float32":
        assert_close(got.numpy(), want, TOLERANCE)
    else:  # two bfloat16 computations: 1 - cos is about the square of their roundings of 2^-9 an operation
        got = got.numpy()
        assert np.vdot(got, want) / np.linalg.norm(got) / np.linalg.norm(want) > 0.9995
        single = ("gamma", "to_latent", "mean", "std")
        for name, x in (*encoder.named_parameters(), *encoder.named_buffers()):
            wanted = torch.float32 if any(part in name for part in single) else torch.bfloat16
            assert x.dtype == wanted and not x.requires_grad, name


def test_reference_images(shared_dir: Path) -> None:
    suite = Suite(shared_dir / "reference")
    f = suite.load("vae_golden")
    sizes = {name: tuple(x) if isinstance(x, list) else x for name, x in suite.config["vae"].items()}
    sizes.pop("patch")  # always 2
    tensors = {name.removeprefix("model."): x for name, x in suite.weights("vae_weights").items()}
    encoder = VaeEncoder.from_wan(tensors, VaeConfig(**sizes), mean=f["mean"], std=f["std"])
    # The stored images are no 8-bit ones, so they enter behind the scaling of `pixels`, which undoes this.
    images = torch.from_numpy((f["images"][:, :, 0].transpose(0, 2, 3, 1) + 1.0) * 127.5)
    assert_close(encoder(images).numpy(), f["image_latents"][:, :, 0], TOLERANCE)


@pytest.mark.parametrize("places", [False, True])
def test_block_transform_is_jax_s(places: bool) -> None:
    images = canvas(PLAIN)
    got = BlockTransformEncoder(places)(torch.from_numpy(images))
    # One product with 768 terms and nothing after it.
    assert_close(got.numpy(), jax_latents(BlockTransform(places), images), 2e-6)


@pytest.mark.parametrize("tower", ["vae", "block transform", "placed blocks"])
def test_towers_export(tower: str) -> None:
    images = torch.from_numpy(canvas(PLAIN))
    encoder: torch.nn.Module = BlockTransformEncoder(tower == "placed blocks")
    if tower == "vae":
        statistics = {"mean": np.zeros(PLAIN.z_dim), "std": np.ones(PLAIN.z_dim)}
        encoder = VaeEncoder.from_wan(random_tensors(PLAIN), PLAIN, **statistics)
    program = torch.export.export(encoder, (images,))
    assert "conv3d" not in str(program.graph) and "scaled_dot_product_attention" not in str(program.graph)
    assert_close(program.module()(images).numpy(), encoder(images).numpy(), TOLERANCE)


def test_what_does_not_fit_is_a_sentence() -> None:
    tensors = random_tensors(PLAIN)
    without = {name: x for name, x in tensors.items() if name != "encoder.conv1.bias"} | {"encoder.x": np.ones(2)}
    with pytest.raises(WeightsError, match=r"2 tensors do not fit[^$]*missing: encoder.conv1.bias[^$]*surplus: encod"):
        VaeEncoder.from_wan(without, PLAIN)
    bad = tensors["encoder.head.2.weight"].copy()
    bad[0, 0, -1] = np.nan
    with pytest.raises(WeightsError, match="encoder.head.2.weight holds NaN or infinity"):
        VaeEncoder.from_wan(tensors | {"encoder.head.2.weight": bad}, PLAIN)
    with pytest.raises(WeightsError, match="cannot be built in torch.float16"):
        VaeEncoder.from_wan(tensors, PLAIN, torch.float16)
