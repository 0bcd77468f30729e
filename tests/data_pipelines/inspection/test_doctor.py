"""Twenty ways to break a dataset and more: the doctor names the file, and training stops with the same sentence."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest

from ahawam_jax.commands.doctor import main
from data_pipelines import progress
from data_pipelines.caches.frame_cache import DecodingFrames
from data_pipelines.canvas import Canvas
from data_pipelines.episodes import DatasetError
from data_pipelines.inspection import checks as doctor_checks
from data_pipelines.inspection import doctor
from data_pipelines.inspection.video_headers import promised_frames
from data_pipelines.loader import Source, make_loader
from data_pipelines.readers.base import Reader
from data_pipelines.readers.opening import open_episodes
from data_pipelines.readers.subset import open_datasets
from data_pipelines.windows import WindowConfig
from tests.data_pipelines import corruptions
from tests.data_pipelines import tiny_dataset as tiny
from tests.data_pipelines import tiny_robocoin as coin
from tests.data_pipelines.corruptions import CORRUPTIONS, WRITERS
from tests.data_pipelines.readers import test_robotwin as robotwin

CONFIG, BATCH = WindowConfig(horizon=8, chunk=4, video_ratio=2, history_frames=1), 32


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("healthy")
    return {name: write(folder / name) for name, write in WRITERS.items()}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "MEASURE_SECONDS", 0)  # one call


# ---------------------------------------------------------------- the list
def train(root: Path) -> None:
    """Reads every window once, as training does."""
    dataset = open_episodes(root)
    frames = DecodingFrames(dataset, Canvas((16, 24)))
    loader = make_loader([Source(dataset, frames, None)], CONFIG, BATCH, seed=0)
    for _ in range(-(-int(dataset.lengths.sum()) // BATCH)):
        next(loader)


def page_of(capsys: pytest.CaptureFixture, root: Path, *options: str) -> tuple[int, str]:
    """Exit status and output of the doctor."""
    status = main([str(root), *options])
    return status, capsys.readouterr().out


def test_the_list_is_long_enough() -> None:
    assert len(CORRUPTIONS) >= 20


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, (formats, _, _) in CORRUPTIONS.items() for form in formats]
)
def test_corruption(
    healthy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, name: str, form: str
) -> None:
    _, change, depth = CORRUPTIONS[name]
    root = shutil.copytree(healthy[form], tmp_path / form)
    named = change(root)
    with pytest.raises(DatasetError) as stopped:
        train(root)
    status, page = page_of(capsys, root, *depth.split())
    sentence = str(stopped.value)
    assert named in sentence
    assert f"problem: {sentence}" in page
    assert status == 1 and "Training would stop." in page


@pytest.mark.parametrize("form", WRITERS)
def test_healthy(healthy: dict[str, Path], capsys: pytest.CaptureFixture, form: str) -> None:
    train(healthy[form])
    looked_at = {"--fast": "metadata and rows", "--full": "metadata, rows and every frame"}
    for options in ([], ["--full"], ["--fast"]):
        status, page = page_of(capsys, healthy[form], *options)
        assert status == 0 and "problem:" not in page
        seen = looked_at[options[0]] if options else "metadata, rows and 5 frames of every video"
        assert page.endswith(f"no problems, 1 warning in {seen}. Fit for training.\n")


@pytest.mark.parametrize("name", ["lerobot_v2.1_h264", "lerobot_v3.0_h264", "lerobot_v3.0_av1"])
def test_healthy_recordings(shared_dir: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    status, page = page_of(capsys, shared_dir / "datasets" / name)
    assert status == 0 and "no problems, no warnings in metadata, rows and 5" in page
    assert f"LeRobot v{name[9:12]}, robot aloha" in page
    assert "5 of 155 to 155 rows, 775 rows together, 31.0 s at 25 rows per second" in page


# ---------------------------------------------------------------- the page
def test_page(healthy: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    _, page = page_of(capsys, healthy["v3.0"])
    assert "tiny" in page and "LeRobot v3.0, robot tiny" in page
    assert "cam_high 32x48, cam_left_wrist 16x24, cam_right_wrist 16x24 (height x width)" in page
    assert "5 and 3 numbers" in page
    assert "2 distinct: 'open the drawer', 'close the drawer'" in page
    states = np.concatenate([open_episodes(healthy["v3.0"]).states(e) for e in range(3)])
    shown = next(line for line in page.splitlines() if line.startswith(" 1 shoulder")).split()
    column = states[:, 1].astype(np.float64)
    expected = [column.min(), column.mean(), column.max(), column.std()]
    np.testing.assert_allclose([float(word) for word in shown[2:6]], expected, rtol=1e-3)
    assert shown[6] == "0%"
    for camera in tiny.CAMERAS:
        line = next(line for line in page.splitlines() if line.startswith(camera) and "h264" in line)
        assert int(line.split()[2]) > 0 and int(line.split()[3]) > 0
    assert "RoboTwin windows (9 + 6 frames x 3 cameras) per second" in page
    assert "warning: 3 of 3 episodes have fewer rows than a training window (65), the shortest is episode 1" in page


def test_fast_opens_no_video(healthy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = shutil.copytree(healthy["v2.1"], tmp_path / "tiny")
    shutil.rmtree(root / "videos")
    assert page_of(capsys, root, "--fast")[0] == 0
    assert page_of(capsys, root)[0] == 1


def test_every_problem_is_told(healthy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Several at once, each under its own file; one that episodes share is told once."""
    root = shutil.copytree(healthy["v3.0"], tmp_path / "tiny")
    several = corruptions.nan_state, corruptions.rows_lost, corruptions.video_cut_off, corruptions.video_lost
    names = [change(root) for change in several]
    status, page = page_of(capsys, root)
    problems = [line for line in page.splitlines() if line.startswith("problem:")]
    assert status == 1 and len(problems) == 4 and "4 problems" in page
    assert all(any(name in line for line in problems) for name in names)
    corruptions.cut(tiny.data_path(root, 0), 0.5)
    _, page = page_of(capsys, root, "--fast")
    assert "copy the dataset again. [in 2 episodes]" in page and "2 problems" in page


