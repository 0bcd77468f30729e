"""Importing a release asks what its weights cannot tell."""

from pathlib import Path

import pytest
from absl.testing import flagsaver

from ahawam_jax.checkpoints import Checkpoints
from ahawam_jax.commands import import_weights
from ahawam_jax.commands.import_weights import check_anchor, import_checkpoint
from ahawam_jax.inference.policy import load_run
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.weights.files import open_weights
from ahawam_jax.weights.release import payload, to_release
from ahawam_jax.weights.tensors import WeightsError
from ahawam_jax.weights.torch_file import write_torch
from tests import tiny_config
from tests.tiny_model import random_params


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("release") / "release.pt"
    params = random_params(ModelConfig.create(tiny_config.get_config().model))
    write_torch(path, payload(to_release(params), {"step": 3}))
    return path


def test_what_is_not_said_is_asked_for(release: Path, tmp_path: Path) -> None:
    config = tiny_config.get_config()
    with pytest.raises(WeightsError, match="release.pt does not tell .* add --memory_anchor if so"):
        import_checkpoint(config, str(release), str(tmp_path / "run"))
    with pytest.raises(WeightsError, match="^--memory_anchor was given, but .* is False; use configs/robodojo"):
        import_checkpoint(config, str(release), str(tmp_path / "run"), memory_anchor=True)
    config.model.memory_anchor = True
    with pytest.raises(WeightsError, match="^--nomemory_anchor was given, but .* is True; use configs/robotwin"):
        import_checkpoint(config, str(release), str(tmp_path / "run"), memory_anchor=False)
    assert Checkpoints(tmp_path / "run").latest is None
    import_checkpoint(config, str(release), str(tmp_path / "run"), memory_anchor=True)
    assert load_run(tmp_path / "run")[0].config.memory_anchor


def test_the_flag_reaches_the_import(monkeypatch: pytest.MonkeyPatch, release: Path) -> None:
    said = []
    monkeypatch.setattr(import_weights, "import_checkpoint", lambda *arguments: said.append(arguments[-1]))
    command = ["--config=configs/robotwin.py", f"--source={release}", "--workdir=nowhere"]
    for flag in ([], ["--memory_anchor"], ["--nomemory_anchor"], ["--memory_anchor=false"]):
        with pytest.raises(SystemExit), flagsaver.flagsaver():
            import_weights.main([*command, *flag])
    assert said == [None, True, False, False]


def test_wan_is_not_asked(release: Path) -> None:
    """It was trained with neither."""
    wan = open_weights(str(release))
    for name in [name for name in wan.tensors if name.startswith("mot/")]:
        del wan.tensors[name]
    check_anchor(wan, ModelConfig(memory_anchor=True), None)
