"""Subset files: what is wrong with one is said, and datasets of different rates become one rate or are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.caches.frame_cache import DecodingFrames
from data_pipelines.canvas import Canvas
from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.readers import subset
from data_pipelines.readers.naming import Reading, UnmappableError
from data_pipelines.readers.resampled import Resampled
from data_pipelines.readers.subset import Entry, embodiment_of, load_subset, open_datasets, open_subset
from data_pipelines.windows import WindowConfig, Windows
from tests.data_pipelines import tiny_dataset as tiny
from tests.data_pipelines import tiny_robocoin as coin

FOLDERS = {"slow": 25, "fast": 50}  # rows per second


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coin.write_robocoin(tmp_path_factory.mktemp("coin") / "set")


GOOD = {"name": "a", "path": "set", "weight": 2, "robot": "bot", "layout": "two_6dof_arms"}


def write_subset(folder: Path, *tables: dict, rate: float | None = None) -> Path:
    """TOML writes strings, numbers and booleans as JSON does."""
    lines = [] if rate is None else [f"rate = {json.dumps(rate)}"]
    for table in tables:
        lines.append("[[dataset]]")
        for key, value in table.items():
            inline = isinstance(value, dict)
            pairs = ", ".join(f"{k} = {json.dumps(v)}" for k, v in value.items()) if inline else ""
            lines.append(f"{key} = {{ {pairs} }}" if inline else f"{key} = {json.dumps(value)}")
    path = folder / "subset.toml"
    path.write_text("\n".join(lines))
    return path


def test_subset_file(tmp_path: Path) -> None:
    cameras = {"cam_high": "cam_top"}
    extra = {"name": "b.2-x", "weight": 0.5, "cameras": cameras, "if_unmappable": "skip"}
    assert load_subset(write_subset(tmp_path, GOOD, GOOD | extra)) == [
        Entry("a", tmp_path / "set", 2, "bot", "two_6dof_arms"),
        Entry("b.2-x", tmp_path / "set", 0.5, "bot", "two_6dof_arms", Reading(cameras), "skip"),
    ]


def test_files_are_utf8_whatever_the_locale_is(tmp_path: Path) -> None:
    """Without UTF-8 for Python's own sake: a job whose locale is an old one."""
    table = 'name = "a"\npath = "叠毛巾"\nweight = 2\nrobot = "bot"\nlayout = "two_6dof_arms"\n'
    (tmp_path / "subset.toml").write_text(f"[[dataset]]\n{table}", "utf-8")
    (tmp_path / "subtasks.jsonl").write_text('{"subtask_index": 0, "subtask": "叠毛巾"}\n', "utf-8")
    code = (
        "import sys; from pathlib import Path; from data_pipelines.readers import robocoin, subset\n"
        "folder = Path(sys.argv[1]); (entry,) = subset.load_subset(folder / 'subset.toml')\n"
        "texts = robocoin._read_subtasks(folder / 'subtasks.jsonl')\n"
        "sys.exit(ascii([entry.path.name, texts[0]]) != sys.argv[2])"
    )
    command = [sys.executable, "-X", "utf8=0", "-c", code, str(tmp_path), ascii(["叠毛巾"] * 2)]
    assert subprocess.run(command, env=os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}).returncode == 0


