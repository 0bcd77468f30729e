"""Broken LeRobot datasets: a sentence that names the file, never a wrong row or frame."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.episodes import DatasetError
from data_pipelines.readers.lerobot import LeRobotV30, open_lerobot
from tests.data_pipelines import disguises
from tests.data_pipelines import tiny_dataset as tiny


@pytest.fixture(scope="module", params=["v2.1", "v3.0"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("tiny"), request.param)


@pytest.fixture
def broken(root: Path, tmp_path: Path) -> Path:
    """A copy of the dataset to break."""
    return shutil.copytree(root, tmp_path / "broken")


@pytest.fixture
def broken_v21(tmp_path: Path) -> Path:
    return tiny.write_dataset(tmp_path / "broken", "v2.1")


@pytest.fixture
def broken_v30(tmp_path: Path) -> Path:
    return tiny.write_dataset(tmp_path / "broken", "v3.0")


# ---------------------------------------------------------------- broken metadata
def test_not_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not a LeRobot dataset.*info.json"):
        open_lerobot(tmp_path)


def test_other_version(broken: Path) -> None:
    tiny.change_info(broken, codebase_version="v1.6")
    with pytest.raises(DatasetError, match="'v1.6', expected v2.1 or v3.0"):
        open_lerobot(broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": None}, "lacks fps or holds the wrong kind"),
        ({"fps": 0}, "fps = 0, expected a positive number"),
        ({"features": {}}, "expected exactly one of the features observation.state and observation.state.default"),
        ({"total_frames": 95}, "total_frames = 95.* 94 rows"),
        ({"total_episodes": 4}, "total_episodes = 4.* lists 3 episodes"),
        ({"video_path": None}, "lacks video_path"),
    ],
)
def test_broken_info(broken: Path, changes: dict, message: str) -> None:
    tiny.change_info(broken, **changes)
    with pytest.raises(DatasetError, match=f"info.json.*{message}"):
        open_lerobot(broken)


def test_chunks_of_no_episodes(broken_v21: Path) -> None:
    tiny.change_info(broken_v21, chunks_size=0)
    with pytest.raises(DatasetError, match="info.json says chunks_size = 0, expected a positive number"):
        open_lerobot(broken_v21)


@pytest.mark.parametrize("text", ["{", "[]", '"v3.0"'])
def test_info_that_is_no_object(broken: Path, text: str) -> None:
    (broken / "meta/info.json").write_text(text)
    with pytest.raises(DatasetError, match="info.json (is not valid JSON|holds .*expected a JSON object)"):
        open_lerobot(broken)


def test_template_of_another_version(broken: Path) -> None:
    tiny.change_info(broken, data_path="data/{split}.parquet")
    with pytest.raises(DatasetError, match="info.json: data_path is .*{split}.*, expected a template of"):
        open_lerobot(broken).states(0)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"dtype": "image", "shape": [4, 4, 3], "names": ["height", "width", "channels"]}, "found dtype 'image'"),
        ({"dtype": "video", "shape": [4, 4, 3], "names": None}, "shape .4, 4, 3. and names None"),
        ({"dtype": "video", "shape": [4, 4], "names": ["height", "width", "channels"]}, "shape .4, 4. and names"),
        ({"dtype": "video", "shape": [4, None], "names": ["height", "width"]}, "shape .4, None. and names"),
        ({"dtype": "video"}, "lacks shape"),
        (7, "lacks dtype, shape"),
        (
            {"dtype": "video", "shape": [4, 4, 1], "names": ["height", "width", "channels"],
             "info": {"is_depth_map": True}},
            "is a depth map, which is not read",
        ),
    ],
)
def test_camera_that_is_no_video(broken: Path, feature: dict, message: str) -> None:
    info = json.loads((broken / "meta/info.json").read_text())
    tiny.change_info(broken, features=info["features"] | {"observation.images.cam_low": feature})
    dataset = open_lerobot(broken)  # nobody may ask for it
    dataset.require_cameras(list(tiny.CAMERAS))
    assert tiny.number_of(dataset.frames(1, "cam_high", [3])[0]) == tiny.frame_number("cam_high", 1, 3)
    for use in (lambda: dataset.require_cameras(["cam_high", "cam_low"]), lambda: dataset.frames(0, "cam_low", [0])):
        with pytest.raises(DatasetError, match=f"info.json.*cam_low.*{message}"):
            use()


def test_unknown_camera_lists_the_others(root: Path) -> None:
    with pytest.raises(DatasetError, match="no camera cam_low; it has: cam_high, cam_left_wrist, cam_right_wrist"):
        open_lerobot(root).frames(0, "cam_low", [0])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "episodes", '{"episode_index": 0, "length": 40}\n{"episode_index": 0, "length": 23}',
            "count from 0 without gaps or repeats; it repeats 0. Where episodes were taken out on purpose",
        ),
        (
            "episodes", '{"episode_index": 0, "length": 40}\n{"episode_index": 2, "length": 23}',
            "it lacks 1. Where .*lerobot-edit-dataset .*where they were lost, copy them again",
        ),
        ("episodes", '{"episode_index": 0, "length": 40}\n{"episode_index": 1}', "lacks length .*no length"),
        ("episodes", '{"episode_index": 0, "length": "forty"}', "length = 'forty'"),
        ("episodes", '{"episode_index": 0, "length": 40}\n{"episode_index"', "jsonl, line 2, is not valid JSON"),
        ("episodes", '{"episode_index": 0, "length": 40}\n\n{"length": 23}', "jsonl, line 3, lacks episode_index"),
        ("episodes", "", "holds no episode"),
        ("tasks", '{"task": "lift"}', "tasks.jsonl, line 1, lacks task_index"),
        ("tasks", '{"task_index": 0, "task": "a"}\n{"task_index": 0, "task": "b"}', "task_index 0 is 'a' and 'b'"),
    ],
)
def test_broken_listing(broken_v21: Path, name: str, text: str, message: str) -> None:
    (broken_v21 / f"meta/{name}.jsonl").write_text(text)
    with pytest.raises(DatasetError, match=message):
        open_lerobot(broken_v21)


def test_listing_in_any_order(broken_v21: Path) -> None:
    for name in ("tasks", "episodes"):
        path = broken_v21 / f"meta/{name}.jsonl"
        path.write_text("\n\n".join(reversed(path.read_text().splitlines())))
    dataset = open_lerobot(broken_v21)
    assert dataset.lengths.tolist() == list(tiny.LENGTHS) and dataset.instructions == list(tiny.INSTRUCTIONS)


@pytest.mark.parametrize("name", ["meta/tasks", "meta/episodes"])
def test_missing_listing(broken_v21: Path, name: str) -> None:
    (broken_v21 / f"{name}.jsonl").unlink()
    with pytest.raises(DatasetError, match=f"{name}.jsonl does not exist; copy"):
        open_lerobot(broken_v21)


def test_zero_length_episode(broken_v21: Path) -> None:
    lines = [json.dumps({"episode_index": e, "length": length}) for e, length in enumerate((40, 0, 54))]
    (broken_v21 / "meta/episodes.jsonl").write_text("\n".join(lines))
    with pytest.raises(DatasetError, match="episode 1 has 0 rows, expected at least one; remove"):
        open_lerobot(broken_v21)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("episode_index", 1, "episode_index must count from 0 without gaps or repeats"),
        ("length", None, "lacks length"),
        ("data/file_index", 1.5, "data/file_index = 1.5"),
    ],
)
def test_broken_meta_episodes(broken_v30: Path, column: str, value: object, message: str) -> None:
    path = broken_v30 / "meta/episodes/chunk-000/file-000.parquet"
    tiny.change_column(path, column, lambda values: pa.array([value, *values[1:]]))
    with pytest.raises(DatasetError, match=message):
        open_lerobot(broken_v30)


def test_instruction_that_is_no_text(broken_v30: Path) -> None:
    path = broken_v30 / "meta/tasks.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"close the", b"close \xc7he"))
    with pytest.raises(DatasetError, match="tasks.parquet cannot be read as parquet .*can't decode byte"):
        open_lerobot(broken_v30)


def test_frames_that_start_off_the_grid(broken_v30: Path) -> None:
    column = "videos/observation.images.cam_high/from_timestamp"
    path = broken_v30 / "meta/episodes/chunk-000/file-000.parquet"
    tiny.change_column(path, column, lambda values: pa.array([values[0], values[1] + 0.4 / tiny.FPS, values[2]]))
    says = "the frames of episode 1 .* start at 40.400 frames .from_timestamp 1.616000 s at 25 .*; correct this from"
    dataset = open_lerobot(broken_v30)
    with pytest.raises(DatasetError, match=f"meta/episodes: {says}"):
        dataset.frames(1, "cam_high", [0])
    dataset.frames(0, "cam_high", [0]), dataset.frames(1, "cam_left_wrist", [0])


def place_episodes(root: Path, starts: list[float]) -> LeRobotV30:
    """Three episodes in one file, their frames of cam_high from these seconds on."""
    column = "videos/observation.images.cam_high/"
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    tiny.change_column(path, f"{column}file_index", lambda _: pa.array([0, 0, 0]))
    tiny.change_column(path, f"{column}from_timestamp", lambda _: pa.array(starts))
    return open_lerobot(root)


def test_who_is_to_blame_for_starts_at_odds_with_fps(broken_v30: Path) -> None:
    """One start that is off is wrong itself; where all of them fit another rate, the label is."""
    for starts, says in (
        ([0.0, 1.2, 2.52], "episodes 0 and 1 claim .*: 1 starts at 1.200000 s .from_timestamp., 0 ends at 1.600000 s "
                           "at 25 frames per second; correct this from_timestamp"),
        ([0.0, 1.61, 2.52], "start at 40.250 frames .*; correct this from_timestamp"),
        ([0.0, 40 / 30, 63 / 30], "claim the same .*; all episodes lie there as at 30 frames per second: correct fps"),
        ([0.0, 40 / 23, 63 / 23], "start at 43.478 frames .*; all episodes lie there as at 23 frames per second"),
    ):  # fmt: skip
        dataset = place_episodes(broken_v30, starts)
        with pytest.raises(DatasetError, match=f"meta/episodes: the .*{says}"):
            dataset.video(1, "observation.images.cam_high")
        dataset.video(1, "observation.images.cam_left_wrist")


# ---------------------------------------------------------------- broken rows
def change_rows(path: Path, change: Callable[[pa.Table], list[pa.Table]]) -> None:
    pq.write_table(pa.concat_tables(change(pq.read_table(path))), path)


def test_missing_column(broken: Path) -> None:
    path = tiny.data_path(broken, 2)
    pq.write_table(pq.read_table(path).drop_columns("action"), path)
    dataset = open_lerobot(broken)
    dataset.states(0)
    with pytest.raises(DatasetError, match=f"{path.name} lacks the column action; it has: observation.state"):
        dataset.states(2)


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("action", lambda values: pa.array([row[:2] for row in values]), "every row of action must hold 3 numbers"),
        ("action", lambda values: pa.array([[row[0], None, 1.0] for row in values]), "action must hold 3 numbers"),
        ("action", lambda values: pa.array([None, *values[1:]]), "every row of action must hold 3 numbers"),
        ("action", lambda values: pa.array([str(row) for row in values]), "every row of action must hold 3 numbers"),
        ("frame_index", lambda values: pa.array([None, *values[1:]]), "every row of frame_index must hold a number"),
        ("timestamp", lambda values: pa.array([str(t) for t in values]), "every row of timestamp must hold a number"),
    ],
)
def test_column_of_the_wrong_kind(broken: Path, column: str, change: Callable, message: str) -> None:
    tiny.change_column(tiny.data_path(broken, 0), column, change)
    with pytest.raises(DatasetError, match=message):
        open_lerobot(broken).states(0)


def test_lists_of_wrong_lengths_that_add_up(broken: Path) -> None:
    """Two rows of 2 and 4 numbers, where 3 and 3 are promised."""
    tiny.change_column(tiny.data_path(broken, 0), "action", lambda v: pa.array([v[0][:2], [*v[1], 0.0], *v[2:]]))
    with pytest.raises(DatasetError, match="every row of action must hold 3 numbers"):
        open_lerobot(broken).states(0)


def test_missing_row(broken: Path) -> None:
    change_rows(tiny.data_path(broken, 0), lambda table: [table[:10], table[11:]])
    with pytest.raises(DatasetError, match="holds 39 rows of episode 0, meta/episodes.* promises 40 rows"):
        open_lerobot(broken).actions(0)


@pytest.mark.parametrize("name", disguises.but("parquet"))
def test_rows_that_are_something_else(broken: Path, name: str) -> None:
    path = tiny.data_path(broken, 2)
    says = disguises.put(path, name)
    with pytest.raises(DatasetError, match=f"{path.name} {says}"):
        open_lerobot(broken).states(2)


@pytest.mark.parametrize("name", disguises.but("mp4"))
def test_videos_that_are_something_else(broken: Path, name: str) -> None:
    path = tiny.video_path(broken, "cam_high", 2)
    says = disguises.put(path, name)
    dataset = open_lerobot(broken)
    with pytest.raises(DatasetError, match=f"{path.name} .camera 'cam_high', episode 2. {says}"):
        dataset.frames(2, "cam_high", [0])
    dataset.frames(2, "cam_left_wrist", [0])


@pytest.mark.parametrize("name", ["lfs", "web page", "nothing"])
def test_metadata_that_is_something_else(broken: Path, name: str) -> None:
    for path in sorted(path for path in (broken / "meta").rglob("*") if path.is_file()):
        whole = path.read_bytes()
        says = disguises.put(path, name) if name != "nothing" or path.suffix != ".jsonl" else ""
        if says:
            with pytest.raises(DatasetError, match=f"{path.name} {says}"):
                open_lerobot(broken)
        path.write_bytes(whole)


def test_links_that_lead_nowhere(broken: Path) -> None:
    for path, use in (
        (tiny.data_path(broken, 2), lambda d: d.states(2)),
        (tiny.video_path(broken, "cam_high", 0), lambda d: d.frames(0, "cam_high", [0])),
    ):
        says = disguises.dangle(path)
        with pytest.raises(DatasetError, match=f"{path.name} .*{says}"):
            use(open_lerobot(broken))


def test_rows_out_of_order(broken: Path) -> None:
    change_rows(tiny.data_path(broken, 0), lambda table: [table[1:2], table[:1], table[2:]])
    with pytest.raises(DatasetError, match="frame_index 0..39 in order"):
        open_lerobot(broken).actions(0)


def test_shuffled_episode_index(broken: Path) -> None:
    path = tiny.data_path(broken, 0)
    tiny.change_column(path, "episode_index", lambda values: pa.array([1, *values[1:]]))
    with pytest.raises(DatasetError, match=f"{path.name}: the rows are not sorted by episode_index"):
        open_lerobot(broken).states(0)


def test_file_of_another_episode(broken_v21: Path) -> None:
    shutil.copy(tiny.data_path(broken_v21, 0), tiny.data_path(broken_v21, 1))
    with pytest.raises(DatasetError, match="episode_000001.parquet holds 0 rows of episode 1"):
        open_lerobot(broken_v21).states(1)


def test_missing_data_file(broken: Path) -> None:
    path = tiny.data_path(broken, 2)
    path.unlink()
    with pytest.raises(DatasetError, match=f"{path.name} does not exist; copy the dataset again"):
        open_lerobot(broken).states(2)


def test_truncated_data_file(broken: Path) -> None:
    path = tiny.data_path(broken, 0)
    whole = path.read_bytes()
    for kept in (100, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:kept])
        with pytest.raises(DatasetError, match=f"{path.name} cannot be read as parquet"):
            open_lerobot(broken).states(0)


def test_damaged_footer(broken: Path) -> None:
    path = tiny.data_path(broken, 0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + b"\xff" * 32 + whole[-8:])
    with pytest.raises(DatasetError, match=f"{path.name} cannot be read as parquet"):
        open_lerobot(broken).states(0)


def test_two_tasks_in_an_episode(broken: Path) -> None:
    tiny.change_column(tiny.data_path(broken, 0), "task_index", lambda values: pa.array([0, *values[1:]]))
    with pytest.raises(DatasetError, match=r"episode 0 has task_index \[0, 1\].* split the episode"):
        open_lerobot(broken).instruction(0)


def test_task_that_is_not_listed(broken: Path) -> None:
    tiny.change_column(tiny.data_path(broken, 0), "task_index", lambda values: pa.array([2] * len(values)))
    with pytest.raises(DatasetError, match=r"task_index \[2\], expected one of the 2 tasks"):
        open_lerobot(broken).instruction(0)


@pytest.mark.parametrize(("column", "what"), [("observation.state", "state"), ("action", "action")])
def test_nan(broken: Path, column: str, what: str) -> None:
    path = tiny.data_path(broken, 1)
    row = 5 + len(pq.read_table(path)) - tiny.LENGTHS[1]  # row 5 of episode 1, the last one in the file
    tiny.change_column(path, column, lambda values: pa.array([[*v[:1], np.nan, *v[2:]] if i == row else v
                                                         for i, v in enumerate(values)]))  # fmt: skip
    dataset = open_lerobot(broken)
    name = r" \(shoulder\)" if what == "state" else ""
    with pytest.raises(
        DatasetError, match=f"{path.name}: the {what} of episode 1 is nan in row 5, dimension 1{name};"
    ):
        dataset.states(1)
    dataset.states(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [*t[:7], t[6], *t[8:]], "episode 0 do not rise from row 6 .0.24 s. to row 7 .0.24 s."),
        (lambda t: [*t[:7], np.nan, *t[8:]], "episode 0 do not rise from row 6 .0.24 s. to row 7 .nan s."),
        (lambda t: [*t[:7], *(t[7:] + np.float32(0.04))], "row 7 of episode 0 has timestamp 0.32 s, expected 0.28 s"),
        (lambda t: t * np.float32(25 / 30), "row 3 of .* expected 0.12 s at 25 .* as at 30 per second: correct fps"),
    ],
)
def test_timestamps_are_checked(broken_v21: Path, change: Callable, message: str) -> None:
    path = tiny.data_path(broken_v21, 0)
    tiny.change_column(path, "timestamp", lambda t: pa.array(np.array(change(np.array(t, np.float32)), np.float32)))
    with pytest.raises(DatasetError, match=f"episode_000000.parquet: .*{message}"):
        open_lerobot(broken_v21).timestamps(0)


# ---------------------------------------------------------------- broken videos
@pytest.mark.parametrize("kept", [100, 2000, -300])
def test_truncated_video(broken: Path, kept: int) -> None:
    """Cut in the header, in the index and in the pictures; the last frame is gone in all of them."""
    path = tiny.video_path(broken, "cam_high", 1)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DatasetError, match=f"{path.name} .*'cam_high', episode 1.* cannot be decoded.*truncated"):
        open_lerobot(broken).frames(1, "cam_high", range(23))


def test_truncated_video_never_gives_a_wrong_frame(broken: Path) -> None:
    path = tiny.video_path(broken, "cam_high", 0)
    whole, dataset, read = path.read_bytes(), open_lerobot(broken), 0
    for kept in range(1500, len(whole), 61):
        path.write_bytes(whole[:kept])
        try:
            frames = dataset.frames(0, "cam_high", range(20))
        except DatasetError:
            continue
        read += 1
        assert [tiny.number_of(frame) for frame in frames] == list(range(20))
    assert read


def test_damaged_video_never_gives_a_wrong_frame(broken: Path) -> None:
    """Eight wrong bytes among the pictures: decoders then make pictures up, which must not pass for data."""
    path = tiny.video_path(broken, "cam_high", 0)
    whole, dataset, messages = path.read_bytes(), open_lerobot(broken), []
    rng = np.random.default_rng(0)
    for place in rng.integers(whole.index(b"mdat") + 700, len(whole) - 8, 60):
        path.write_bytes(whole[:place] + rng.bytes(8) + whole[place + 8 :])
        try:
            frames = dataset.frames(0, "cam_high", range(40))
        except DatasetError as error:
            messages.append(str(error))
            continue
        assert [tiny.number_of(frame) for frame in frames] == list(range(40))
    assert any("is damaged" in message for message in messages)


def test_missing_video(broken: Path) -> None:
    tiny.video_path(broken, "cam_left_wrist", 2).unlink()
    with pytest.raises(DatasetError, match="camera 'cam_left_wrist', episode 2.* does not exist"):
        open_lerobot(broken).frames(2, "cam_left_wrist", [0])


def test_wrong_fps_is_noticed(broken: Path) -> None:
    """The mp4 runs at 25 frames per second; under another label its frames are off the grid."""
    tiny.change_info(broken, fps=30)
    with pytest.raises(DatasetError, match="row 3 of .* expected 0.1 s at 30 .* as at 25 per second: correct fps"):
        open_lerobot(broken).states(0)
    with pytest.raises(DatasetError, match="off the grid of 30 frames per second"):
        open_lerobot(broken).frames(0, "cam_high", range(5))
