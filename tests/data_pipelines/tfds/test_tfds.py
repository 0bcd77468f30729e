"""Conversion to ArrayRecord: TFDS, grain and our reader return what was recorded; interruptions cost nothing."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("apache_beam")
tfds = pytest.importorskip("tensorflow_datasets")

from ahawam_jax.commands.convert import main  # noqa: E402
from data_pipelines.disk import DiskError  # noqa: E402
from data_pipelines.episodes import DatasetError  # noqa: E402
from data_pipelines.ownership import OwnedError, owned  # noqa: E402
from data_pipelines.processes import WorkerError  # noqa: E402
from data_pipelines.readers.layouts import LAYOUTS  # noqa: E402
from data_pipelines.readers.naming import Gripper, Reading  # noqa: E402
from data_pipelines.readers.robocoin import open_robocoin, subtasks  # noqa: E402
from data_pipelines.readers.subset import Entry, embodiment_of  # noqa: E402
from data_pipelines.tfds import layout  # noqa: E402
from data_pipelines.tfds.builder import Folder, builder  # noqa: E402
from data_pipelines.tfds.convert import _write_whole, convert, plan, write_shard  # noqa: E402
from data_pipelines.tfds.episodes import open_converted  # noqa: E402
from tests.data_pipelines import disguises  # noqa: E402
from tests.data_pipelines import tiny_dataset as tiny  # noqa: E402
from tests.data_pipelines import tiny_robocoin as coin  # noqa: E402
from tests.data_pipelines.synthetic_robocoin import UNSEEN, Synthetic  # noqa: E402
from tests.full_disk import files_end_at  # noqa: E402

NAMES = list(LAYOUTS["two_6dof_arms"].names)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coin.write_robocoin(tmp_path_factory.mktemp("coin") / "recorded")


@pytest.fixture(scope="module")
def entry(recorded: Path) -> Entry:
    return Entry("coin", recorded, 1.0, "bot", "two_6dof_arms")


@pytest.fixture(scope="module")
def whole(entry: Entry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset mapped and converted in one go, as PNG, two episodes to a shard: episode 0, episodes 1 and 2."""
    conversion = plan(entry, tmp_path_factory.mktemp("whole"), "png", 2)
    convert([conversion])
    return conversion.root


@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "broken")


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


# ---------------------------------------------------------------- reading
def test_read_by_tfds(whole: Path, entry: Entry) -> None:
    source = entry.open()
    by_folder = tfds.builder_from_directory(str(whole)).as_data_source(split="train")
    by_name = tfds.data_source("robot_episodes/coin", data_dir=whole.parents[2], split="train")
    assert len(by_folder) == len(by_name) == 3
    for e, length in enumerate(tiny.LENGTHS):
        example = by_name[e]
        assert example["episode"] == e and example["robot"] == b"bot"
        assert example["instruction"].decode() == source.instruction(e)
        assert [text.decode() for text in example["subtask"]] == source.subtasks(e)
        for name, rows in (("state", source.states), ("action", source.actions), ("timestamp", source.timestamps)):
            assert example[name].dtype == np.float32
            np.testing.assert_array_equal(example[name], rows(e))
        assert example["images"].keys() == tiny.CAMERAS.keys()
        for view, pictures in example["images"].items():
            np.testing.assert_array_equal(np.stack(pictures), source.frames(e, view, range(length)))
    assert "tensorflow" not in sys.modules


def test_metadata_of_the_embodiment(whole: Path) -> None:
    info = tfds.builder_from_directory(str(whole)).info
    assert (info.metadata["robot"], info.metadata["fps"]) == ("bot", tiny.FPS)
    assert info.metadata["state_names"] == info.metadata["action_names"] == NAMES
    assert info.metadata["state_units"] == list(LAYOUTS["two_6dof_arms"].units)
    assert info.splits["train"].shard_lengths == [1, 2]
    assert info.splits["train"].num_bytes == sum(p.stat().st_size for p in whole.glob("*array_record*"))


