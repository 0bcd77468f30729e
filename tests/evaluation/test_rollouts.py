"""Success intervals, videos, and a closed loop with the scripted expert."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from ahawam_jax.commands import evaluate
from ahawam_jax.evaluation.rollouts import HEADER, Result, roll_out, wilson, write_sheet, write_video
from data_pipelines.simulation.rendering import check_rendering

needs_drawing = pytest.mark.skipif(check_rendering() is not None, reason=str(check_rendering()))


@pytest.mark.parametrize("successes, trials", [(0, 50), (44, 50), (50, 50), (1, 3)])
def test_wilson_equals_scipy(successes: int, trials: int) -> None:
    expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_row_fits_the_header() -> None:
    success, held = np.array([True, True, False, True]), np.array([True, False, False, True])
    row = Result("x", success, held, 12.0, 1.5).row()
    assert row.count("|") == HEADER.splitlines()[0].count("|")
    assert "| 3/4 | 75% | 30% - 95% | 2/4 | 12 ms | 1.5 |" in row


def test_video_and_sheet(tmp_path: Path) -> None:
    episodes = [np.full((9, 48, 96, 3), 60 * i, np.uint8) for i in range(3)]
    write_video(tmp_path / "v.mp4", episodes)
    with av.open(str(tmp_path / "v.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 9 and frames[0].shape == (96, 192, 3)
    assert abs(int(frames[0][24, 144, 0]) - 60) < 8 and abs(int(frames[0][72, 48, 0]) - 120) < 8
    write_sheet(tmp_path / "s.png", episodes, np.array([True, False, True]))
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (3 * (24 + 8), 8 * 48 + 8, 3)
    assert sheet[0, 0, 1] > sheet[0, 0, 0] and sheet[33, 0, 0] > sheet[33, 0, 1]  # green, then red


@needs_drawing
def test_expert_solves_what_an_idle_arm_does_not(tmp_path: Path) -> None:
    from ahawam_jax.commands.demo import expert_actor

    expert = roll_out("the expert", "transfer_cube", range(2), expert_actor(range(2)), 1, tmp_path)
    assert expert.success.all() and expert.held.all()
    assert (tmp_path / "the_expert.mp4").exists() and (tmp_path / "the_expert.png").exists()
    idle = roll_out("idle", "transfer_cube", range(2), lambda seen: np.repeat(seen[0][:, None], 80, 1), 1)
    assert not idle.success.any()


def test_command_line_refuses_in_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="holds no checkpoint; expected a workdir"):
        evaluate.main([str(tmp_path / "nothing")])
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path), "--task", "fly"])
    assert "invalid choice: 'fly'" in capsys.readouterr().err
