"""`verify` on towers of other sizes than the fixtures': expected values from the float64 reference, made here."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ahawam_jax.commands import verify
from ahawam_jax.towers import text_encoder_names as umt5
from ahawam_jax.towers import vae_names as vae
from ahawam_jax.towers.text_encoder import TextEncoderConfig, abstract_text_encoder_params
from ahawam_jax.towers.vae import VaeConfig, abstract_vae_params
from ahawam_jax.weights.convert import rows

VAE = dict(dim=4, dec_dim=6, z_dim=5, dim_mult=[1, 2, 2], num_res_blocks=1, temporal_downsample=[True, False], patch=2)
UMT5 = dict(vocab=50, dim=12, dim_attn=20, dim_ffn=16, num_heads=5, num_layers=3, num_buckets=16, max_distance=40)


@pytest.fixture(scope="module")
def reference(shared_dir: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", shared_dir / "reference" / "check_reference.py")
    module = importlib.util.module_from_spec(spec)
    before = torch.get_default_dtype(), torch.get_num_threads()
    spec.loader.exec_module(module)  # it makes float64 the default
    yield module
    torch.set_default_dtype(before[0])
    torch.set_num_threads(before[1])


def random_weights(table: Any, tree: Any) -> dict[str, np.ndarray]:
    """Every tensor random and scaled by its inputs, gains around 1: activations stay about 1."""
    rng = np.random.default_rng(0)
    weights = {}
    for row in rows(table, tree):
        shape = row.foreign_shape
        gain = row.name.endswith("gamma") or "norm" in row.name
        scale = 0.2 if gain else math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
        weights[row.name] = np.float32(gain + scale * rng.standard_normal(shape))
    return weights


def doubles(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(x)).double() for name, x in tensors.items()}


@pytest.fixture(scope="module")
def folder(reference: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    fixtures = {name: "" for name in ("vae_weights", "vae_golden", "umt5_weights", "umt5_golden")}
    (folder / "config.json").write_text(json.dumps({"vae": VAE, "umt5": UMT5, "fixtures": fixtures}))
    rng = np.random.default_rng(1)

    sizes = {name: tuple(x) if isinstance(x, list) else x for name, x in VAE.items() if name != "patch"}
    config = VaeConfig(**sizes, dtype="float32")
    weights = {f"model.{name}": x for name, x in
               random_weights(list(vae.table(config)), abstract_vae_params(config)).items()}  # fmt: skip
    golden = {
        "mean": rng.standard_normal(5), "std": 0.5 + rng.random(5), "video": rng.uniform(-1, 1, (1, 3, 5, 16, 24)),
        "images": rng.uniform(-1, 1, (2, 3, 1, 16, 8)), "dec_in": rng.standard_normal((1, 5, 3, 2, 3)),
    }  # fmt: skip
    golden = {name: np.float32(x) for name, x in golden.items()}
    x = doubles(golden)
    tower = reference.VAE(SimpleNamespace(**VAE), doubles(weights), x["mean"], x["std"])
    decoded = tower.decode(x["dec_in"])
    golden |= {name: np.float32(y.numpy()) for name, y in (
        ("latent", tower.encode(x["video"])), ("image_latents", tower.encode(x["images"])), ("dec_out_raw", decoded),
        ("dec_out_clamped", decoded.clamp(-1, 1)),
    )}  # fmt: skip
    save_file(weights, folder / "vae_weights.safetensors")
    save_file(golden, folder / "vae_golden.safetensors")

    weights = random_weights(umt5.TABLE, abstract_text_encoder_params(TextEncoderConfig(**UMT5, dtype="float32")))
    ids, mask = rng.integers(0, 50, (2, 30)), np.arange(30) < np.array([[30], [17]])
    place = torch.arange(300)
    buckets = reference.distance_bucket(place[None] - place[:, None], 16, 40)
    out = reference.run_umt5(SimpleNamespace(**UMT5), doubles(weights), torch.from_numpy(ids), torch.from_numpy(mask))
    golden = {"ids": ids, "mask": mask.astype(np.int64), "rel_buckets_300": buckets.numpy().astype(np.int32),
              "out": np.float32(out.numpy())}  # fmt: skip
    golden["out_padding_zeroed"] = golden["out"] * mask[..., None]
    save_file(weights, folder / "umt5_weights.safetensors")
    save_file(golden, folder / "umt5_golden.safetensors")
    return folder


def test_other_sizes_pass(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(folder)]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "all match" in out and "4 tensors" in out and "3 tensors" in out and "not covered" not in out


@pytest.mark.parametrize("name, tensor, value", [
    ("vae_golden", "dec_out_raw", None), ("vae_golden", "mean", None), ("umt5_golden", "out", None),
    ("umt5_golden", "rel_buckets_300", 1), ("umt5_weights", "blocks.2.attn.k.weight", None),
])  # fmt: skip
def test_damage_is_noticed(folder: Path, name: str, tensor: str, value: Any, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / f"{name}.safetensors")
    tensors[tensor] = tensors[tensor].copy()
    flat = tensors[tensor].reshape(-1)
    flat[len(flat) // 2] += np.abs(flat).max() if value is None else value
    save_file(tensors, tmp_path / f"{name}.safetensors")
    assert verify.main([str(tmp_path), "--only", name.replace("weights", "golden")]) == 1