def test_a_robot_that_lacks_numbers_and_views(tmp_path: Path) -> None:
    """What it has not, and how its own vectors were brought to the layout, are as in the source."""
    entry = Entry("arm", Synthetic(UNSEEN["one_arm"], (40,)).write(tmp_path / "recorded"), 1.0, "bot", "two_arms")
    source, conversion = entry.open(), plan(entry, tmp_path, "png")
    convert([conversion])
    dataset = open_converted(conversion.root)
    assert dataset.state_present.tolist() == [False] * 8 + [True] * 6 + [False, True]
    np.testing.assert_array_equal(dataset.action_present, source.action_present)
    assert embodiment_of(dataset) == embodiment_of(source) and dataset.embodiment.absent == ("cam_left_wrist",)
    np.testing.assert_array_equal(dataset.actions(0), source.actions(0))
    np.testing.assert_array_equal(dataset.frames(0, "cam_left_wrist", [3]), np.zeros((1, 2, 2, 3), np.uint8))
    metadata = tfds.builder_from_directory(str(conversion.root)).info.metadata
    assert metadata["state_present"] == metadata["action_present"] == dataset.state_present.tolist()
    assert not plan(entry, tmp_path, "png").missing()
    unit = Gripper.parse({"closed": 0, "open": 10}, "unit")
    with pytest.raises(DatasetError, match=r"another conversion \(embodiment, recording differ"):
        plan(dataclasses.replace(entry, said=Reading(gripper=unit)), tmp_path, "png")


def test_read_by_grain(whole: Path) -> None:
    grain = pytest.importorskip("grain.python")
    source = tfds.builder_from_directory(str(whole)).as_data_source(split="train")
    lengths = [len(example["state"]) for example in grain.MapDataset.source(source)]
    assert lengths == list(tiny.LENGTHS)


def test_read_as_episodes(whole: Path, entry: Entry) -> None:
    source, dataset = entry.open(), open_converted(whole)
    assert (dataset.root, dataset.robot, dataset.fps) == (whole, "bot", tiny.FPS)
    assert dataset.cameras == tiny.CAMERAS and dataset.instructions == source.instructions
    assert dataset.state_names == dataset.action_names == tuple(NAMES)
    assert (dataset.state_dim, dataset.action_dim) == (14, 14)
    np.testing.assert_array_equal(dataset.lengths, source.lengths)
    np.testing.assert_array_equal(dataset.starts, source.starts)
    for e in (2, 0, 1):
        for rows in ("states", "actions", "timestamps"):
            found, wanted = getattr(dataset, rows)(e), getattr(source, rows)(e)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, wanted)
        assert dataset.instruction(e) == source.instruction(e)
        assert subtasks(dataset, e) == subtasks(source, e)
        for view in tiny.CAMERAS:
            picked = [20, 3, 3, 0]
            np.testing.assert_array_equal(dataset.frames(e, view, picked), source.frames(e, view, picked))


def test_as_recorded_in_jpeg(recorded: Path, tmp_path: Path) -> None:
    """Numbers, names and cameras stay as they are, pictures but for the loss of JPEG."""
    conversion = plan(Folder("plain", recorded), tmp_path)
    convert([conversion])
    source, dataset = open_robocoin(recorded), open_converted(conversion.root)
    assert conversion.shards == 1 and conversion.image_format == "jpeg"
    assert dataset.state_names == coin.GRIPPERS_LAST and list(dataset.cameras) == list(source.cameras)
    assert dataset.robot == "tiny"
    np.testing.assert_array_equal(dataset.states(2), source.states(2))
    view = coin.CAMERAS["cam_left_wrist"]  # whose edge lies within a block of JPEG
    off = np.abs(dataset.frames(2, view, range(31)).astype(int) - source.frames(2, view, range(31)))
    assert 0 < off.mean() < 1
    info = tfds.builder_from_directory(str(conversion.root)).info
    assert info.metadata["state_units"][-1] == ""  # of left_eef_pos_x, of which RoboCOIN's joints do not tell


