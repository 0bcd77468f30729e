"""Every experiment in configs/ fits together, and the paper's is the paper's."""

import importlib
from typing import Any

import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ahawam_jax.inference.policy import PolicyConfig
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.towers.latents import make_canvas, make_windows
from ahawam_jax.training.objective import ObjectiveConfig
from ahawam_jax.training.optimizer import OptimizerConfig
from ahawam_jax.training.resuming import steps_of
from configs import baselines, robodojo, robotwin, robotwin_paper
from tests.conftest import REPOSITORY

NAMES = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py") if path.stem != "__init__")
PARTS = ("memory", "routing")


@pytest.mark.parametrize("name", NAMES)
def test_every_config_fits_together(name: str) -> None:
    config = importlib.import_module(f"configs.{name}").get_config()
    model, optimizer = ModelConfig.create(config.model), OptimizerConfig(**config.optimizer)
    ObjectiveConfig(**config.objective).check(model.chunk)
    assert make_windows(config, model).history_frames and make_canvas(config).size
    assert steps_of(config.train, 10**6, config.data.batch_size, optimizer) > optimizer.warmup(10**4)


@pytest.mark.parametrize("base", baselines.BASES)
def test_a_baseline_differs_from_its_base_in_its_switches_alone(base: str) -> None:
    plain = flatten(baselines.BASES[base]())
    for variant, switches in baselines.VARIANTS.items():
        config = baselines.get_config(f"{base}.{variant}")
        got = flatten(config)
        expected = {f"{section}.{part}": switches[part] for section in ("objective", "policy") for part in PARTS}
        expected["policy.refresh_every"] = 1 if switches["synchronous"] else plain["policy.refresh_every"]
        assert got == plain | expected
        ObjectiveConfig(**config.objective).check_policy(config.policy)
        model = ModelConfig.create(config.model)
        PolicyConfig(**config.policy).check(model)
        assert make_windows(config, model).history_frames == (model.memory_frames if switches["memory"] else 0)
    assert baselines.get_config(f"{base}.full") == baselines.BASES[base]()


def test_the_baselines_are_those_of_the_paper() -> None:
    """Table 2: each row adds one mechanism to asynchrony; Fast-WAM is synchronous."""
    rows = {name: tuple(baselines.get_config(f"demo.{name}").policy[x] for x in ("refresh_every", *PARTS))
            for name in baselines.VARIANTS}  # fmt: skip
    assert rows == dict(
        fast_wam=(1, False, False), naive_async=(2, False, False), memory=(2, True, False), ovcr=(2, False, True),
        full=(2, True, True),
    )  # fmt: skip
    with pytest.raises(ValueError, match="demo.none is no baseline; expected BASE.VARIANT, BASE one of demo"):
        baselines.get_config("demo.none")
    windows = [make_windows(x, ModelConfig.create(x.model)) for x in (baselines.far(), baselines.far_aligned())]
    assert [(x.rows, x.chunks, x.max_offset) for x in windows] == [(64, 3, 15), (64, 4, 0)]
    PolicyConfig(refresh_every=6, execute=8).check(ModelConfig.create(baselines.far().model))


def flatten(config: ConfigDict) -> dict[str, Any]:
    return flatten_dict(config.to_dict(), sep=".")


def test_as_in_the_paper(capsys: pytest.CaptureFixture) -> None:
    """Table 4, Sections 3.3 and 4.1; the sizes are those of the release."""
    config, released = robotwin_paper.get_config(), robotwin.get_config()
    assert config.model == released.model and config.model.horizon == 64
    objective, optimizer = ObjectiveConfig(**config.objective), OptimizerConfig(**config.optimizer)
    assert objective.time_law == objective.action_time_law == "logit_normal"
    assert optimizer.learning_rate == 1e-4 and config.data.batch_size == 512
    windows = make_windows(config, ModelConfig.create(config.model))
    assert (windows.max_offset, windows.rows, windows.video_frames, windows.history_stride) == (15, 80, 9, 64)
    rows = 6_100_000
    steps = steps_of(config.train, rows, 512, optimizer)
    assert steps == 59_571 and steps * 512 >= 5 * rows > (steps - 1) * 512
    assert optimizer.warmup(steps) == 2_979
    assert "5 epochs of 6,100,000 windows, 512 a step: 59,571 steps, 2,979 of them" in capsys.readouterr().out


def test_as_in_the_release_for_robodojo() -> None:
    config, other = robodojo.get_config(), robotwin.get_config()
    assert config.model.to_dict() == other.model.to_dict() | {"memory_anchor": True} and not other.model.memory_anchor
    assert make_windows(config, ModelConfig.create(config.model)).memory_anchor
    assert (config.optimizer.learning_rate, config.train.steps, config.train.epochs) == (3e-5, 0, 20)
    assert (config.policy.refresh_every, config.policy.steps, config.policy.execute) == (4, 10, 16)