def test_long_lists_are_cut(
    healthy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(healthy["v2.1"], tmp_path / "tiny")
    shutil.rmtree(root / "videos")
    monkeypatch.setattr(doctor, "LISTED", 4)
    _, page = page_of(capsys, root)
    assert page.count("problem: ") == 4 and "... and 5 more problems" in page and "9 problems" in page


def test_video_with_more_frames_than_rows(
    healthy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = shutil.copytree(healthy["v2.1"], tmp_path / "tiny")
    shutil.copy(tiny.video_path(root, "cam_high", 0), tiny.video_path(root, "cam_high", 1))
    status, page = page_of(capsys, root)
    assert status == 0
    assert f"warning: {tiny.video_path(root, 'cam_high', 1)} holds 40 frames, 23 belong to an episode" in page


def test_frames_promised_by_episodes_in_any_order(healthy: dict[str, Path], tmp_path: Path) -> None:
    """Episode 1 lies before episode 0 in their common file."""
    root = shutil.copytree(healthy["v3.0"], tmp_path / "tiny")
    column = "videos/observation.images.cam_high/from_timestamp"
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    tiny.change_column(path, column, lambda _: pa.array([tiny.LENGTHS[1] / tiny.FPS, 0.0, 0.0]))
    promised = promised_frames(open_episodes(root))
    assert promised[tiny.video_path(root, "cam_high", 0)] == tiny.LENGTHS[0] + tiny.LENGTHS[1]
    assert promised[tiny.video_path(root, "cam_high", 2)] == tiny.LENGTHS[2]


def test_same_sentence_whichever_rows_are_read(healthy: dict[str, Path], tmp_path: Path) -> None:
    """Of two damaged pictures the first is told; what is whole can be read."""
    root = shutil.copytree(healthy["classic"], tmp_path / "classic")
    corruptions.change_pictures(
        root, "cam_high", lambda jpegs: np.where(np.isin(np.arange(len(jpegs)), [2, 8]), b"", jpegs)
    )
    dataset = open_episodes(root)
    for rows in ([8], [2], [5, 8], range(12)):
        with pytest.raises(DatasetError, match="row 2 of observation/head_camera/rgb is not a whole JPEG"):
            dataset.frames(1, "cam_high", rows)
    dataset.frames(1, "cam_high", [0, 1, 5, 11])


def test_interrupted(
    healthy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found until then is told."""
    root = shutil.copytree(healthy["v2.1"], tmp_path / "tiny")
    named = corruptions.rows_lost(root)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Reader, "frames", stopped)
    status, page = page_of(capsys, root)
    assert status == 130
    assert named in page and "Interrupted with 9 checks left; so far 1 problem" in page


def test_progress_goes_to_stderr(
    healthy: dict[str, Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", -1)
    main([str(healthy["v2.1"])])
    output = capsys.readouterr()
    assert "  5 of 12 checks, " in output.err and "  12 of 12 checks, " in output.err and "checks" not in output.out


@pytest.mark.parametrize("form", WRITERS)
def test_a_camera_nobody_asks_for(
    healthy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, form: str
) -> None:
    """Its faults are told, and stop nothing."""
    root = shutil.copytree(healthy[form], tmp_path / form)
    if form in corruptions.ROBOTWIN:
        with h5py.File(robotwin.episode_path(root, 1), "a") as file:
            del file[robotwin.picture_name(root, "cam_left_wrist")]
    else:
        tiny.video_path(root, "cam_left_wrist", 2).write_bytes(corruptions.LFS)
    status, page = page_of(capsys, root, "--cameras", "head")
    assert status == 0 and "problem:" not in page
    (line,) = [line for line in page.splitlines() if line.startswith("warning: ") and "does not ask" in line]
    assert "cam_left_wrist" in line or "left_camera" in line
    status, page = page_of(capsys, root)
    assert status == 1 and "problem:" in page


def test_frames_of_no_episode(healthy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A start that is late by a whole frame gives wrong frames without a word, where the file has more of them."""
    root = shutil.copytree(healthy["v3.0"], tmp_path / "tiny")
    path, size = tiny.video_path(root, "cam_high", 0), tiny.CAMERAS["cam_high"]
    tiny.write_video(path, [tiny.picture(number, size) for number in range(tiny.LENGTHS[0] + tiny.LENGTHS[1] + 1)])
    assert "lie before those of" not in page_of(capsys, root)[1]
    corruptions.change_start(root, "cam_high", (tiny.LENGTHS[0] + 1) / tiny.FPS)
    status, page = page_of(capsys, root)
    assert status == 0
    assert "warning: 1 frames of cam_high lie before those of episode 1 in its file and belong to none; unless" in page


def test_a_depth_map(healthy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = shutil.copytree(healthy["v3.0"], tmp_path / "tiny")
    depth = {"dtype": "image", "shape": [1, 48, 64], "names": None, "info": {"is_depth_map": True}}
    features = json.loads((root / "meta/info.json").read_text())["features"]
    tiny.change_info(root, features=features | {"observation.images.depth": depth})
    train(root)
    status, page = page_of(capsys, root)
    assert status == 0 and "warning: " in page and "observation.images.depth must have dtype 'video'" in page


def test_jitter_is_reported(healthy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of time stamps, which nothing is read by: the very page that docs/data.md promises."""
    root = shutil.copytree(healthy["v3.0"], tmp_path / "tiny")
    path = tiny.data_path(root, 0)
    tiny.change_column(path, "timestamp", lambda t: pa.array([*t[:5], t[5] + 0.2 / tiny.FPS, *t[6:]], pa.float32()))
    train(root)
    status, page = page_of(capsys, root)
    assert status == 0
    assert "warning: Time stamps are up to 0.20 rows off their places at 25 rows per second, in episode 0;" in page


# ---------------------------------------------------------------- subset files
@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the RoboCOIN datasets slow and fast, 25 and 50 rows per second."""
    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        for name, fps in (("slow", 25), ("fast", 50)):
            patch.setattr(tiny, "FPS", fps)
            coin.write_robocoin(folder / name)
    return folder


def subset(folder: Path, *tables: tuple[str, str], head: str = "") -> Path:
    """A subset file in the folder; each table: the name of a dataset and more lines for it."""
    text = head + "\n"
    for name, lines in tables:
        text += f'[[dataset]]\nname = "{name}"\npath = "{name}"\nweight = 1\nrobot = "bot"\n'
        text += lines or 'layout = "two_6dof_arms"\n'
    path = folder / "subset.toml"
    path.write_text(text)
    return path


def stopped_by(path: Path) -> str:
    """The sentence with which training would refuse a subset file, "" if it does not."""
    try:
        parts = open_datasets(path)
        sources = [Source(part.dataset, DecodingFrames(part.dataset, Canvas((16, 24))), None) for part in parts]
        loader = make_loader(sources, CONFIG, BATCH, seed=0)
        for _ in range(4):
            next(loader)
    except ValueError as error:
        return str(error)
    return ""


def test_a_mixture(mixed: Path, capsys: pytest.CaptureFixture) -> None:
    """A page for each dataset as training sees it: in its layout, at the stated rate."""
    path = subset(mixed, ("slow", ""), ("fast", ""), head="rate = 25")
    assert stopped_by(path) == ""
    status, page = page_of(capsys, path, "--full")
    assert status == 0 and "problem:" not in page
    first, second = page.split("--- fast")
    assert f"{mixed / 'slow'}: LeRobot v2.1, robot bot" in first and "left of" not in first
    assert "3 of 12 to 20 rows, 48 rows together, 1.9 s at 25 rows per second, left of 94 at 50" in second
    assert " 6 left_gripper_open_scale" in second and "14 and 14 numbers" in second
    assert "warning: fast: 3 of 3 episodes have fewer rows than a training window" in page
    assert "h264" in first and page.endswith("every frame. Fit for training.\n")


LACKS = 'layout = "two_6dof_arms"\nstate = { left_gripper_open_scale = "" }\n'
SUBSETS = {
    "rates": ([("slow", ""), ("fast", "")], "mixes datasets of different rows per second: 25 (slow), 50 (fast)"),
    "layout": ([("slow", LACKS), ("fast", "")], "the state lacks left_gripper_open_scale"),
    "all skipped": ([("slow", LACKS + 'if_unmappable = "skip"\n')], "every dataset was skipped"),
    "no folder": ([("slow", ""), ("nowhere", "")], "nowhere is not a folder"),
    "misspelt": ([("slow", "lay = 3\n")], "dataset 1 (slow): unknown lay"),
}


@pytest.mark.parametrize("name", SUBSETS)
def test_a_mixture_that_would_stop(mixed: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    """In the very sentence of training."""
    tables, sentence = SUBSETS[name]
    path = subset(mixed, *tables)
    stopped = stopped_by(path)
    assert sentence in stopped
    status, page = page_of(capsys, path, "--fast")
    assert status == 1 and f"problem: {stopped}" in page and "Training would stop." in page


def test_a_mixture_that_leaves_one_out(mixed: Path, capsys: pytest.CaptureFixture) -> None:
    path = subset(mixed, ("slow", ""), ("fast", LACKS + 'if_unmappable = "skip"\n'))
    assert stopped_by(path) == ""
    status, page = page_of(capsys, path, "--fast")
    assert status == 0 and "warning: skipping fast: " in page and "lacks left_gripper_open_scale" in page


def test_damage_in_a_mixture(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Rows and videos of every dataset are looked at, videos only of the cameras that are used."""
    folder = shutil.copytree(mixed, tmp_path / "mixed")
    path = subset(folder, ("slow", ""), ("fast", ""), head="rate = 25")
    (video,) = (folder / "fast").rglob("observation.images.cam_head_left_rgb/episode_000001.mp4")
    corruptions.cut(video, 0.5)
    stopped = stopped_by(path)
    status, page = page_of(capsys, path)
    assert status == 1 and str(video) in stopped and f"problem: {stopped}" in page
    head = 'layout = "two_6dof_arms"\ncameras = { cam_high = "cam_right_wrist_rgb" }\n'
    path = subset(folder, ("slow", head), ("fast", head), head="rate = 25")
    status, page = page_of(capsys, path, "--cameras", "mapped")
    assert status == 0 and str(video) not in page


# ---------------------------------------------------------------- warnings
class Recorded:
    """Episodes in memory: what the warnings need to know."""

    root, state_names, instructions, fps = Path("memory"), ("waist", "gripper"), ["lift"], 25.0

    def __init__(self, states: np.ndarray, actions: np.ndarray, action_names: tuple[str, ...] = state_names) -> None:
        """states, actions: [episodes, T, 2]."""
        self._states, self._actions = states.astype(np.float32), actions.astype(np.float32)
        self.lengths = np.full(len(states), states.shape[1])
        self.state_dim = self.action_dim = 2
        self.state_present = self.action_present = np.ones(2, bool)
        self.action_names = action_names

    def states(self, episode: int) -> np.ndarray:
        return self._states[episode]

    def actions(self, episode: int) -> np.ndarray:
        return self._actions[episode]

    def timestamps(self, episode: int) -> np.ndarray:
        return (np.arange(self.lengths[episode]) / self.fps).astype(np.float32)

    def warnings(self) -> list[str]:
        return list(doctor_checks.describe_rows(self, range(len(self.lengths))))


def wave(episodes: int = 4, rows: int = 300) -> np.ndarray:
    t = np.linspace(0, 6, episodes * rows).reshape(episodes, rows)
    return np.stack([np.sin(t), np.cos(3 * t)], -1)


def test_nothing_to_warn_about() -> None:
    assert Recorded(wave(), wave() + 0.01).warnings() == []


def test_actions_that_equal_the_states() -> None:
    assert Recorded(wave(), wave()).warnings() == [
        "Every action equals the state of its own row: the policy would learn to stand still."
    ]


def test_frozen_joint() -> None:
    states = wave()
    states[1:, :, 1] = 0.5
    assert Recorded(states, wave()).warnings() == [
        "The state has dimensions that stand still over whole episodes, of 4: 1 (gripper) in 3."
    ]


def test_robot_at_rest() -> None:
    states = wave()
    states[2] = 0.5
    assert Recorded(states, wave()).warnings() == [
        "The state never changes in episode 2; remove what shows a robot at rest."
    ]


def test_jump() -> None:
    actions = wave() + 0.01
    actions[3, 100:, 0] += 1
    (warning,) = Recorded(wave(), actions).warnings()
    assert "Jumps of the action: 1, in 1 of 4 episodes, first in episode 3 from row 99 to 100, 0 (waist)" in warning
    assert "(rule: more than 20 standard deviations" in warning


def test_gripper_that_opens_at_once() -> None:
    """Twice in an episode is no jump."""
    states = wave()
    states[:, :, 1] = 0
    states[:, 100:200, 1] = 1
    assert Recorded(states, wave()).warnings() == []


def test_command_given_in_few_rows() -> None:
    """A gripper that closes in 4 of 300 rows: on the page, how many rows are cut and how far they come back."""
    actions = wave() + 0.01
    actions[:, :, 1] = 0
    actions[:, 100:104, 1] = 1
    (warning,) = Recorded(wave(), actions).warnings()
    share = 4 / 300
    kept = share + 5 * np.sqrt(share * (1 - share))
    assert f"1 (gripper) in 1.3% of the rows, where 1 comes back as {kept:.4g}, {1 - kept:.3g} off" in warning
    assert '--config.data.normalization.action="gripper=min-max"' in warning
    table = doctor_checks.tabulate("action", list(actions.astype(np.float32)))
    rows = [line.split() for line in doctor._table("action", Recorded.state_names, np.ones(2, bool), table)]
    assert rows[0][-3:] == ["frozen", "cut", "lost"]
    assert rows[1][-2:] == ["0.00%", "0"] and rows[2][-2:] == ["1.33%", f"{1 - kept:.3g}"]


def test_actions_in_other_units() -> None:
    (warning,) = Recorded(wave(), np.degrees(wave())).warnings()
    assert "outside the range of their states" in warning and "are the units the same?" in warning
    assert Recorded(wave(), np.degrees(wave()), ("torque", "current")).warnings() == []


@pytest.mark.parametrize("shift", [-2.5, 2.5])
def test_actions_out_of_range(shift: float) -> None:
    """States are within -1 and 1; actions beyond -3 or 3 are told, and how many."""
    actions = wave() + [0.01, shift]
    (warning,) = Recorded(wave(), actions).warnings()
    assert f"share of rows: 1 (gripper) {100 * np.mean(np.abs(actions[..., 1]) > 3):.1f}%;" in warning
