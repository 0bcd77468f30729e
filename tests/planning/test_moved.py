"""Bytes and launches of the real programs, compiled for an H100 that is not here. Needs XLA's CUDA plug-in, no GPU."""

import pytest

from ahawam_jax.planning.compiling import _folder, compile_step
from ahawam_jax.planning.devices import make_cluster
from ahawam_jax.planning.kernel_pages import of_a_layer
from ahawam_jax.planning.kernels import launches, total_bytes
from ahawam_jax.planning.policies import compile_policy
from configs import robotwin

LAYERS = 3  # of 30, at their true widths; the rest of a program is as large as at full size
GROWTH = 1.03  # of the figures below, which are those of JAX 0.10.2
MOVED = {  # GB, launches
    "chunk, 2 steps": (1.87, 317),
    "refresh": (1.60, 181),
    "layer": (30.85, 648),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_folder("jax_cuda12_plugin") is None, reason="the CUDA plug-in for JAX is not installed"),
]


@pytest.fixture(autouse=True)
def flags_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")  # the tests' own are for quick compiling on CPUs


def check(name: str, moved: int, runs: int) -> None:
    most = MOVED[name]
    print(f'"{name}": ({moved / 1e9:.2f}, {runs}),')
    assert moved <= GROWTH * 1e9 * most[0], f"The {name} moves {moved / 1e9:.2f} GB, before it were {most[0]}."
    assert runs <= GROWTH * most[1], f"The {name} launches {runs} kernels, before it were {most[1]}."


def test_chunk_and_refresh() -> None:
    config = robotwin.get_config()
    config.model.num_layers = LAYERS
    for program in compile_policy(config, make_cluster("h100", "1x1x1", 1), [2], 1):
        check(program.name, total_bytes(program.kernels), launches(program.kernels))


def test_a_layer_in_training() -> None:
    """Of 8 samples, latents cached."""
    config = robotwin.get_config()
    config.model.num_layers = LAYERS
    config.data.update(batch_size=8, latents="cached", latent_clips=True)
    layer = of_a_layer(compile_step(config, make_cluster("h100", "1x1x1", 1)).kernels, LAYERS)
    check("layer", total_bytes(layer), launches(layer))
