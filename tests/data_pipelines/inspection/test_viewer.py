"""The picture of an episode: right frames in their places, a cursor that moves, files that are whole."""

import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from ahawam_jax.commands.view import main
from data_pipelines.inspection import viewer as view
from data_pipelines.inspection.curves import Curves, Panel, panels_of, ticks
from data_pipelines.readers.opening import open_episodes
from data_pipelines.readers.subset import load_subset
from tests.data_pipelines import synthetic_robocoin as coin
from tests.data_pipelines import tiny_dataset as tiny
from tests.data_pipelines.readers import test_robotwin as robotwin
from tests.full_disk import files_end_at


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("view") / "tiny")


@pytest.fixture(scope="module")
def video(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Episode 0, of more rows than are drawn at a time."""
    assert tiny.LENGTHS[0] > view.BATCH
    out = tmp_path_factory.mktemp("out") / "episode.mp4"
    assert main([str(root), "--episode", "0", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def frames(video: Path) -> np.ndarray:
    with av.open(str(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_every_row_is_a_frame(root: Path, video: Path, frames: np.ndarray) -> None:
    page = view.Page(open_episodes(root), 0)
    assert frames.shape == (tiny.LENGTHS[0], *page.size[::-1], 3)
    assert page.size[0] == view.WIDTH and page.size[1] % 2 == 0
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        times = [frame.pts * stream.time_base for frame in container.decode(stream)]
        assert stream.codec.canonical_name == "h264"
    assert times == [Fraction(row, tiny.FPS) for row in range(tiny.LENGTHS[0])]


def test_views_show_their_pictures(root: Path, frames: np.ndarray) -> None:
    boxes = view.Page(open_episodes(root), 0).views
    assert list(boxes) == list(tiny.CAMERAS)
    for camera, (left, top, right, bottom) in boxes.items():
        seen = [tiny.number_of(frame[top + 4 : bottom - 4, left:right]) for frame in frames]
        assert seen == [tiny.frame_number(camera, 0, row) for row in range(tiny.LENGTHS[0])]


def test_views_keep_their_proportions(root: Path) -> None:
    boxes = list(view.Page(open_episodes(root), 0).views.values())
    for (left, top, right, bottom), (height, width) in zip(boxes, tiny.CAMERAS.values(), strict=True):
        assert (right - left) / (bottom - top) == pytest.approx(width / height, rel=0.01)
        assert bottom - top <= view.VIEW_HEIGHT and 0 <= left < right <= view.WIDTH
    assert all(before[2] < after[0] for before, after in zip(boxes, boxes[1:], strict=False))


def test_still_of_the_middle(video: Path, frames: np.ndarray) -> None:
    still = np.asarray(Image.open(video.with_suffix(".png"))).astype(int)
    middle = tiny.LENGTHS[0] // 2
    errors = [np.abs(still - frame).mean() for frame in frames]
    assert np.argmin(errors) == middle and errors[middle] < 2


def test_no_file_besides(video: Path) -> None:
    assert sorted(path.name for path in video.parent.iterdir()) == ["episode.mp4", "episode.png"]


@pytest.mark.parametrize("form", robotwin.WRITERS)
def test_robotwin(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A rate that is no whole number, and the default name."""
    root = robotwin.WRITERS[form](tmp_path / form)
    monkeypatch.chdir(tmp_path)
    assert main([str(root), "--episode", "1"]) == 0
    assert capsys.readouterr().out == f"{form}_episode_1.mp4 and {form}_episode_1.png\n"
    with av.open(f"{form}_episode_1.mp4") as container:
        stream = container.streams.video[0]
        assert stream.frames == robotwin.LENGTHS[1] and stream.average_rate == Fraction(50, 3)


# ---------------------------------------------------------------- curves
def test_panels_by_arm_and_gripper(tmp_path: Path) -> None:
    dataset = open_episodes(robotwin.write_xpolicylab(tmp_path))
    panels = panels_of(dataset, 1)
    assert [panel.title for panel in panels] == ["left joints", "right joints", "left gripper", "right gripper"]
    assert panels[1].names[0] == "arm_joint_1_rad" and panels[3].names == ("gripper_open_scale",)
    np.testing.assert_array_equal(panels[1].state, dataset.states(1)[:, 7:13])
    np.testing.assert_array_equal(panels[3].action, dataset.actions(1)[:, 13:])


def test_panels_where_actions_differ_from_states(root: Path) -> None:
    dataset = open_episodes(root)
    panels = panels_of(dataset, 2)
    assert [panel.title for panel in panels] == ["state joints", "state gripper", "action dimensions 0 to 2"]
    assert panels[0].names == tuple(tiny.STATE_NAMES[:4]) and panels[2].names == ("0", "1", "2")
    assert panels[0].action is None and panels[2].state is None
    np.testing.assert_array_equal(panels[2].action, dataset.actions(2))


def test_many_dimensions_are_spread() -> None:
    class Wide:
        state_names = action_names = ()

        def states(self, episode: int) -> np.ndarray:
            return np.zeros((5, 20), np.float32)

        actions = states

    panels = panels_of(Wide(), 0)
    assert [panel.title for panel in panels] == ["dimensions 0 to 7", "dimensions 8 to 15", "dimensions 16 to 19"]


def test_cursor_moves_and_what_lies_ahead_is_pale() -> None:
    rows = np.zeros((11, 1), np.float32)
    rows[5:] = 1
    curves = Curves([Panel("step", ("x",), rows, None)], 400)
    left, top, right, bottom = curves._plots[0]
    for row in (0, 5, 10):
        plot = np.asarray(curves.draw(row))[top + 2 : bottom - 2, left:right].astype(int)
        dark = np.flatnonzero((plot.max(-1) < 60).all(0))  # columns that are dark from top to bottom
        assert dark.tolist() == [round((right - 1 - left) * row / 10)]
        strength = (255 - plot.min(-1)).max(0)  # the darkest of every column
        assert (strength[2 : dark[0]] > 150).all() and (strength[dark[0] + 3 : -2] < 110).all()


def test_curves_have_their_heights() -> None:
    """A straight line from the lowest value, bottom left, to the highest."""
    curves = Curves([Panel("ramp", ("x",), np.linspace(2, 4, 50)[:, None], None)], 400)
    left, top, right, bottom = curves._plots[0]
    plot = np.asarray(curves.draw(49))[top:bottom, left:right].astype(int)
    blue = plot[..., 2] - plot[..., 0] > 100
    for share in (0.1, 0.5, 0.9):
        place = np.flatnonzero(blue[:, int(share * (right - left))]).mean()
        low, high = (bottom - top) * (0.5 + 0.5 / 1.06), (bottom - top) * (0.5 - 0.5 / 1.06)
        assert place == pytest.approx(low + share * (high - low), abs=2)


def test_curve_that_never_changes() -> None:
    """It runs in the middle."""
    curves = Curves([Panel("still", ("x",), np.full((9, 1), 3, np.float32), None)], 400)
    left, top, right, bottom = curves._plots[0]
    plot = np.asarray(curves.draw(8))[top:bottom, left:right].astype(int)
    place = np.flatnonzero(plot[:, 100, 2] - plot[:, 100, 0] > 100).mean()
    assert place == pytest.approx((bottom - top) / 2, abs=1.5)


def test_ticks_are_round() -> None:
    assert ticks(-1.05, 1.05) == [-1, 0, 1]
    assert ticks(0, 1) == [0, 0.5, 1]
    assert ticks(-3.2, 3.2) == [-2, 0, 2]
    assert ticks(9.0, 11.0) == [9, 9.5, 10, 10.5, 11]


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--episode", "3"], "has the episodes 0 to 2"),
        (["--episode", "-1"], "has the episodes 0 to 2"),
        (["--episode", "0", "--out", "a.avi"], "expected a name that ends in .mp4"),
        (["--episode", "0", "--out", "nowhere/a.mp4"], "the folder nowhere does not exist"),
    ],
)
def test_wrong_arguments(root: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(root), *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_broken_episode_leaves_no_file(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The video ends after the first frames were drawn and written."""
    broken = shutil.copytree(root, tmp_path / "broken")
    path = tiny.video_path(broken, "cam_left_wrist", 0)
    tiny.write_video(path, [tiny.picture(number, (16, 24)) for number in range(view.BATCH + 1)])
    (tmp_path / "out").mkdir()
    assert main([str(broken), "--episode", "0", "--out", str(tmp_path / "out/a.mp4")]) == 1
    assert f"{path} (camera 'cam_left_wrist', episode 0) cannot be decoded" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_long_names_are_cut() -> None:
    text = view._fitted("a" * 500, 22, 300)
    assert text.endswith("aaa...") and view._font(22).getlength(text) <= 300
    assert view._fitted("lift", 22, 300) == "lift"


def test_a_full_disk_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tiny.write_dataset(tmp_path / "set")
    out = tmp_path / "film.mp4"
    for size in (100, 20_000):  # of the video's beginning, and of what its end adds
        with files_end_at(size):
            assert main([str(root), "--episode", "1", "--out", str(out)]) == 1
        words = capsys.readouterr().err.splitlines()[-1]
        assert words.startswith(f"error: {out} cannot be written: files may not grow") and words.endswith("is kept.")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_view_without_camera(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of a robot with one camera, out of a subset file: rows and pictures as training reads them."""
    made = coin.Synthetic(coin.UNSEEN["single_view"], (60, 60), bad={0: [(20, 30, "Abnormal")]})
    made.write(tmp_path / "set")
    table = '[[dataset]]\nname = "one"\npath = "set"\nweight = 1\nrobot = "bot"\nlayout = "two_arms"\n'
    subset = tmp_path / "subset.toml"
    subset.write_text(table + table.replace("one", "other"))
    written, fitted = [], view._fitted
    monkeypatch.setattr(view, "_fitted", lambda text, *room: written.append(text) or fitted(text, *room))
    out = tmp_path / "episode.mp4"
    assert main([str(subset), "--dataset", "one", "--episode", "1", "--out", str(out)]) == 0
    for camera in ("cam_left_wrist", "cam_right_wrist"):
        assert f"{camera}: no camera" in written
    assert "cam_high" in written
    dataset = load_subset(subset)[0].open()
    boxes = view.Page(dataset, 1).views
    with av.open(str(out)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == dataset.lengths[1] == 30
    left, top, right, bottom = boxes["cam_high"]
    assert [tiny.number_of(frame[top:bottom, left:right]) for frame in frames] == list(range(30, 60))
    left, top, right, bottom = boxes["cam_right_wrist"]
    assert np.max([frame[top + 4 : bottom - 4, left + 4 : right - 4] for frame in frames]) < 10  # black, but for h264
    assert main([str(subset), "--episode", "1"]) == 1
    assert "--dataset is None; name one of" in capsys.readouterr().err
    assert main([str(tmp_path / "set"), "--dataset", "one", "--episode", "1"]) == 1
    assert "is no subset file; leave it out" in capsys.readouterr().err
