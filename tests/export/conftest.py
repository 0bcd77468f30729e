"""Tiny exports and what is built from them, made once for all tests of the folder."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ahawam_jax.towers.text_cache import prompt, write_entry
from ahawam_jax.towers.vae import VaeConfig
from ahawam_jax.weights.safetensors_file import write_safetensors
from export.to_tensorrt import build
from export.to_torch import convert
from tests import tiny_config
from tests.export.test_to_torch import LENGTH, import_random, robotwin_config
from tests.export.twin.test_vae import random_tensors
from tests.tiny_model import normal

INSTRUCTIONS = ("open the drawer", "close the drawer")  # those of tests/data_pipelines/tiny_dataset.py


@pytest.fixture(scope="session")
def plain_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32, towers without weights."""
    folder = tmp_path_factory.mktemp("plain")
    convert(import_random(tiny_config.get_config(), folder), folder / "export")
    return folder / "export"


@pytest.fixture(scope="session")
def robotwin_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bfloat16 weights and the release's towers, three layers; beside it `run`, the checkpoint it is of."""
    folder = tmp_path_factory.mktemp("robotwin")
    (folder / "vae").mkdir()
    (folder / "text").mkdir()
    vae = VaeConfig(dim=4, dec_dim=4, num_res_blocks=1)
    write_safetensors(folder / "vae" / "Wan2.2_VAE.safetensors", random_tensors(vae), {})
    for i, text in enumerate(INSTRUCTIONS):
        write_entry(folder / "text", prompt(text), normal(i, LENGTH, 16), np.arange(LENGTH) < 4 + i)
    config = robotwin_config(folder)
    config.data.history_stride = 4  # the tiny dataset's episodes are short
    import_random(config, folder, ml_dtypes.bfloat16)
    convert(folder / "run", folder / "export")
    return folder / "export"


@pytest.fixture(scope="session", params=["float32", "bfloat16"])
def built(request: pytest.FixtureRequest, robotwin_export: Path) -> Path:
    """Engines of that export, in both dtypes."""
    return request.getfixturevalue(f"{request.param}_engines")


@pytest.fixture(scope="session")
def float32_engines(robotwin_export: Path) -> Path:
    return build(robotwin_export, "rtx5090d", robotwin_export.parent / "engines-float32", dtype="float32")


@pytest.fixture(scope="session")
def bfloat16_engines(robotwin_export: Path) -> Path:
    return build(robotwin_export, "rtx5090d", robotwin_export.parent / "engines-bfloat16")
