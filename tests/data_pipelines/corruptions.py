"""Ways to break a dataset, each with what the sentence about it must name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data_pipelines import tiny_dataset as tiny
from tests.data_pipelines.disguises import LFS
from tests.data_pipelines.readers import test_robotwin as robotwin

WRITERS: dict[str, Callable[[Path], Path]] = {
    "v2.1": lambda root: tiny.write_dataset(root, "v2.1"),
    "v3.0": lambda root: tiny.write_dataset(root, "v3.0"),
    **robotwin.WRITERS,
}
LEROBOT, ROBOTWIN = ("v2.1", "v3.0"), tuple(robotwin.WRITERS)
Break = Callable[[Path], str]  # breaks the dataset in a folder; what the sentence must name

CORRUPTIONS: dict[str, tuple[tuple[str, ...], Break, str]] = {}


def corruption(formats: tuple[str, ...], depth: str = "") -> Callable[[Break], Break]:
    """Puts a way of breaking datasets of these formats on the list. depth: option the doctor needs to find it."""

    def put(change: Break) -> Break:
        CORRUPTIONS[change.__name__] = formats, change, depth
        return change

    return put


# ---------------------------------------------------------------- metadata
@corruption(LEROBOT)
def info_cut_off(root: Path) -> str:
    path = root / "meta/info.json"
    path.write_text(path.read_text()[:200])
    return "meta/info.json"


@corruption(LEROBOT)
def more_episodes_promised(root: Path) -> str:
    tiny.change_info(root, total_episodes=4)
    return "meta/info.json"


@corruption(LEROBOT)
def wrong_fps(root: Path) -> str:
    """At odds with every file of rows; training names the one it happens to read first."""
    tiny.change_info(root, fps=30)
    return ".parquet: row 3 of episode"


@corruption(LEROBOT)
def wrong_fps_in_metadata_and_rows(root: Path) -> str:
    """Only the video still knows."""
    tiny.change_info(root, fps=30)
    for path in (root / "data").rglob("*.parquet"):
        tiny.change_column(path, "timestamp", lambda t: pa.array(np.array(t, np.float32) * np.float32(25 / 30)))
    listing = root / "meta/episodes/chunk-000/file-000.parquet"
    for camera in tiny.CAMERAS if listing.is_file() else ():
        column = f"videos/observation.images.{camera}/from_timestamp"
        tiny.change_column(listing, column, lambda starts: pa.array([25 / 30 * start for start in starts]))
    return tiny.video_path(root, "cam_high", 0).name


@corruption(LEROBOT)
def missing_camera(root: Path) -> str:
    features = json.loads((root / "meta/info.json").read_text())["features"]
    del features["observation.images.cam_left_wrist"]
    tiny.change_info(root, features=features)
    return f"{root} has no camera cam_left_wrist"


@corruption(LEROBOT)
def other_picture_size_promised(root: Path) -> str:
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["observation.images.cam_high"]["shape"] = [32, 40, 3]
    tiny.change_info(root, features=features)
    return tiny.video_path(root, "cam_high", 0).name


@corruption(("v2.1",))
def zero_length_episode(root: Path) -> str:
    lines = [json.dumps({"episode_index": e, "length": length}) for e, length in enumerate((40, 0, 54))]
    (root / "meta/episodes.jsonl").write_text("\n".join(lines))
    return f"{root}: episode 1 has 0 rows"


@corruption(("v2.1",))
def instructions_lost(root: Path) -> str:
    (root / "meta/tasks.jsonl").unlink()
    return "meta/tasks.jsonl does not exist"


@corruption(("v3.0",))
def listing_cut_off(root: Path) -> str:
    return cut(root / "meta/episodes/chunk-000/file-000.parquet", 0.5)


@corruption(("v3.0",))
def episodes_share_frames(root: Path) -> str:
    change_start(root, "cam_high", 0)
    return "meta/episodes: the episodes 0 and 1 claim the same frames of observation.images.cam_high"


@corruption(("v3.0",))
def frames_start_nowhere(root: Path) -> str:
    change_start(root, "cam_high", float("nan"))
    return "meta/episodes: the frames of episode 1"


@corruption(("v3.0",))
def frames_start_between_two(root: Path) -> str:
    change_start(root, "cam_high", 40.4 / tiny.FPS)
    return "start at 40.400 frames (from_timestamp 1.616000 s at 25 frames per second), expected a whole"


@corruption(("v3.0",))
def frames_start_one_late(root: Path) -> str:
    change_start(root, "cam_high", 41 / tiny.FPS)
    return "the video ends before frame 63. The file is truncated, damaged or at odds with meta/info.json, or with the"


@corruption(("v2.1",))
def episode_taken_out(root: Path) -> str:
    path = root / "meta/episodes.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[2]]))
    return "meta/episodes.jsonl: episode_index must count from 0 without gaps or repeats; it lacks 1. Where episodes"


@corruption(("v2.1",))
def listing_garbled(root: Path) -> str:
    path = root / "meta/episodes.jsonl"
    path.write_text(path.read_text().replace('"length": 23', '"length": 2 3'))
    return "meta/episodes.jsonl, line 2, is not valid JSON"


@corruption(LEROBOT)
def instruction_empty(root: Path) -> str:
    if (root / "meta/tasks.jsonl").exists():
        path = root / "meta/tasks.jsonl"
        path.write_text(path.read_text().replace(tiny.INSTRUCTIONS[0], ""))
    else:
        texts = ["", tiny.INSTRUCTIONS[1]]
        tiny.change_column(root / "meta/tasks.parquet", "__index_level_0__", lambda _: pa.array(texts))
    return "episode 1 has task_index [0], whose instruction in"


@corruption(LEROBOT)
def metadata_not_fetched(root: Path) -> str:
    (root / "meta/info.json").write_bytes(LFS)
    return "meta/info.json is a pointer of Git LFS"


# ---------------------------------------------------------------- rows
@corruption(LEROBOT)
def rows_not_fetched(root: Path) -> str:
    tiny.data_path(root, 2).write_bytes(LFS)
    return f"{tiny.data_path(root, 2).name} is a pointer of Git LFS"


@corruption(LEROBOT)
def clock_stored_as_float32(root: Path) -> str:
    path = tiny.data_path(root, 2)
    tiny.change_column(path, "timestamp", lambda t: pa.array(1.7e9 + np.array(t), pa.float64()).cast(pa.float32()))
    return "do not rise from row 0 (1700000000 s) to row 1 (1700000000 s); stored as float32"


@corruption(LEROBOT)
def missing_column(root: Path) -> str:
    path = tiny.data_path(root, 2)
    pq.write_table(pq.read_table(path).drop_columns("action"), path)
    return path.name


@corruption(LEROBOT)
def shuffled_episode_index(root: Path) -> str:
    path = tiny.data_path(root, 0)
    tiny.change_column(path, "episode_index", lambda values: pa.array([1, *values[1:]]))
    return path.name


@corruption(LEROBOT)
def shuffled_rows(root: Path) -> str:
    path = tiny.data_path(root, 1)
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table[:-2], table[-1:], table[-2:-1]]), path)
    return f"{path.name} holds 23 rows of episode 1"


@corruption(LEROBOT)
def missing_row(root: Path) -> str:
    path = tiny.data_path(root, 2)
    pq.write_table(pq.read_table(path)[:-1], path)
    return path.name


@corruption(LEROBOT)
def nan_state(root: Path) -> str:
    return change_last_row(root, "observation.state", lambda row: [np.nan, *row[1:]])


@corruption(LEROBOT)
def infinite_action(root: Path) -> str:
    return change_last_row(root, "action", lambda row: [*row[:-1], np.inf])


@corruption(LEROBOT)
def narrow_action(root: Path) -> str:
    return change_last_row(root, "action", lambda row: row[:-1])


@corruption(LEROBOT)
def duplicated_timestamps(root: Path) -> str:
    path = tiny.data_path(root, 2)
    tiny.change_column(path, "timestamp", lambda t: pa.array([*t[:7], t[6], *t[8:]], pa.float32()))
    return path.name


@corruption(LEROBOT)
def timestamp_jump(root: Path) -> str:
    path = tiny.data_path(root, 2)
    tiny.change_column(path, "timestamp", lambda t: pa.array([*t[:7], *(x + 0.5 for x in t[7:])], pa.float32()))
    return path.name


@corruption(LEROBOT)
def unknown_task(root: Path) -> str:
    path = tiny.data_path(root, 2)
    tiny.change_column(path, "task_index", lambda tasks: pa.array([9] * len(tasks)))
    return path.name


@corruption(LEROBOT)
def rows_lost(root: Path) -> str:
    tiny.data_path(root, 2).unlink()
    return tiny.data_path(root, 2).name


@corruption(LEROBOT)
def rows_cut_off(root: Path) -> str:
    return cut(tiny.data_path(root, 1), 0.9)


# ---------------------------------------------------------------- videos
@corruption(LEROBOT)
def video_not_fetched(root: Path) -> str:
    tiny.video_path(root, "cam_high", 2).write_bytes(LFS)
    return "(camera 'cam_high', episode 2) is a pointer of Git LFS"


@corruption(LEROBOT)
def video_lost(root: Path) -> str:
    tiny.video_path(root, "cam_left_wrist", 2).unlink()
    return tiny.video_path(root, "cam_left_wrist", 2).name


@corruption(LEROBOT)
def video_empty(root: Path) -> str:
    return cut(tiny.video_path(root, "cam_high", 2), 0)


@corruption(LEROBOT)
def video_cut_off(root: Path) -> str:
    return cut(tiny.video_path(root, "cam_high", 2), 0.8)


@corruption(LEROBOT)
def video_of_another_camera(root: Path) -> str:
    path = tiny.video_path(root, "cam_left_wrist", 2)
    shutil.copy(tiny.video_path(root, "cam_high", 2), path)
    return path.name


@corruption(LEROBOT)
def video_too_short(root: Path) -> str:
    path = tiny.video_path(root, "cam_right_wrist", 2)
    tiny.write_video(path, [tiny.picture(n, tiny.CAMERAS["cam_right_wrist"]) for n in range(tiny.LENGTHS[2] - 1)])
    return path.name


@corruption(LEROBOT)
def frame_lost_within(root: Path) -> str:
    """None of the frames that the doctor samples, but the file has one too few."""
    path = tiny.video_path(root, "cam_high", 2)
    rewrite_without(path, tiny.LENGTHS[2], lost=3)
    return path.name


@corruption(LEROBOT, "--full")
def pictures_damaged(root: Path) -> str:
    path = tiny.video_path(root, "cam_high", 2)
    whole = bytearray(path.read_bytes())
    place = (whole.index(b"mdat") + len(whole)) // 2
    whole[place : place + 200] = np.random.default_rng(0).bytes(200)
    path.write_bytes(whole)
    return path.name


# ---------------------------------------------------------------- RoboTwin
@corruption(ROBOTWIN)
def recording_not_fetched(root: Path) -> str:
    robotwin.episode_path(root, 1).write_bytes(LFS)
    return f"{robotwin.episode_path(root, 1).name} is a pointer of Git LFS"


@corruption(ROBOTWIN)
def recording_cut_off(root: Path) -> str:
    return cut(robotwin.episode_path(root, 1), 0.5)


@corruption(ROBOTWIN)
def recording_lost(root: Path) -> str:
    robotwin.episode_path(root, 0).unlink()
    return "holds 1 files episode*.hdf5"


@corruption(ROBOTWIN)
def joint_nan(root: Path) -> str:
    path = robotwin.episode_path(root, 1)
    with h5py.File(path, "a") as file:
        file[joints_name(root)][7, 2] = np.nan
    return path.name


@corruption(ROBOTWIN)
def picture_missing(root: Path) -> str:
    return change_pictures(root, "cam_high", lambda jpegs: jpegs[:-1])


@corruption(ROBOTWIN)
def no_picture(root: Path) -> str:
    return change_pictures(root, "cam_high", lambda jpegs: np.where(np.arange(len(jpegs)) == 0, b"", jpegs))


@corruption(ROBOTWIN)
def last_picture_damaged(root: Path) -> str:
    return change_pictures(root, "cam_high", lambda jpegs: np.array([*jpegs[:-1], jpegs[-1][:99]], jpegs.dtype))


@corruption(ROBOTWIN, "--full")
def one_picture_damaged(root: Path) -> str:
    return change_pictures(root, "cam_high", lambda jpegs: np.where(np.arange(len(jpegs)) == 4, jpegs[4][:99], jpegs))


@corruption(ROBOTWIN)
def camera_missing_in_one_episode(root: Path) -> str:
    path = robotwin.episode_path(root, 1)
    with h5py.File(path, "a") as file:
        del file[robotwin.picture_name(root, "cam_left_wrist")]
    return path.name


@corruption(("xpolicylab",))
def recorded_at_another_rate(root: Path) -> str:
    path = robotwin.episode_path(root, 1)
    with h5py.File(path, "a") as file:
        file["additional_info/frequency"][()] = 25
    return path.name


@corruption(("classic",))
def no_instruction(root: Path) -> str:
    (root / "instructions/episode1.json").write_text('{"seen": []}')
    return "instructions/episode1.json"


# ---------------------------------------------------------------- tools of the breakers
def cut(path: Path, share: float) -> str:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    return path.name


def change_start(root: Path, camera: str, seconds: float) -> None:
    """Where the frames of episode 1 start, v3.0."""
    column = f"videos/observation.images.{camera}/from_timestamp"
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    tiny.change_column(path, column, lambda starts: pa.array([starts[0], float(seconds), *starts[2:]]))


def change_last_row(root: Path, column: str, change: Callable[[list], list]) -> str:
    path = tiny.data_path(root, 1)
    tiny.change_column(path, column, lambda rows: pa.array([*rows[:-1], change(rows[-1])]))
    return path.name


def rewrite_without(path: Path, frames: int, lost: int) -> None:
    """A video of `frames` frames, its number `lost` left out and the others where they were."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=tiny.FPS, options={"g": "1"})
        stream.height, stream.width = tiny.CAMERAS["cam_high"]
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(tiny.picture(number, tiny.CAMERAS["cam_high"]), format="rgb24")
            frame.pts = number
            if number != lost:
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def joints_name(root: Path) -> str:
    return "joint_action/vector" if root.name == "classic" else "state/left_arm_joint_states"


def change_pictures(root: Path, camera: str, change: Callable[[np.ndarray], np.ndarray]) -> str:
    path, name = robotwin.episode_path(root, 1), robotwin.picture_name(root, camera)
    with h5py.File(path, "a") as file:
        changed = change(file[name][:])
        del file[name]
        file[name] = changed
    return path.name
