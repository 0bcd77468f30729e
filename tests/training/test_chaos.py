"""The command of `make chaos` with few blows, and that it sees what it looks for."""

from pathlib import Path

import pytest

from ahawam_jax.checkpoints import Checkpoints
from tests.training import chaos

pytestmark = pytest.mark.slow


def test_a_run_survives_blows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With processes that load the data, which must not be left behind either."""
    complaints = chaos.run(kills=1, stops=1, processes=2, workers=1, seed=1, folder=tmp_path)
    said = capsys.readouterr()
    assert complaints == 0, said.out + said.err
    assert "equals the uninterrupted one\npassed: 2 blows, 0 complaints" in said.out
    steps = Checkpoints(tmp_path / "struck").latest
    parts = sorted((tmp_path / f"struck/checkpoints/{steps}").rglob("d/*"), key=lambda path: path.stat().st_size)
    parts[-1].write_bytes(b"")
    assert chaos.damage(tmp_path / "struck")
