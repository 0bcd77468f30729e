"""What the benchmark takes for the released code must compute what the twin computes."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ahawam_jax import flow_matching
from ahawam_jax.towers.vae import VaeConfig
from ahawam_jax.weights.release import release_shapes, to_release
from export.released.vae import ReleasedVae
from export.released.way import ReleasedWay, join
from export.twin.model import empty_memory, from_release, remember
from export.twin.vae import VaeEncoder
from tests.export.twin.test_vae import OTHER, PLAIN, canvas, random_tensors
from tests.tiny_model import BATCH, CONFIG, HEIGHT, TEXT, TOKENS, WIDTH, assert_close, normal, random_params

STEPS, SHIFT = 4, 5.0
TOLERANCE = 2e-5  # float32 on both sides, sums in another order
LOOP_TOLERANCE = 5e-5  # steps feed each other
THREE = dataclasses.replace(CONFIG, num_layers=3)
RELEASE = {name: torch.from_numpy(x) for name, x in to_release(random_params(THREE)).items()}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def tensors(*arrays: Any) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(x)) for x in arrays]


def stacked(cache: Any) -> list[np.ndarray]:
    """k, v [L, B, S, N, H] of a cache."""
    return [torch.stack(x).unflatten(-1, (THREE.num_heads, -1)).numpy() for x in zip(*cache, strict=True)]


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_every_module_computes_what_the_twin_does(prediction: str) -> None:
    config = dataclasses.replace(THREE, prediction=prediction)
    released = ReleasedWay.load(RELEASE, config)
    twin = from_release(RELEASE, config, (HEIGHT, WIDTH), STEPS, SHIFT)
    planner, executor = twin.planner, twin.executor
    text, mask = tensors(normal(1, BATCH, TEXT, config.text_dim), np.arange(TEXT) < np.array([[3], [4]]))
    buffers, memory = empty_memory(config, BATCH, TOKENS, torch.float32), []
    planner_text = planner.text(text)
    for i, frame in enumerate((0, 3, 500)):
        latents = torch.from_numpy(normal(10 + i, BATCH, config.latent_channels, HEIGHT, WIDTH))
        factors = released.video_factors(frame, HEIGHT // 2, WIDTH // 2)
        cache = released.prefill(latents, factors, text, mask, join(memory) if memory else None)
        k, v = planner(latents, *planner.rotary(np.full(BATCH, frame)), *planner_text, mask, *buffers)
        assert_close(stacked(cache), [k.numpy(), v.numpy()], TOLERANCE)
        memory.append(cache)
        remember(*buffers, k, v, i, anchor=False)
    assert_close(released.queries(latents).numpy(), twin.router.queries(latents).numpy(), TOLERANCE)
    routed, want = released.route(latents, cache), twin.router(latents, k, v)
    assert_close(stacked(routed), [x.numpy() for x in want], TOLERANCE)

    noise, state = tensors(normal(5, BATCH, config.chunk, config.action_dim), normal(6, BATCH, config.state_dim))
    levels = flow_matching.noise_levels(STEPS, SHIFT).tolist()
    for start in (0, config.chunk):
        actions = executor(
            noise, *executor.rotary(start), *executor.text(text), mask, *executor.state(state), *want
        ).numpy()
        for factors in (None, released.action_factors(start)):
            got = released.denoise(noise, state, start, levels, text, mask, routed, factors)
            assert_close(got.numpy(), actions, LOOP_TOLERANCE)


@pytest.mark.parametrize("config", [PLAIN, OTHER])
def test_the_vae_computes_what_the_twin_does(config: VaeConfig) -> None:
    values, images = random_tensors(config), torch.from_numpy(canvas(config))
    statistics = {"mean": 0.3 * normal(1, config.z_dim), "std": np.exp(0.3 * normal(2, config.z_dim))}
    released = ReleasedVae.load({name: torch.from_numpy(x) for name, x in values.items()}, config, **statistics)
    want = VaeEncoder.from_wan(values, config, **statistics)(images)
    assert_close(released(images).numpy(), want.numpy(), TOLERANCE)


def test_weights_are_shared_and_named_as_in_the_release() -> None:
    names = ReleasedWay.names(THREE)
    unused = set(release_shapes(THREE)) - set(names.values())
    assert len(set(names.values())) == len(names) and all("video.head." in name for name in unused)
    released = ReleasedWay.load(RELEASE, THREE)
    for name, x in released.named_parameters():
        assert x.data_ptr() == RELEASE[names[name]].data_ptr() and not x.requires_grad