def test_example_of_a_subset_file() -> None:
    path = Path(subset.__file__).with_name("robocoin_example.toml")
    entries = load_subset(path)
    assert [entry.if_unmappable for entry in entries] == ["error", "error", "skip"]
    assert entries[0].path == path.parent / "RoboCOIN/Cobot_Magic_fold_towel"
    assert entries[1].said.cameras["cam_high"] == "cam_head_left_rgb" and entries[2].said.gripper.action[0] == (0, 10)
    assert {entry.layout for entry in entries} == {"two_arms"} and entries[2].without == (3, 17)
    assert entries[2].said.lead == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "name is 'a/b', expected letters, digits"),
        ({"name": 3}, "name is 3, expected letters"),
        ({"path": ""}, "path is '', expected the dataset's folder"),
        ({"weight": 0}, "weight is 0, expected a positive number"),
        ({"weight": True}, "weight is True, expected"),
        ({"weight": "2"}, "weight is '2', expected"),
        ({"robot": ".."}, "robot is '..', expected"),
        ({"layout": "two_legs"}, "layout is 'two_legs', expected one of two_6dof_arms, two_arms"),
        ({"state": {"left_gripper_open": 3}}, "state is .*expected a table of numbers of a layout"),
        ({"action": {"left_arm_joint_1_rad": -1}}, "action is .*expected a table of numbers of a layout"),
        ({"gripper": {"closed": 0}}, "gripper is .*expected what is recorded of a closed and of an open"),
        ({"exclude": ""}, "exclude is '', expected why the dataset is left out"),
        ({"without": [1.5]}, "without is .*expected a list of episodes"),
        ({"lead": 0.5}, "lead is 0.5, expected rows by which the recorded action is early"),
        ({"still_tail": -1}, "still_tail is -1, expected seconds"),
        ({"cameras": {"cam_left_wrist": "x"}}, "cameras is .*expected a table of the views cam_high"),
        ({"cameras": {"cam_high": "x", "cam_low": "y"}}, "cameras is .*expected a table"),
        ({"cameras": {"cam_high": "x", "cam_left_wrist": "x"}}, "a recorded camera of its own"),
        ({"cameras": {"cam_high": 1}}, "cameras is"),
        ({"cameras": "cam_high"}, "cameras is"),
        ({"fps": 0}, "fps is 0, expected rows per second, a positive number"),
        ({"rate": 25}, "rate is one for all datasets; write it above"),
        ({"if_unmappable": "ignore"}, "if_unmappable is 'ignore', expected .error. or .skip."),
        ({"wieght": 2}, "unknown wieght; a dataset has name, path, weight, robot and may have layout, cameras"),
    ],
)
def test_wrong_entry(tmp_path: Path, change: dict, message: str) -> None:
    path = write_subset(tmp_path, GOOD | {"name": "first"}, GOOD | change)
    with pytest.raises(DatasetError, match=f"subset.toml, dataset 2 .*{message}"):
        load_subset(path)


@pytest.mark.parametrize("key", ["name", "path", "weight", "robot"])
def test_missing_entry(tmp_path: Path, key: str) -> None:
    table = {k: v for k, v in GOOD.items() if k != key}
    with pytest.raises(DatasetError, match=f"dataset 1.*: lacks {key}; a dataset has"):
        load_subset(write_subset(tmp_path, table))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[dataset]", "is not valid TOML"),
        ("", "must hold tables .*found nothing"),
        ("dataset = 3", "must hold tables .*found dataset"),
        ("dataset = [3]", "must hold tables"),
        ("dataset = []", "must hold tables"),
        ('seed = 1\n[[dataset]]\nname = "a"', "besides them only rate, layout, robot; found seed, dataset"),
        ('rate = "fast"\n[[dataset]]\nname = "a"', "rate is 'fast', expected rows per second"),
    ],
)
def test_wrong_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "subset.toml"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        load_subset(path)


def test_no_file_and_one_name_twice(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="subset.toml does not exist"):
        load_subset(tmp_path / "subset.toml")
    with pytest.raises(DatasetError, match="names a more than once"):
        load_subset(write_subset(tmp_path, GOOD, GOOD))


def test_skips_only_what_the_subset_says(root: Path) -> None:
    fits = Entry("fits", root, 1, "bot", "two_6dof_arms")
    said = Reading(state={"left_gripper_open_scale": ""})
    wide = {"path": root, "weight": 1, "robot": "bot", "layout": "two_6dof_arms", "said": said}
    opened, skipped = open_subset([fits, Entry("wide", **wide, if_unmappable="skip")])
    assert list(opened) == ["fits"] and opened["fits"].robot == "bot"
    assert list(skipped) == ["wide"] and "lacks left_gripper_open_scale" in skipped["wide"]
    with pytest.raises(UnmappableError, match="lacks left_gripper_open_scale"):
        open_subset([fits, Entry("wide", **wide)])
    with pytest.raises(DatasetError, match="is not a folder"):  # whatever the subset says
        open_subset([Entry("gone", root / "gone", 1, "bot", "two_6dof_arms", if_unmappable="skip")])


def test_excluded_with_its_reason(root: Path) -> None:
    """Never opened, not even its folder."""
    entries = [Entry("a", root, 1, "bot"), Entry("b", root / "gone", 1, "bot", exclude="tails")]
    opened, skipped = open_subset(entries)
    assert list(opened) == ["a"] and skipped == {"b": "tails"}


