"""Names and shapes of the Wan2.2 VAE at full size: our tree, Wan's file, diffusers' model."""

from pathlib import Path

import flax
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from ahawam_jax.models.config import ModelConfig
from ahawam_jax.towers.building import build_video_tower
from ahawam_jax.towers.vae import VaeConfig, abstract_vae_params
from ahawam_jax.towers.vae_names import from_diffusers, table, vae_tensors
from ahawam_jax.weights.files import open_weights
from ahawam_jax.weights.tensors import WeightsError

CONFIG = VaeConfig()
OTHER = VaeConfig(dim=8, dec_dim=8, z_dim=3, dim_mult=(1, 4, 2), num_res_blocks=3, temporal_downsample=(False, True))

Shapes = dict[str, tuple[int, ...]]


def wan_shapes(config: VaeConfig) -> Shapes:
    """Every tensor of Wan's file at these sizes; checks on the way that every parameter has one name."""
    ours = flax.traverse_util.flatten_dict(abstract_vae_params(config), sep="/")
    shapes = {}
    for name, path, kind in table(config):
        *window, outputs = ours.pop(path).shape
        if kind == "conv":
            *window, inputs = window
            shapes[name] = (outputs, inputs, *window)
        else:
            assert not window
            shapes[name] = (outputs,) + (1,) * {"flat": 0, "trail2": 2, "trail3": 3}[kind]
    assert not ours
    return shapes


def test_names_and_shapes_are_wan_s(shared_dir: Path) -> None:
    lines = (shared_dir / "reference" / "names_vae_full_flat.txt").read_text().splitlines()
    rows = (line.removeprefix("model.").split("\t") for line in lines)
    published = {name: tuple(int(size) for size in shape.strip("[]").split(",")) for name, shape in rows}
    assert len(published) == 196
    assert wan_shapes(CONFIG) == published


@pytest.mark.parametrize("config", [CONFIG, OTHER], ids=["full", "other"])
def test_diffusers_names_become_wan_s(config: VaeConfig) -> None:
    """diffusers 0.42.1: one to one, and every tensor has the same shape there."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan(
            base_dim=config.dim, decoder_base_dim=config.dec_dim, z_dim=config.z_dim, dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks, temperal_downsample=list(config.temporal_downsample),
            is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        )  # fmt: skip
    state = theirs.state_dict()
    renamed = {from_diffusers(name, config.num_res_blocks): tuple(x.shape) for name, x in state.items()}
    assert len(renamed) == len(state)
    assert renamed == wan_shapes(config)


def test_sizes_are_read_off_the_tensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {name: np.float32(rng.standard_normal(shape)) for name, shape in wan_shapes(OTHER).items()}
    save_file(tensors, tmp_path / "vae.safetensors")
    found, config = vae_tensors(open_weights(tmp_path / "vae.safetensors"), "bfloat16")
    assert config == OTHER and found.keys() == tensors.keys()
    save_file({f"model.{name}": x for name, x in tensors.items()}, tmp_path / "vae.safetensors")
    assert vae_tensors(open_weights(tmp_path / "vae.safetensors"), "bfloat16")[0].keys() == tensors.keys()


def test_another_vae_is_refused(tmp_path: Path) -> None:
    """Wan2.1's VAE has no stages inside its stages; and a VAE of other strides does not fit the model."""
    save_file({"encoder.conv1.weight": np.ones((2, 3, 3, 3, 3), np.float32)}, tmp_path / "wan2.1.safetensors")
    with pytest.raises(WeightsError, match="wan2.1.safetensors is not the VAE of Wan2.2"):
        vae_tensors(open_weights(tmp_path / "wan2.1.safetensors"), "float32")
    tensors = {name: np.ones(shape, np.float32) for name, shape in wan_shapes(OTHER).items()}
    save_file(tensors, tmp_path / "other.safetensors")
    towers = {"video": "wan2.2_vae", "video_weights": str(tmp_path / "other.safetensors")}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(WeightsError, match="makes 3 channels of 8x8x2 pixels and frames, the model reads 48"):
        build_video_tower(towers, ModelConfig(), sharding)
