"""The benchmark of the training step, at its tiniest size: both sides run and compute the same."""

import pytest

from benchmarks import train
from tests.conftest import ONE_DEVICE


@pytest.mark.slow
def test_both_sides_run_and_agree(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XLA_FLAGS", ONE_DEVICE)
    train.main(["--size", "tiny", "--steps", "1", "--threads", "1"])
    out = capsys.readouterr().out
    assert f"\n{train.OURS} " in out and f"\n{train.RELEASED} " in out and "ours / released: median" in out


@pytest.mark.parametrize("other", [1.01, float("nan")])
def test_a_difference_is_an_error(other: float) -> None:
    assert "of the first 2 steps" in train.agreement([1.0, 2.0], [1.0, 2.0001])
    with pytest.raises(SystemExit, match="do not compute the same"):
        train.agreement([1.0, 1.0], [1.0, other])
