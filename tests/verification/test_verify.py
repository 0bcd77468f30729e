"""`ahawam verify`: the reference passes, at any size, and every kind of damage is noticed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ahawam_jax.commands import verify
from ahawam_jax.weights.release import release_shapes
from tests.conftest import REPOSITORY
from tests.tiny_model import CONFIG

SHIFT = 3.0
MODEL = dict(
    num_layers=CONFIG.num_layers, num_heads=CONFIG.num_heads, head_dim=CONFIG.head_dim, norm_eps=CONFIG.norm_eps,
    latent_channels=CONFIG.latent_channels, patch_size=[1, 2, 2], text_dim=CONFIG.text_dim, freq_dim=CONFIG.freq_dim,
    video_hidden=CONFIG.planner_dim, video_ffn=CONFIG.planner_ffn_dim, action_hidden=CONFIG.executor_dim,
    action_ffn=CONFIG.executor_ffn_dim, action_dim=CONFIG.action_dim, proprio_dim=CONFIG.state_dim,
    num_queries=CONFIG.num_queries, action_chunk_size=CONFIG.chunk, action_horizon=CONFIG.horizon,
    num_history_frames=CONFIG.memory_frames, video_rope_frame_stride=CONFIG.video_ratio, obs_downsample=1,
    video_frames_per_latent=4,
)  # fmt: skip

Tensors = dict[str, np.ndarray]


def shifted(u: np.ndarray) -> np.ndarray:
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def scheduler_tables() -> Tensors:
    """The schedule and loss weight in float64, written out."""
    bell = np.exp(-2 * (shifted(np.linspace(1, 0, 1001)[:-1]) - 0.5) ** 2)
    u = np.linspace(0, 1, 51)
    tables = {
        "u": np.float32(u),
        "t_of_u": np.float32(1000 * shifted(u)),
        "weight_of_t": np.float32((np.exp(-2 * (shifted(u) - 0.5) ** 2) - bell.min()) / (bell - bell.min()).mean()),
        "y_min": bell.min(),
        "norm_const": (bell - bell.min()).mean(),
    }
    for steps in (1, 4, 10):
        levels = shifted(np.linspace(1, 0, steps + 1))
        for name, values in ((f"timesteps{steps}", 1000 * levels[:-1]), (f"deltas{steps}", np.diff(levels))):
            tables[f"{name}.f32"] = np.float32(values)
            tables[f"{name}.bf16"] = np.float32(values).astype(jnp.bfloat16).astype(np.float32)
    return {name: np.asarray(value) for name, value in tables.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Fixtures at sizes of our own: config.json, tiny_weights and s_scheduler."""
    config = {"model": MODEL, "flow": {"shift": 5.0}, "examples": {"table_shift": SHIFT}}
    config["fixtures"] = {"tiny_weights": "weights", "s_scheduler": "tables"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    weights = {name: np.float32(rng.standard_normal(shape)) for name, shape in release_shapes(CONFIG).items()}
    save_file(weights, tmp_path / "tiny_weights.safetensors")
    save_file(scheduler_tables(), tmp_path / "s_scheduler.safetensors")
    return tmp_path


def edit(path: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_other_sizes_pass(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = verify.main([str(folder)])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "all match" in out
    assert f"{len(release_shapes(CONFIG))} tensors" in out


def scale_one(tensors: Tensors) -> None:
    tensors["weight_of_t"][7] *= 1.0005


def not_a_number(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors[name].reshape(-1).__setitem__(0, np.nan)


DAMAGED_TENSORS = {
    "deviation": ("s_scheduler", scale_one, "weight_of_t deviates by"),
    "NaN in a table": ("s_scheduler", not_a_number("t_of_u"), "t_of_u as stored is not finite"),
    "NaN in a weight": (
        "tiny_weights",
        not_a_number("proprio_encoder/bias"),
        "proprio_encoder/bias as stored is not finite",
    ),
    "surplus table": ("s_scheduler", lambda t: t.update(extra=np.zeros(1)), "extra was neither used nor compared"),
    "surplus weight": ("tiny_weights", lambda t: t.update(extra=np.zeros(1)), "surplus: extra [1]"),
    "missing table": ("s_scheduler", lambda t: t.pop("norm_const"), "norm_const is not stored"),
    "no tables": ("s_scheduler", lambda t: [t.pop(n) for n in list(t) if "steps" in n or "deltas" in n],
                  "no timesteps<N>.f32 is stored"),
    "missing weight": ("tiny_weights", lambda t: t.pop("proprio_encoder/bias"), "missing: proprio_encoder/bias"),
    "misshapen table": (
        "s_scheduler",
        lambda t: t.update(deltas4=t.pop("deltas4.f32"), **{"deltas4.f32": np.zeros(3)}),
        "deltas4.f32 has shape [4], stored [3]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_TENSORS)
def test_damaged_tensor_is_named(folder: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    fixture, change, line = DAMAGED_TENSORS[damage]
    edit(folder / f"{fixture}.safetensors", change)
    assert verify.main([str(folder), "--only", fixture]) == 1
    out = capsys.readouterr().out
    assert line in out
    assert "FAIL" in out and "1 fixtures failed" in out


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGED_FILES = {
    "missing": ("s_scheduler.safetensors", Path.unlink, "s_scheduler.safetensors is missing"),
    "truncated": ("s_scheduler.safetensors", truncate, "s_scheduler.safetensors is not a readable safetensors file"),
    "empty": ("tiny_weights.safetensors", lambda path: path.write_bytes(b""), "tiny_weights.safetensors is empty"),
    "no config": ("config.json", Path.unlink, "config.json does not exist"),
    "cut config": ("config.json", truncate, "is not valid JSON"),
    "empty config": ("config.json", lambda path: path.write_text("{}"), "must be JSON with a 'fixtures' object"),
    "no fixtures": ("config.json", lambda path: path.write_text('{"fixtures": {}}'), "Nothing was checked"),
    "fixture of a later version": (
        "config.json",
        lambda path: path.write_text(path.read_text().replace('"s_scheduler"', '"vae_golden"')),
        "vae_golden.safetensors is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_FILES)
def test_damaged_file_is_named(folder: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    name, change, line = DAMAGED_FILES[damage]
    change(folder / name)
    assert verify.main([str(folder)]) == 1
    captured = capsys.readouterr()
    assert line in captured.out + captured.err


def test_unknown_fixture_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(folder), "--only", "nothing"]) == 1
    assert "No fixture named nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_reference_matches(shared_dir: Path) -> None:
    """As a user calls it, compiled as for a user."""
    command = [sys.executable, "-m", "ahawam_jax", "verify", str(shared_dir / "reference")]
    run = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True)
    assert run.returncode == 0 and "all match" in run.stdout, run.stdout + run.stderr
