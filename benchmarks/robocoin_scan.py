"""Datasets and episodes per minute of `ahawam robocoin`, and the memory it takes as the folder grows.

    python -m benchmarks.robocoin_scan                                  # 1,000 datasets of 100 episodes
    python -m benchmarks.robocoin_scan --datasets 100 --folder DIR      # DIR keeps the datasets for the next run

The datasets are written first and not timed: LeRobot v2.1 without videos, which the scan does not open, of three
namings, with grippers of 0..1, of 0..100 mm and with hands. An episode has 24 seconds at 30 rows a second, as
RoboCOIN's have on average. Datasets of a naming share their files on disk (hard links), so that reading is from
memory: what a slower disk adds is its own. One dataset in the midst has a parquet file that ends too early.

The scan runs in a process of its own. CPU seconds are of that process and all it starts, which tells on a machine
that does other things as well. Memory is their proportional set size, sampled while they run; the peak until 10%,
until 50% and until the end says whether it grows with the folder.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.paths import local_path
from data_pipelines.progress import Progress
from data_pipelines.recording.lerobot_tables import data_table, vector_stats

ROWS, FPS = 729, 30
SIDES = ("left", "right")
SHARES = (0.1, 0.5, 1.0)  # of the datasets, up to which peaks of memory are told
SAMPLE_SECONDS = 0.1


def _arm(side: str, joints: int) -> list[str]:
    return [f"{side}_arm_joint_{n}_rad" for n in range(1, joints + 1)]


def _pose(side: str) -> list[str]:
    return [f"{side}_eef_pos_{axis}_m" for axis in "xyz"] + [f"{side}_eef_rot_euler_{axis}_rad" for axis in "xyz"]


# Recorded robot type -> (names of its numbers, what its grippers record open).
ROBOTS = {
    "agilex_cobot_decoupled_magic": (
        [name for side in SIDES for name in (*_arm(side, 6), f"{side}_gripper_open", *_pose(side))], 1.0,
    ),
    "galaxea_r1_lite": ([name for side in SIDES for name in (*_arm(side, 6), f"{side}_gripper_open")], 100.0),
    "leju_robot": (
        [name for side in SIDES for name in (*_arm(side, 7), *(f"{side}_hand_joint_{n}_rad" for n in range(1, 7)))],
        0.0,
    ),
}  # fmt: skip
CAMERAS = ("cam_high_rgb", "cam_left_wrist_rgb", "cam_right_wrist_rgb")


# ---------------------------------------------------------------- datasets
def write_tree(folder: Path, datasets: int, episodes: int) -> str:
    """So many datasets in a folder, in turn of each robot; returns the name of the broken one."""
    templates = folder / ".templates"  # no dataset lies in it: a scan must not count them
    for number, robot in enumerate(ROBOTS):
        write_dataset(templates / robot, robot, episodes, number)
    names = [f"{robot}_task_{number:04d}" for number, robot in zip(range(datasets), _round(datasets), strict=True)]
    progress = Progress(datasets, "datasets written", stream=sys.stderr)
    for name, robot in zip(names, _round(datasets), strict=True):
        shutil.copytree(templates / robot, folder / name, copy_function=os.link)
        progress.add("", 1)
    shutil.rmtree(templates)
    path = folder / names[datasets // 3] / data_path(episodes // 2)
    whole = path.read_bytes()
    path.unlink()  # the others share it
    path.write_bytes(whole[: len(whole) // 2])
    return names[datasets // 3]


def _round(count: int) -> list[str]:
    robots = list(ROBOTS)
    return [robots[number % len(robots)] for number in range(count)]


def data_path(episode: int) -> str:
    return f"data/chunk-000/episode_{episode:06d}.parquet"


def write_dataset(root: Path, robot: str, episodes: int, seed: int) -> None:
    """Metadata and rows of a dataset of at most 1,000 episodes."""
    names, opened = ROBOTS[robot]
    rng = np.random.default_rng(seed)
    for part in ("meta", "data/chunk-000", "annotations"):
        (root / part).mkdir(parents=True)
    vector = {"dtype": "float32", "shape": [len(names)], "names": names}
    picture = {"dtype": "video", "shape": [480, 640, 3], "names": ["height", "width", "channels"]}
    subtask = {"subtask_annotation": {"dtype": "int32", "shape": [5], "names": None}}
    features = {"observation.state": vector, "action": vector} | subtask
    info = {
        "codebase_version": "v2.1", "robot_type": robot, "fps": FPS, "chunks_size": 1000,
        "total_episodes": episodes, "total_frames": episodes * ROWS,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features | {f"observation.images.{camera}": picture for camera in CAMERAS},
    }  # fmt: skip
    stats = []
    for episode in range(episodes):
        state = _paths(names, opened, rng)
        action = np.concatenate([state[1:], state[-1:]])
        table = data_table({
            "observation.state": state, "action": action, "timestamp": (np.arange(ROWS) / FPS).astype(np.float32),
            "frame_index": np.arange(ROWS), "episode_index": np.full(ROWS, episode),
            "index": np.arange(ROWS) + episode * ROWS, "task_index": np.zeros(ROWS, np.int64),
        })  # fmt: skip
        annotated = pa.array(np.tile(np.array([0, -1, -1, -1, -1], np.int32), ROWS))
        table = table.append_column("subtask_annotation", pa.FixedSizeListArray.from_arrays(annotated, 5))
        pq.write_table(table, root / data_path(episode))
        told = {"observation.state": vector_stats(state), "action": vector_stats(action)}
        stats.append({"episode_index": episode, "stats": told})
    lengths = [{"episode_index": episode, "tasks": [], "length": ROWS} for episode in range(episodes)]
    _lines(root / "meta/episodes.jsonl", lengths)
    _lines(root / "meta/episodes_stats.jsonl", stats)
    _lines(root / "meta/tasks.jsonl", [{"task_index": 0, "task": "put the cup on the tray"}])
    _lines(root / "annotations/subtask_annotations.jsonl", [{"subtask_index": 0, "subtask": "Lift the cup"}])
    (root / "meta/info.json").write_text(json.dumps(info))


def _paths(names: list[str], opened: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth joints of -2..2, float32 [ROWS, n], and grippers that open and close."""
    cycles, phase = rng.uniform(1, 3, len(names)), rng.uniform(0, 1, len(names))
    paths = np.sin(2 * np.pi * (cycles * np.arange(ROWS)[:, None] / ROWS + phase))
    grippers = ["gripper" in name for name in names]
    return np.where(grippers, opened * np.clip(0.5 + paths, 0, 1), 1.5 * paths).astype(np.float32)


