"""Every change of the pictures is another key, through links of every kind; a copy has the same one."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from data_pipelines.caches import keys
from data_pipelines.caches.keys import NOTES, pictures_key
from data_pipelines.canvas import Canvas
from data_pipelines.episodes import DatasetError
from data_pipelines.readers.layouts import LAYOUTS
from data_pipelines.readers.naming import Reading
from data_pipelines.readers.opening import open_episodes
from data_pipelines.readers.robocoin import Mapped
from tests.data_pipelines import tiny_dataset as tiny
from tests.data_pipelines import tiny_robocoin as coin
from tests.data_pipelines.readers.test_robotwin import write_classic

CANVAS = Canvas(tiny.CAMERAS["cam_high"])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its videos are long enough for a middle: bytes that no decoder reads follow each."""
    root = tiny.write_dataset(tmp_path_factory.mktemp("tiny") / "set", "v2.1")
    for path in root.rglob("*.mp4"):
        path.write_bytes(path.read_bytes() + bytes(100_000))
    return root


@pytest.fixture
def root(recorded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(recorded, tmp_path / "set")


@pytest.fixture(params=["noted at once", "read each time"])
def noted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "SETTLED", 0.0 if request.param == "noted at once" else float("inf"))


def key(root: Path) -> str:
    return pictures_key(open_episodes(root), CANVAS, root.parent / "cache")


def video(root: Path, camera: str = "cam_high", episode: int = 0) -> Path:
    return tiny.video_path(root, camera, episode)