def test_reasons_are_told_once(root: Path, capsys: pytest.CaptureFixture) -> None:
    out = [GOOD | {"name": name, "exclude": "no film"} for name in "bcdef"]
    path = write_subset(root.parent, GOOD | {"path": str(root)}, *out, GOOD | {"name": "g", "exclude": "torn"})
    assert [part.name for part in open_datasets(path)] == ["a"]
    assert capsys.readouterr().out == "skipping 5 datasets, b, c, d and 2 more: no film\nskipping g: torn\n"


def test_what_is_said_of_a_robot(root: Path) -> None:
    """Of all its datasets, and of one that says otherwise; a layout for all."""
    path = root.parent / "robots.toml"
    path.write_text(
        'layout = "two_arms"\n[robot.bot]\ngripper = { closed = 0, open = 10 }\n'
        + "".join(
            f'[[dataset]]\nname = "{name}"\npath = "{root}"\nweight = 1\nrobot = "{robot}"\n{more}'
            for name, robot, more in (
                ("a", "bot", ""), ("b", "bot", "gripper = { closed = 1, open = 0 }\n"), ("c", "other", ""),
            )
        )
    )  # fmt: skip
    tens, inverted, plain = (part.dataset for part in open_datasets(path))
    values = plain.actions(0)[:, 7].astype(np.float64)
    np.testing.assert_array_equal(tens.actions(0)[:, 7], (values / 10).astype(np.float32))
    np.testing.assert_array_equal(inverted.actions(0)[:, 7], (1 - values).astype(np.float32))
    assert embodiment_of(tens).action.one[7] == 10 and embodiment_of(plain).action.one[7] == 1
    path.write_text(path.read_text().replace("[robot.bot]", "[robot.bod]"))
    with pytest.raises(DatasetError, match="tables of the robots bod, which no dataset has"):
        load_subset(path)
    path.write_text(path.read_text().replace("[robot.bod]\ngripper", "[robot.bot]\ngrip"))
    with pytest.raises(DatasetError, match="robot.bot must be a table that may have cameras, gripper, state"):
        load_subset(path)


def test_two_layouts_in_one_mixture_are_refused(root: Path) -> None:
    path = write_subset(root.parent, GOOD | {"name": "six"}, GOOD | {"layout": "two_arms"})
    with pytest.raises(DatasetError, match=r'14 numbers \(six\), 16 numbers \(a\). Write layout = "two_arms" above'):
        open_datasets(path)