def test_long_episodes_are_decoded_in_parts(whole: Path, entry: Entry, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("data_pipelines.tfds.builder.FRAMES_AT_ONCE", 7)
    conversion = plan(entry, tmp_path, "png", 2)
    write_shard(conversion, 1)
    path = layout.shard_path(conversion.root, 1, 2)
    assert path.read_bytes() == (whole / path.name).read_bytes()


def test_the_builder_alone_writes_the_same_examples(whole: Path, entry: Entry, tmp_path: Path) -> None:
    of = builder(entry, tmp_path, "png")
    assert of.info.disable_shuffling  # or the order would be that of a hash
    of.download_and_prepare()
    alone, sharded = of.as_data_source("train"), tfds.builder_from_directory(str(whole)).as_data_source("train")
    for e in range(3):
        one, other = alone[e], sharded[e]
        assert one.keys() == other.keys() and one["episode"] == other["episode"] == e
        np.testing.assert_array_equal(one["state"], other["state"])
        np.testing.assert_array_equal(one["images"]["cam_high"], other["images"]["cam_high"])
    with pytest.raises(DatasetError, match="is not a whole converted dataset"):
        open_converted(of.data_dir)


# ---------------------------------------------------------------- interruptions
@pytest.mark.parametrize("episodes", range(1, 30))
def test_shards_hold_each_episode_once(episodes: int) -> None:
    for per_shard in range(1, 12):
        shards = -(-episodes // per_shard)
        sizes = np.diff(layout.shard_starts(episodes, shards))
        assert sizes.sum() == episodes and sizes.min() >= 1 and sizes.max() <= per_shard
        assert sizes.max() - sizes.min() <= 1


STOPPED = """
import os, signal, sys, time
from data_pipelines.tfds import convert
from ahawam_jax.commands.convert import main
original, calls = convert.example, []

def example(*arguments):
    calls.append(arguments)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.{signal})
        time.sleep(60)
    return original(*arguments)

convert.example = example
sys.argv = ["tfds", *{arguments}]
main()
"""


def arguments_of(entry: Entry, folder: Path) -> list[str]:
    subset = folder / "subset.toml"
    subset.write_text(
        f'[[dataset]]\nname = "coin"\npath = "{entry.path}"\nweight = 1\nrobot = "bot"\nlayout = "two_6dof_arms"\n'
    )
    return ["--subset", str(subset), "--out", str(folder), "--image-format", "png", "--episodes-per-shard", "2"]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_rerun_after_an_interruption(whole: Path, entry: Entry, tmp_path: Path, monkeypatch, name: str) -> None:
    """Stopped in the third of three episodes: one shard is whole, the other half-written."""
    arguments = arguments_of(entry, tmp_path)
    script = STOPPED.format(signal=name, arguments=arguments)
    code = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=50).returncode
    assert code != 0 and (name != "SIGKILL" or code == -signal.SIGKILL)
    root = layout.folder(tmp_path, "coin")
    done = [path for path in root.glob("*.array_record-*") if not path.name.startswith(".")]
    assert len(done) == 1 and not (root / layout.COMPLETE).exists()
    assert name != "SIGKILL" or list(root.glob(".*.partial"))
    with pytest.raises(DatasetError, match="is not a whole converted dataset"):
        open_converted(root)
    written = done[0].stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["tfds", *arguments])
    main()
    assert done[0].stat().st_mtime_ns == written
    assert contents(root) == contents(whole)


def test_only_missing_shards_are_written(whole: Path, entry: Entry, tmp_path: Path) -> None:
    root = shutil.copytree(whole, layout.folder(tmp_path, "coin"))
    (root / ".descriptions.partial").mkdir()  # left by a run that was killed
    gone, kept = (layout.shard_path(root, shard, 2) for shard in (0, 1))
    gone.unlink()
    written = kept.stat().st_mtime_ns
    conversion = plan(entry, tmp_path, "png", 2)
    assert conversion.missing() == [0]
    convert([conversion])
    assert kept.stat().st_mtime_ns == written and contents(root) == contents(whole)


