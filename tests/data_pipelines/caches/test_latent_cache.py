"""The folder of cached latents: whole files or none, checked on every read."""

import errno
import pickle
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.caches import latent_cache
from data_pipelines.caches.latent_cache import LatentFolder, Latents
from data_pipelines.disk import DiskError
from data_pipelines.episodes import DatasetError
from data_pipelines.ownership import OwnedError
from tests.full_disk import files_end_at

ROWS, SHAPE = 23, (2, 3, 4)
VALUES = np.random.default_rng(0).normal(size=(ROWS, *SHAPE)).astype(np.float16)


@pytest.fixture(autouse=True)
def ten_rows_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cache, "ROWS_PER_FILE", 10)


def folder(root: Path, **key: str) -> LatentFolder:
    return LatentFolder.inside(root, "frames", {"tower": "a", **key}, ROWS, SHAPE)


def write(to: LatentFolder, parts: list[range]) -> None:
    for part in parts:
        to.write(part, (VALUES[row : min(row + 3, part.stop)] for row in range(part.start, part.stop, 3)))


@pytest.fixture
def written(tmp_path: Path) -> LatentFolder:
    write(folder(tmp_path), folder(tmp_path).parts())
    return folder(tmp_path)


def test_rows_come_back(written: LatentFolder) -> None:
    assert [len(part) for part in written.parts()] == [10, 10, 3]
    latents = Latents(written)
    assert latents.shape == (ROWS, *SHAPE)
    rows = np.array([22, 0, 9, 10, 10, 4])
    got = latents[rows]
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, VALUES[rows])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(latents))[rows], VALUES[rows])
    size = sum(path.stat().st_size for path in written.path.glob("*.bin"))
    assert size == ROWS * written.row_bytes == VALUES.nbytes + 4 * ROWS


def test_any_order_gives_the_same_bytes(written: LatentFolder, tmp_path: Path) -> None:
    other = folder(tmp_path / "other")
    write(other, other.parts()[::-1])
    assert {p.name: p.read_bytes() for p in other.path.iterdir()} == {
        p.name: p.read_bytes() for p in written.path.iterdir()
    }


def test_another_key_is_another_folder(written: LatentFolder, tmp_path: Path) -> None:
    assert folder(tmp_path, tower="b").path != written.path
    assert LatentFolder.inside(tmp_path, "frames", {"tower": "a"}, ROWS + 1, SHAPE).path != written.path
    with pytest.raises(DatasetError, match="holds 0 of 3 files of latents, rows-0000000000.bin .*encode-video"):
        Latents(folder(tmp_path, tower="b"))


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    to = folder(tmp_path)

    def killed() -> None:
        yield VALUES[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to.write(to.parts()[0], killed())
    assert to.missing() == to.parts()
    write(to, to.parts()[:2])
    assert to.missing() == [range(20, 23)]
    with pytest.raises(DatasetError, match="holds 2 of 3 files of latents, rows-0000000020.bin is the first"):
        Latents(to)
    write(to, to.missing())
    np.testing.assert_array_equal(Latents(to)[np.arange(ROWS)], VALUES)
    assert sorted(path.suffix for path in to.path.iterdir()) == [".bin", ".bin", ".bin", ".json"]


def test_two_jobs_do_not_write_one_file(tmp_path: Path) -> None:
    to = folder(tmp_path)

    def during() -> None:
        yield VALUES[:4]
        with pytest.raises(OwnedError, match="being written by process .* give each job its own --shard"):
            write(to, to.parts()[:1])
        yield VALUES[4:10]

    to.write(to.parts()[0], during())
    write(to, to.parts()[1:])
    np.testing.assert_array_equal(Latents(to)[np.arange(ROWS)], VALUES)


def test_a_cut_off_file_is_missing(written: LatentFolder) -> None:
    path = written.file(written.parts()[1])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatasetError, match="rows-0000000010.bin is the first that is missing or cut off"):
        Latents(written)


@pytest.mark.parametrize("place", [10, -2])  # in a latent, in a checksum
def test_a_damaged_row_is_told(written: LatentFolder, place: int) -> None:
    path = written.file(written.parts()[1])
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    latents = Latents(written)
    row = 10 if place > 0 else 19
    np.testing.assert_array_equal(latents[np.array([11, 9])], VALUES[[11, 9]])
    with pytest.raises(DatasetError, match=f"rows-0000000010.bin: the latents of row {row} are damaged"):
        latents[np.array([11, row])]


def test_what_cannot_be_written_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to = folder(tmp_path)
    for bad in (np.full((10, *SHAPE), np.nan), np.full((10, *SHAPE), 1e9), np.zeros((10, 1, 1))):
        with pytest.raises(DatasetError, match="The latents of rows from 0 on are .* expected .* finite numbers"):
            to.write(to.parts()[0], [bad])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskError, match="its disk is full; make room .* The files before are kept; the same command"):
        write(to, to.parts()[:1])
    assert to.missing() == to.parts()


def test_a_full_disk_keeps_the_files_before(tmp_path: Path) -> None:
    written = folder(tmp_path)
    first, second = written.parts()[:2]
    values = np.zeros((len(first), *SHAPE), np.float16)
    written.write(first, [values])
    words = "rows-.*bin cannot be written: files may not grow further here; .* The files before are kept; the same"
    with files_end_at(100), pytest.raises(DiskError, match=words):
        written.write(second, [values])
    assert written.has(first) and written.missing()[0] == second
    assert not list(written.path.glob(".*.partial"))  # the room is given back
    written.write(second, [values])
    assert written.has(second)
