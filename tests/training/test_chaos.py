"""A short `make chaos`."""

from pathlib import Path

import pytest

from tests.training import chaos


@pytest.mark.slow
def test_a_job_that_is_killed_and_stopped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert chaos.run(kills=2, stops=2, processes=2, seed=1, folder=tmp_path) == 0, capsys.readouterr().out
    assert "4 blows" in capsys.readouterr().out