def _lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


# ---------------------------------------------------------------- measuring
@dataclass
class Memory:
    """Bytes that a process and all that it starts hold, sampled by a thread until it ends. peak: so far."""

    process: subprocess.Popen
    peak: int = 0
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self.process.poll() is None:
            self.peak = max(self.peak, sum(map(_held, _family(self.process.pid))))
            time.sleep(SAMPLE_SECONDS)


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:
        for listed in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, _text(listed).split())
    return found


def _held(pid: int) -> int:
    pages = re.search(r"^Pss:\s+(\d+) kB", _text(Path(f"/proc/{pid}/smaps_rollup")), re.MULTILINE)
    return 1024 * int(pages[1]) if pages else 0


def _text(path: Path) -> str:
    """"" where a process has ended meanwhile."""
    try:
        return path.read_text()
    except OSError:
        return ""


def scan(folder: Path, out: Path) -> tuple[float, float, list[int], str]:
    """Seconds, CPU seconds, the peak of memory in bytes up to each of SHARES, and all that was said."""
    command = [sys.executable, "-m", "ahawam_jax", "robocoin", str(folder), "--out", str(out)]
    began, before = time.monotonic(), _cpu_seconds()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    memory, peaks, said = Memory(process), [], ""
    for line in process.stdout:
        said += line
        if told := re.search(r"([\d,]+) of ([\d,]+) datasets", line):
            done, total = (int(number.replace(",", "")) for number in told.groups())
            peaks += [memory.peak] * (sum(done >= share * total for share in SHARES) - len(peaks))
    process.wait()
    seconds, cpu = time.monotonic() - began, _cpu_seconds() - before
    return seconds, cpu, [*peaks, *[memory.peak] * len(SHARES)][: len(SHARES)], said


def _cpu_seconds() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robocoin_scan", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--datasets", type=int, default=1000, help="default %(default)s")
    parser.add_argument("--episodes", type=int, default=100, help="of each dataset (default %(default)s)")
    parser.add_argument("--folder", type=local_path, help="where the datasets lie or are to be written")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"{os.cpu_count()} cores {platform.machine()}, load {os.getloadavg()[0]:.1f} before; "
        f"Python {platform.python_version()}, pyarrow {pa.__version__}, numpy {np.__version__}, commit {commit}\n"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "datasets"
        noted = folder.with_name(f"{folder.name}.broken")  # beside it: the name of the broken dataset
        if not folder.exists():
            noted.write_text(write_tree(folder, options.datasets, options.episodes))
        broken, datasets = noted.read_text(), len(list(folder.iterdir()))
        seconds, cpu, peaks, said = scan(folder, Path(temporary) / "subset.toml")
    print(said)
    if broken not in said:
        sys.exit(f"error: the scan does not name {broken}, which is broken.")
    rates = (f"{60 * count / seconds:,.0f}" for count in (datasets, datasets * options.episodes))
    shares = [f"peak MiB until {share:.0%}" for share in SHARES]
    print(_row("datasets", "episodes of each", "seconds", "CPU s", "datasets/min", "episodes/min", *shares))
    print("|---" * (6 + len(shares)) + "|")
    memory = (f"{peak / 2**20:.0f}" for peak in peaks)
    print(_row(datasets, options.episodes, f"{seconds:.1f}", f"{cpu:.1f}", *rates, *memory))


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