# ---------------------------------------------------------------- rates
@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the datasets slow and fast: the same rows, labelled with the rates of FOLDERS."""
    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        for name, fps in FOLDERS.items():
            patch.setattr(tiny, "FPS", fps)
            coin.write_robocoin(folder / name)
    return folder


def tables(*names: str, **more: object) -> list[dict]:
    return [GOOD | {"name": name, "path": name} | more for name in names]


def test_two_rates_in_one_mixture_are_refused(mixed: Path) -> None:
    path = write_subset(mixed, *tables("slow", "fast"))
    with pytest.raises(DatasetError, match=r"rows per second: 25 \(slow\), 50 \(fast\).*Write rate = 25 above"):
        open_datasets(path)


def pictures_of(dataset: Episodes) -> list[tuple[Path, str]]:
    """What caches go by."""
    return [dataset.picture_file(episode, "cam_high") for episode in range(len(dataset.lengths))]


def test_a_rate_for_all(mixed: Path) -> None:
    """The fast dataset is left with every second row; the slow one stays as it is, cached pictures too."""
    slow, fast = (part.dataset for part in open_datasets(write_subset(mixed, *tables("slow", "fast"), rate=25)))
    every = [part.dataset for part in open_datasets(write_subset(mixed, *tables("fast")))][0]
    assert slow.fps == fast.fps == 25
    assert fast.lengths.tolist() == [20, 12, 16] and fast.starts.tolist() == [0, 20, 32]
    assert slow.lengths.tolist() == list(tiny.LENGTHS)
    np.testing.assert_array_equal(slow.actions(1), every.actions(1))
    for e, length in enumerate(tiny.LENGTHS):
        np.testing.assert_array_equal(fast.states(e), every.states(e)[::2])
        np.testing.assert_array_equal(fast.actions(e), every.actions(e)[::2])
        np.testing.assert_allclose(fast.timestamps(e), every.timestamps(e)[::2], atol=1e-6)  # float32 seconds
        assert fast.subtasks(e) == every.subtasks(e)[::2] and fast.instruction(e) == every.instruction(e)
        rows = [1, len(fast.states(e)) - 1, 0]
        shown = [tiny.number_of(frame) for frame in fast.frames(e, "cam_high", rows)]
        assert shown == [tiny.frame_number("cam_high", e, 2 * row) for row in rows]
        assert len(every.states(e)) == length
    assert pictures_of(fast) != pictures_of(every)
    source = open_datasets(write_subset(mixed, *tables("slow")))[0].dataset
    assert pictures_of(slow) == pictures_of(source)
    with pytest.raises(IndexError, match="at 25 rows per second the episode has rows 0..11"):
        fast.frames(1, "cam_high", [12])


def test_windows_of_a_resampled_dataset(mixed: Path) -> None:
    """Chunks, video, history and offset are all counted in the rows that are left."""
    fast = open_datasets(write_subset(mixed, *tables("fast"), rate=25))[0].dataset
    config = WindowConfig(horizon=8, chunk=4, video_ratio=1, history_frames=2, history_stride=3, max_offset=3)
    batch = Windows(fast, DecodingFrames(fast, Canvas((16, 24), True)), config).gather([20 + 4], [2])
    source = open_datasets(write_subset(mixed, *tables("fast")))[0].dataset
    rows = np.minimum(4 + np.arange(12), 11)
    np.testing.assert_array_equal(batch["action"][0], source.actions(1)[2 * rows])
    assert batch["action_is_pad"][0].tolist() == [False] * 8 + [True] * 4
    assert batch["video_history_valid_len"] == [1]

    def shown(images: np.ndarray) -> list[int]:
        return [tiny.number_of(image) - tiny.LENGTHS[0] for image in images]

    assert shown(batch["observations"][0]) == [2 * 6, 2 * 10]
    assert shown(batch["history"][0, 1:]) == [2 * 1]
    assert shown(batch["video"][0]) == (2 * np.minimum(4 + np.arange(13), 11)).tolist()


@pytest.mark.parametrize(("rate", "rows"), [(30, [0, 2, 3, 5, 7]), (50 / 3, [0, 3, 6, 9]), (49.9, list(range(8)))])
def test_rates_that_do_not_divide(rate: float, rows: list[int]) -> None:
    """By hand, of 50 rows per second: the nearest row, never one beyond the last."""

    class Counted(Episodes):
        root, robot, fps, cameras, instructions = Path("memory"), "", 50.0, {}, ["lift"]
        state_dim = action_dim = 1
        state_names = action_names = ()
        state_present = action_present = np.ones(1, bool)
        lengths, starts = np.array([rows[-1] + 1]), np.array([0])

        def states(self, episode: int) -> np.ndarray:
            return np.arange(self.lengths[0])[:, None]

    assert Resampled(Counted(), rate).states(0)[:, 0].tolist() == rows


def test_rows_are_not_made_up(mixed: Path) -> None:
    with pytest.raises(DatasetError, match="slow has 25 rows per second, rate = 50 asks for more"):
        open_datasets(write_subset(mixed, *tables("slow", "fast"), rate=50))


def test_a_recorded_rate_that_is_wrong(mixed: Path) -> None:
    """Where the label lies, the subset file says how many rows a second has; without a rate all of them are used."""
    slow, slowed = tables("slow"), tables("fast", fps=25.0)
    parts = open_datasets(write_subset(mixed, *slow, *slowed))
    assert parts[1].dataset.fps == 25 and parts[1].dataset.lengths.tolist() == list(tiny.LENGTHS)
    np.testing.assert_allclose(parts[1].dataset.timestamps(0)[:3], [0, 0.04, 0.08], atol=1e-6)  # float32 seconds
    fast = open_datasets(write_subset(mixed, *tables("fast")))[0].dataset
    assert pictures_of(parts[1].dataset) == pictures_of(fast)
    half = open_datasets(write_subset(mixed, *slow, *slowed, rate=12.5))
    assert half[0].dataset.lengths.tolist() == half[1].dataset.lengths.tolist() == [20, 12, 16]
