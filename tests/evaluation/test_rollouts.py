"""Success intervals, videos, and a closed loop with the scripted expert."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from ahawam_jax.commands import evaluate, expert
from ahawam_jax.evaluation.experts import CONTROLS, expert_actor
from ahawam_jax.evaluation.films import CAPTION, GAP, MARGIN, TILE, write_sheet, write_video
from ahawam_jax.evaluation.intervals import wilson
from ahawam_jax.evaluation.rollouts import Result, roll_out, table
from data_pipelines.simulation.env import AlohaSim
from data_pipelines.simulation.rendering import check_rendering

needs_drawing = pytest.mark.skipif(check_rendering() is not None, reason=str(check_rendering()))


@pytest.mark.parametrize("successes, trials", [(0, 50), (44, 50), (50, 50), (1, 3)])
def test_wilson_equals_scipy(successes: int, trials: int) -> None:
    expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_table_is_aligned_and_markdown() -> None:
    stages, held = np.array([3, 3, 1, 3]), np.array([True, False, False, True])
    lines = table([Result("x", stages, 3, held, 12.0, 1.5), Result("a longer name", stages, 4, held, 0.0, 0.0)])
    lines = lines.splitlines()
    assert len({len(line) for line in lines}) == 1 and len({line.count("|") for line in lines}) == 1
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "x", "3/4", "75%", "30% - 95%", "2/4", "2.50 of 3", "12 ms", "1.5"
    ]  # fmt: skip
    assert "| 0/4 |" in " ".join(lines[3].split())  # no episode reached the fourth stage
    assert lines[1].startswith("|-") and lines[1].endswith("-:|") and lines[3].endswith(" - |           - |")


def test_video_and_sheet(tmp_path: Path) -> None:
    episodes = [np.full((9, 48, 96, 3), 60 * i, np.uint8) for i in range(3)]
    write_video(tmp_path / "v.mp4", episodes, Fraction(25, 4))
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(25, 4)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 9 and frames[0].shape == (2 * (48 + GAP) + GAP, 2 * (96 + GAP) + GAP, 3)
    centres = [frames[0][GAP + 24 + 56 * row, GAP + 48 + 104 * column, 0] for row, column in ((0, 1), (1, 0), (1, 1))]
    assert np.abs(np.array(centres, int) - [60, 120, 255]).max() < 8
    assert frames[0][GAP + 24, GAP + 96 + GAP // 2].min() > 240  # between two frames
    moments = [episode[:4] for episode in episodes]
    write_sheet(tmp_path / "s.png", moments, ["a", "b", "c"], [True, False, True], [0, 1, 2, 3])
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (CAPTION + 3 * (TILE // 2 + GAP), MARGIN + 4 * (TILE + GAP), 3)
    bars = sheet[[CAPTION + 80, CAPTION + 80 + TILE // 2 + GAP], MARGIN - GAP - 2].astype(int)
    assert bars[0, 1] > bars[0, 0] + 50 and bars[1, 0] > bars[1, 1] + 50  # green, then red
    assert (sheet[CAPTION + 80, MARGIN + TILE : MARGIN + TILE + GAP] == 255).all()
    assert (sheet[CAPTION + TILE // 2 : CAPTION + TILE // 2 + GAP, MARGIN:] == 255).all()


@needs_drawing
def test_expert_solves_what_an_idle_arm_does_not(tmp_path: Path) -> None:
    expert = roll_out("the expert", "transfer_cube", range(2), expert_actor("transfer_cube", range(2)), 1, tmp_path)
    assert expert.success.all() and expert.held.all()
    assert (tmp_path / "the_expert.mp4").exists() and (tmp_path / "the_expert.png").exists()
    idle = roll_out("idle", "transfer_cube", range(2), lambda seen: np.repeat(seen[0][:, None], 80, 1), 1)
    assert not idle.success.any()


@needs_drawing
def test_an_expert_that_forgets_puts_the_cube_on_a_plate_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Seed 0: its coin and the mark agree; seed 1: they do not."""
    expert.main(["--task", "remember", "--episodes", "2", "--processes", "1"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows[2:]] == [["scripted expert", "2/2"], ["forgets the mark, tosses a coin", "1/2"]]
    assert [row[5] for row in rows[2:]] == ["3.00 of 3", "2.50 of 3"]


def test_the_coin_of_an_expert_that_forgets_knows_nothing_of_the_mark() -> None:
    (knowledge,), sim, agree = CONTROLS["remember"].values(), AlohaSim("remember"), 0
    for seed in range(400):
        sim.reset(seed)
        agree += knowledge(seed)["plate"] == sim.scene["marked"]
    assert 160 <= agree <= 240  # chance is 200, 4 standard deviations are 40


def test_command_line_refuses_in_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="holds no checkpoint; expected a workdir"):
        evaluate.main([str(tmp_path / "nothing")])
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path), "--task", "fly"])
    assert "invalid choice: 'fly'" in capsys.readouterr().err
