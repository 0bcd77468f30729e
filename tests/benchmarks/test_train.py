"""The benchmark of the training step, at its tiniest size: both sides run and compute the same."""

import pytest

from ahawam_jax.compilation_cache import FOLDER
from benchmarks import train
from tests.conftest import ONE_DEVICE


@pytest.mark.slow
def test_both_sides_run_and_agree(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XLA_FLAGS", ONE_DEVICE)
    monkeypatch.setenv(FOLDER, "")  # the benchmark has its own
    train.main(["--size", "tiny", "--steps", "1", "--threads", "1"])
    out = capsys.readouterr().out
    for name in (train.FIRST, train.LATER):
        assert f"\n{name} " in out and f"\n{name} / released: median" in out
    assert f"\n{train.RELEASED} " in out


@pytest.mark.parametrize("other", [1.01, float("nan")])
def test_a_difference_is_an_error(other: float) -> None:
    assert "of the first 2 steps" in train.agreement([1.0, 2.0], [1.0, 2.0001])
    with pytest.raises(SystemExit, match="do not compute the same"):
        train.agreement([1.0, 1.0], [1.0, other])
