"""Whole distillations at a tiny size: resuming, whose units they take, and what comes out."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ahawam_jax.checkpoints import save_params
from ahawam_jax.inference.policy import Policy, load_run
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.training.distillation import EXECUTOR
from ahawam_jax.training.loop import train
from data_pipelines.normalization import Normalization
from data_pipelines.readers.subset import open_datasets
from data_pipelines.statistics import compute_by_robot, to_lists
from export.loading import load_policy
from export.to_torch import convert
from tests import tiny_flash_config
from tests.conftest import REPOSITORY
from tests.data_pipelines import tiny_dataset
from tests.tiny_model import random_params

SAVED, STEPS = 3, 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset.write_dataset(tmp_path_factory.mktemp("distillation") / "dataset")


@pytest.fixture
def config(dataset: Path, tmp_path: Path) -> ConfigDict:
    """A distillation of a policy with random parameters, whose units are those of min-max."""
    config = tiny_flash_config.get_config()
    config.data.update(path=str(dataset), cache=str(dataset.parent / "frames"))
    config.init = str(tmp_path / "policy")
    config.mesh.update(data=1, fsdp=1)
    config.train.update(steps=STEPS, checkpoint_every=SAVED)
    units = Normalization("min-max", "min-max", config.data.clip)
    statistics = to_lists(compute_by_robot([part.dataset for part in open_datasets(str(dataset))], units))
    run = {"config": config.to_dict(), "statistics": statistics, "instructions": []}
    params = jax.tree.map(jnp.asarray, random_params(ModelConfig.create(config.model)))
    save_params(tmp_path / "policy", params, run)
    return config


@pytest.mark.slow
def test_resumed_from_a_checkpoint_it_is_the_uninterrupted_run(
    config: ConfigDict, single_device: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the last bit, also where the policy is gone by then: its executor is in the checkpoint."""
    plain, again, policy = tmp_path / "plain", tmp_path / "again", load_run(config.init)
    train(config, plain)
    number = r"\d\.\d{4}"
    three = ", ".join([number] * 3)
    distances = f"distance to the teacher in 1, 2, 4 steps {three}, undistilled {three}"
    said = capsys.readouterr().out
    assert re.search(f"step {STEPS}: open-loop error {number} in normalised units; {distances}\n", said), said

    shutil.copytree(plain, again)  # as after a kill -9
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    shutil.rmtree(config.init)
    train(config, again)
    assert f"resuming at step {SAVED}:" in capsys.readouterr().out
    curves = [(run / "metrics.jsonl").read_text() for run in (plain, again)]
    assert curves[0] == curves[1] and curves[0].count("\n") == STEPS
    _, params, record = load_run(plain)
    jax.tree.map(np.testing.assert_array_equal, params, load_run(again)[1])

    assert record["statistics"] == policy[2]["statistics"]
    for name, part in policy[1].items():
        if name not in EXECUTOR:
            jax.tree.map(np.testing.assert_array_equal, params[name], part)
    flash = Policy.load(plain)
    assert flash.config.steps == 2
    images = {camera: np.zeros((1, 32, 48, 3), np.uint8) for camera in flash.canvas.cameras}
    actions, _ = flash(images, np.zeros((1, 5)), flash.start(["open the drawer"]))
    assert actions.shape == (1, 4, 3) and np.isfinite(actions).all()

    convert(plain, tmp_path / "export")  # an ordinary checkpoint: it is exported, and served from where it lies
    served, exported = load_policy(plain), load_policy(tmp_path / "export")
    assert exported.config.steps == 2
    np.testing.assert_array_equal(served(images, np.zeros((1, 5)), served.start(["open the drawer"]))[0], actions)
    # Its noise is another's; `convert` has compared its graphs with JAX.
    got, _ = exported(images, np.zeros((1, 5)), exported.start(["open the drawer"]))
    assert got.shape == actions.shape and np.isfinite(got).all()


def test_a_config_without_distillation(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ahawam_jax", "distill", "--config=configs/demo.py"]
    command.append(f"--workdir={tmp_path / 'x'}")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "x").exists()
    assert done.stderr.startswith("error: --config has no section distillation; take one that has")