def change_middle(path: Path) -> None:
    """In place: size, both ends and the time of modification stay."""
    before, content = os.stat(path), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    while os.stat(path).st_ctime_ns == before.st_ctime_ns:  # the clock of file systems ticks every few milliseconds
        with path.open("rb+") as file:
            file.write(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# ---------------------------------------------------------------- links
def folder_link(root: Path) -> None:
    (root / "videos").rename(root.parent / "elsewhere")
    (root / "videos").symlink_to("../elsewhere")  # relative


def file_links(root: Path) -> None:
    pool = root.parent / "pool"
    pool.mkdir()
    for number, path in enumerate(sorted(root.rglob("*.mp4"))):
        path.rename(pool / f"{number}")
        path.symlink_to(pool / f"{number}")


def chain(root: Path) -> None:
    folder_link(root)
    (root.parent / "elsewhere").rename(root.parent / "disk")
    (root.parent / "elsewhere").symlink_to(root.parent / "disk")
    path = video(root)
    path.rename(path.with_name("first"))
    path.with_name("second").symlink_to(path.with_name("first"))
    path.symlink_to("second")


def into_another_dataset(root: Path) -> None:
    other = shutil.copytree(root, root.parent / "other")
    shutil.rmtree(root / "videos")
    (root / "videos").symlink_to(other / "videos")


def whole_root(root: Path) -> None:
    root.rename(root.parent / "moved")
    root.symlink_to("moved")


@pytest.mark.parametrize("link", [folder_link, file_links, chain, into_another_dataset, whole_root])
def test_links_are_seen_through(root: Path, noted: None, link: Callable[[Path], None]) -> None:
    before = key(root)
    link(root)
    assert key(root) == before
    change_middle(video(root).resolve())
    assert key(root) != before


def test_a_link_that_points_elsewhere(root: Path, noted: None) -> None:
    first, second = (video(root, episode=episode) for episode in (0, 1))
    pool = root.parent / "pool"
    pool.mkdir()
    shutil.copyfile(first, pool / "a")
    content = bytearray(first.read_bytes())
    content[-1] ^= 1  # of the same size
    (pool / "b").write_bytes(content)
    os.utime(pool / "b", ns=(os.stat(pool / "a").st_atime_ns, os.stat(pool / "a").st_mtime_ns))
    first.unlink()
    first.symlink_to(pool / "a")
    before = key(root)
    first.unlink()
    first.symlink_to(pool / "b")
    assert key(root) != before


@pytest.mark.parametrize("target", ["gone", "loop"])
def test_links_that_lead_nowhere_are_a_sentence(root: Path, target: str) -> None:
    path = video(root)
    path.unlink()
    path.symlink_to(path if target == "loop" else root / "gone")
    words = "episode_000000.mp4.* cannot be read .(Too many levels|No such file).*copy the dataset again, or correct"
    with pytest.raises(DatasetError, match=words):
        key(root)
    shutil.rmtree(root / "videos")
    (root / "videos").symlink_to(root / "videos" if target == "loop" else root / "gone")
    with pytest.raises(DatasetError, match="mp4.* cannot be read"):
        key(root)


def test_a_loop_that_nothing_is_read_through(root: Path) -> None:
    before = key(root)
    (root / "videos/loop").symlink_to(root)
    (root / "meta/notes.txt").write_text("nobody reads this")
    assert key(root) == before


# ---------------------------------------------------------------- changes
def swap(root: Path) -> None:
    first, second = video(root, "cam_left_wrist"), video(root, "cam_right_wrist")
    first.rename(root / "x")
    second.rename(first)
    (root / "x").rename(second)


def encode_again(root: Path) -> None:
    tiny.write_video(video(root), [tiny.picture(5, tiny.CAMERAS["cam_high"])] * tiny.LENGTHS[0])


def shorten(root: Path) -> None:
    path = video(root, episode=2)
    path.write_bytes(path.read_bytes()[:-1])


def one_video_for_all(root: Path) -> None:
    """Of the metadata alone."""
    tiny.change_info(root, video_path="videos/chunk-000/{video_key}/episode_000000.mp4")


def another_rate(root: Path) -> None:
    tiny.change_info(root, fps=tiny.FPS + 1)


@pytest.mark.parametrize(
    "change",
    [swap, encode_again, shorten, one_video_for_all, another_rate, lambda root: change_middle(video(root, episode=1))],
)
def test_every_change_is_another_key(root: Path, noted: None, change: Callable[[Path], None]) -> None:
    before = key(root)
    change(root)
    assert key(root) != before and key(root) == key(root)


def test_places_in_a_file_count(tmp_path: Path) -> None:
    """Of the metadata of v3.0: an episode that begins elsewhere in its file."""
    seen = set()
    for start in (0, 1):
        root = tiny.write_dataset(tmp_path / f"{start}", "v3.0")
        place = "videos/observation.images.cam_high/from_timestamp"
        table = root / "meta/episodes/chunk-000/file-000.parquet"
        tiny.change_column(table, place, lambda v, start=start: pa.array([*v[:2], v[2] + start / tiny.FPS]))
        seen.add(key(root))
    assert len(seen) == 2


def test_what_decides_no_picture_changes_nothing(root: Path, noted: None) -> None:
    before = key(root)
    tiny.change_info(root, robot_type="other")
    tiny.data_path(root, 0).touch()
    video(root).touch()
    assert key(root) == before


def test_a_file_that_is_gone_is_a_sentence(root: Path) -> None:
    key(root)
    video(root, "cam_right_wrist", 1).unlink()
    with pytest.raises(DatasetError, match="episode_000001.mp4 cannot be read .No such file.*copy the dataset again"):
        key(root)
    pictures_key(open_episodes(root), Canvas((32, 48), single_view=True), root.parent / "cache")  # does not show it


def test_files_of_any_name(root: Path, noted: None) -> None:
    for path in root.rglob("*.mp4"):
        path.rename(path.with_suffix(".mkv"))
    tiny.change_info(root, video_path=tiny.PATHS["v2.1"]["video_path"].replace(".mp4", ".mkv"))
    before = key(root)
    change_middle(video(root).with_suffix(".mkv"))
    assert key(root) != before


def test_a_copy_has_the_same_key(root: Path, tmp_path: Path, noted: None) -> None:
    before = key(root)
    copy = tmp_path / "another/host/data"
    shutil.copytree(root, copy, copy_function=shutil.copyfile)  # without the times
    assert key(copy) == before


def test_robotwin(tmp_path: Path, noted: None) -> None:
    root = write_classic(tmp_path / "task")
    (root / "data").rename(tmp_path / "elsewhere")
    (root / "data").symlink_to(tmp_path / "elsewhere")
    before = key(root)
    change_middle(tmp_path / "elsewhere/episode1.hdf5")
    assert key(root) != before


def test_views_by_name(tmp_path: Path) -> None:
    source = open_episodes(coin.write_robocoin(tmp_path / "coin"))
    six = LAYOUTS["two_6dof_arms"]
    swapped = coin.CAMERAS | {"cam_left_wrist": "cam_right_wrist_rgb", "cam_right_wrist": "cam_left_wrist_rgb"}
    readings = (("a", Reading()), ("b", Reading(coin.CAMERAS)), ("a", Reading(swapped)))
    datasets = [Mapped(source, six, *reading) for reading in readings]
    first, same, other = (pictures_key(dataset, CANVAS, tmp_path) for dataset in datasets)
    assert first == same != other


# ---------------------------------------------------------------- notes
@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    read, digest = [], keys._digest
    monkeypatch.setattr(keys, "_digest", lambda path: (read.append(path), digest(path))[1])
    return read


def test_files_are_read_once(root: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "SETTLED", 0.0)
    before = key(root)
    assert len(reads) == 9
    assert key(root) == before and len(reads) == 9
    whole_root(root)  # the same files under another path
    assert key(root) == before and len(reads) == 9
    change_middle(video(root))
    key(root)
    assert len(reads) == 10 and reads[-1] == video(root)


def test_files_that_just_changed_are_not_noted(root: Path, reads: list[Path]) -> None:
    key(root)
    key(root)
    assert len(reads) == 18 and not (root.parent / "cache" / NOTES).exists()


def test_damaged_notes_are_read_past(root: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line cut off by a full disk, and what was added after it."""
    monkeypatch.setattr(keys, "SETTLED", 0.0)
    before = key(root)
    notes = root.parent / "cache" / NOTES
    notes.write_bytes(notes.read_bytes()[:-40])
    assert key(root) == before and len(reads) == 10
    assert key(root) == before and len(reads) == 10


def test_a_file_that_grows_while_it_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = keys.hashlib.file_digest

    def read(file, kind: str):
        with open(file.name, "ab") as writer:
            writer.write(b"more")
        return digest(file, kind)

    monkeypatch.setattr(keys.hashlib, "file_digest", read)
    with pytest.raises(DatasetError, match="changed while it was read; start again when the dataset is complete"):
        key(root)