def test_one_conversion_at_a_time(whole: Path, entry: Entry, tmp_path: Path) -> None:
    root = shutil.copytree(whole, layout.folder(tmp_path, "coin"))
    conversion = plan(entry, tmp_path, "png", 2)
    with owned(root):
        for another in (lambda: plan(entry, tmp_path, "png", 2), lambda: convert([conversion])):
            with pytest.raises(OwnedError, match=f"is being written by process {os.getpid()}"):
                another()
        assert len(open_converted(root).lengths) == 3  # readers do not ask
    convert([conversion])
    assert contents(root) == contents(whole)


def test_files_get_their_names_when_whole(tmp_path: Path) -> None:
    """By a rename, which no crash can cut in two."""
    path, seen = tmp_path / "file", []

    def write(partial: Path) -> None:
        partial.write_text("content")
        seen.append((path.exists(), partial.stat().st_ino))

    _write_whole(path, write)
    assert seen == [(False, path.stat().st_ino)] and contents(tmp_path) == {"file": b"content"}


def test_a_shard_without_rows_does_not_count(entry: Entry, tmp_path: Path, monkeypatch) -> None:
    conversion = plan(entry, tmp_path, "png", 2)
    monkeypatch.setattr("data_pipelines.tfds.convert._row_table", lambda dataset, episode: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_shard(conversion, 0)
    assert conversion.missing() == [0, 1] and list(contents(conversion.root)) == [layout.CONVERSION]


def test_episode_that_is_too_large(entry: Entry, tmp_path: Path, monkeypatch) -> None:
    conversion = plan(entry, tmp_path, "png", 2)
    monkeypatch.setattr("data_pipelines.tfds.convert.LARGEST_EXAMPLE", 100)
    with pytest.raises(DatasetError, match="the pictures of episode 0 take 0.00 GiB, an example holds 0.00; use"):
        write_shard(conversion, 0)


def test_dataset_info_comes_last(whole: Path, entry: Entry, monkeypatch) -> None:
    """TFDS takes a folder with dataset_info.json for complete."""
    replace, order = Path.replace, []
    monkeypatch.setattr(Path, "replace", lambda path, target: (order.append(target.name), replace(path, target))[1])
    convert([plan(entry, whole.parents[2], "png", 2)])
    assert order[-1] == layout.COMPLETE and len(order) == len(set(order)) == 3


def test_another_conversion_in_the_same_folder(entry: Entry, recorded: Path, whole: Path, tmp_path: Path) -> None:
    out = whole.parents[2]
    before = contents(whole)
    with pytest.raises(DatasetError, match=r"conversion.json belongs to another conversion .shards differ"):
        plan(entry, out, "png", 1)
    with pytest.raises(DatasetError, match="image_format differ"):
        plan(entry, out, "jpeg", 2)
    differing = "robot, cameras, state_dim, action_dim, state_names, action_names, embodiment, recording differ"
    with pytest.raises(DatasetError, match=differing):
        plan(Folder("coin", recorded), out, "png", 2)
    assert contents(whole) == before


@pytest.mark.parametrize("text", ["{", "3"])
def test_damaged_description_of_a_conversion(entry: Entry, tmp_path: Path, text: str) -> None:
    (plan(entry, tmp_path, "png", 2).root / layout.CONVERSION).write_text(text)
    with pytest.raises(DatasetError, match="conversion.json (is not valid|holds) .*remove its folder and convert"):
        plan(entry, tmp_path, "png", 2)


def test_shards_that_did_not_arrive(entry: Entry, tmp_path: Path, monkeypatch) -> None:
    """Workers of another machine may write to a folder of theirs."""
    monkeypatch.setattr("data_pipelines.tfds.convert.write_shard", lambda conversion, shard: None)
    with pytest.raises(DatasetError, match="lacks the shards 0, 1 after the workers ended"):
        convert([plan(entry, tmp_path, "png", 2)])


# ---------------------------------------------------------------- command line
def test_command_line(recorded: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two datasets one does not fit; the subset file lets it be skipped, and it is named."""
    subset = tmp_path / "subset.toml"
    table = f'[[dataset]]\npath = "{recorded}"\nweight = 1\nrobot = "bot"\n'
    subset.write_text(
        f'{table}name = "wide"\nlayout = "two_6dof_arms"\nif_unmappable = "skip"\n'
        'state = { left_gripper_open_scale = "" }\n'
        f'{table}name = "fits"\nlayout = "two_6dof_arms"\n'
    )
    monkeypatch.setattr(sys, "argv", ["tfds", "--subset", str(subset), "--out", str(tmp_path)])
    main()
    text = capsys.readouterr().err
    assert "Skipped wide:" in text and "lacks left_gripper_open_scale" in text
    assert "robot_episodes/fits/1.0.0: 1 shards, 1 of them new" in text
    assert [path.name for path in (tmp_path / "robot_episodes").iterdir()] == ["fits"]
    subset.write_text(subset.read_text().replace('"skip"', '"error"'))
    with pytest.raises(SystemExit, match="lacks left_gripper_open_scale"):
        main()


def test_options_reach_beam(recorded: Path, tmp_path: Path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr("ahawam_jax.commands.convert.convert", lambda *arguments: seen.append(arguments[1:]))
    arguments = ["tfds", "--dataset", str(recorded), "--out", str(tmp_path), "--runner", "FlinkRunner"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--", "--flink_master=localhost:8081", "--parallelism=8"])
    main()
    assert seen == [(1, ["--runner=FlinkRunner", "--flink_master=localhost:8081", "--parallelism=8"])]
    for wrong in (["--processes=0"], ["--processes=2", "--runner=X"], ["--", "--parallelism=8"], [
        "--runner=DirectRunner", "--", "--direct_running_mode=multi_processing",
    ]):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            main(["--dataset", str(recorded), "--out", str(tmp_path), *wrong])
    assert len(seen) == 1


@pytest.mark.parametrize(
    "way", [{"processes": 2}, {"beam_options": ["--runner=FnApiRunner"]}], ids=["processes", "Beam"]
)
def test_ways_to_convert(entry: Entry, whole: Path, tmp_path: Path, way: dict) -> None:
    conversion = plan(entry, tmp_path, "png", 2)
    convert([conversion], **way)
    assert contents(conversion.root) == contents(whole)


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error(entry: Entry, tmp_path: Path, monkeypatch) -> None:
    conversion = plan(entry, tmp_path, "png", 2)
    monkeypatch.setattr("data_pipelines.tfds.convert.write_shard", killed)
    with pytest.raises(WorkerError, match="was killed by SIGKILL.*The shards before are kept; the same command goes"):
        convert([conversion], processes=2)


def test_a_full_disk_keeps_the_shards_before(entry: Entry, whole: Path, tmp_path: Path) -> None:
    """Of the tables, then of the pictures, whose library does not raise OSError."""
    conversion = plan(entry, tmp_path, "png", 2)
    write_shard(conversion, 0)
    for size in (1000, 20_000):
        words = "00001-of-00002.* cannot be written: .*The shards before are kept; the same command goes on"
        with files_end_at(size), pytest.raises(DiskError, match=words):
            convert([conversion])
        assert conversion.missing() == [1] and not list(conversion.root.glob(".*.partial"))
    convert([conversion])
    assert contents(conversion.root) == contents(whole)


def test_another_recording_is_another_conversion(entry: Entry, recorded: Path, whole: Path, tmp_path: Path) -> None:
    """Of the same sizes and names: pictures behind a link, actions, or annotations differ."""
    changed = shutil.copytree(recorded, tmp_path / "changed")
    (changed / "videos").rename(tmp_path / "videos")
    (changed / "videos").symlink_to(tmp_path / "videos")
    conversion = plan(dataclasses.replace(entry, path=changed), tmp_path / "out", "png", 2)
    assert (conversion.root / layout.CONVERSION).read_bytes() == (whole / layout.CONVERSION).read_bytes()

    def refused() -> bool:
        with pytest.raises(DatasetError, match="belongs to another conversion .recording differ.; go on with its dat"):
            plan(dataclasses.replace(entry, path=changed), tmp_path / "out", "png", 2)
        return True

    video = tiny.video_path(changed, "cam_left_wrist_rgb", 1)
    before = video.read_bytes()
    video.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert refused()
    video.write_bytes(before)
    plan(dataclasses.replace(entry, path=changed), tmp_path / "out", "png", 2)
    rows = tiny.data_path(changed, 1)
    tiny.change_column(rows, "action", lambda v: pa.array([[x * 2 for x in row] for row in v], pa.list_(pa.float32())))
    assert refused()


def test_faults_end_in_their_sentence(recorded: Path, tmp_path: Path, monkeypatch) -> None:
    """Of a worker, and of a name that is none."""
    damaged = shutil.copytree(recorded, tmp_path / "damaged")
    video = tiny.video_path(damaged, "cam_left_wrist_rgb", 1)
    video.write_bytes(video.read_bytes()[:500])
    monkeypatch.setattr(sys, "argv", ["tfds", "--dataset", str(damaged), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: .*'cam_left_wrist_rgb', episode 1.* cannot be decoded"):
        main()
    root = layout.folder(tmp_path, "damaged")
    assert [path.name for path in root.iterdir() if "array_record" in path.name] == []
    damaged.rename(tmp_path / "a set")
    monkeypatch.setattr(sys, "argv", ["tfds", "--dataset", str(tmp_path / "a set"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="the folder's name 'a set' names the converted dataset"):
        main()


# ---------------------------------------------------------------- broken conversions
def test_files_that_are_missing(broken: Path) -> None:
    layout.rows_path(broken, 1, 2).unlink()
    with pytest.raises(DatasetError, match="lacks rows-00001-of-00002.parquet; copy"):
        open_converted(broken)
    with pytest.raises(DatasetError, match="is not a whole converted dataset"):
        open_converted(broken / "gone")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds .*expected a JSON object"),
        ("{}", "version, .*lengths is missing or of another kind"),
    ],
)
def test_broken_description(broken: Path, text: str, message: str) -> None:
    (broken / layout.CONVERSION).write_text(text)
    with pytest.raises(DatasetError, match=f"conversion.json:? {message}"):
        open_converted(broken)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [('"1.0.0"', '"2.0.0"', "version is missing or of"), ('"shards": 2', '"shards": "2"', "shards is missing or of")],
)
def test_description_of_another_kind(broken: Path, old: str, new: str, message: str) -> None:
    path = broken / layout.CONVERSION
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DatasetError, match=f"conversion.json: {message}"):
        open_converted(broken)


def test_damaged_rows(broken: Path) -> None:
    path = layout.rows_path(broken, 1, 2)
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 9), path)
    with pytest.raises(DatasetError, match="rows-00001-of-00002.parquet holds 9 rows of episode 1, .*promises 23"):
        open_converted(broken).states(1)
    with pytest.raises(DatasetError, match="rows-00001-of-00002.parquet cannot be read"):
        open_converted(broken).states(2)
    for file, use in (
        (path, lambda d: d.states(1)), (layout.shard_path(broken, 1, 2), lambda d: d.frames(1, "cam_high", [0])),
    ):  # fmt: skip
        whole = file.read_bytes()
        says = disguises.put(file, "lfs")
        with pytest.raises(DatasetError, match=f"{file.name}.* {says}"):
            use(open_converted(broken))
        file.write_bytes(whole)
    pq.write_table(table.drop_columns("action").slice(0, 23), path)
    with pytest.raises(DatasetError, match="rows-00001-of-00002.parquet lacks the column action"):
        open_converted(broken).states(1)


def test_damaged_pictures(broken: Path) -> None:
    path = layout.shard_path(broken, 1, 2)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match="array_record-00001-of-00002: the pictures of camera 'cam_high' in ep"):
        open_converted(broken).frames(2, "cam_high", [0])
