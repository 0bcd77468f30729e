"""Files appear whole or not at all, and a disk that takes no more is a sentence whichever library met it."""

import errno
import fcntl
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.disk import DiskError, require_room, trouble, whole_file, writing
from tests.conftest import REPOSITORY
from tests.full_disk import files_end_at

SAFE = "The files before are kept; the same command goes on."


def by_python(path: Path) -> None:
    path.write_bytes(bytes(100_000))


def by_pyarrow(path: Path) -> None:
    pq.write_table(pa.table({"x": np.random.default_rng(0).random(100_000)}), path)


def by_numpy(path: Path) -> None:
    with path.open("wb") as file:
        np.zeros(100_000).tofile(file)


@pytest.mark.parametrize("write", [by_python, by_pyarrow, by_numpy])
def test_a_disk_that_takes_no_more_is_a_sentence(tmp_path: Path, write) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with files_end_at(5000), pytest.raises(DiskError) as caught, writing(path, SAFE), whole_file(path) as partial:
        write(partial)
    assert str(caught.value).startswith(f"{path} cannot be written: ") and str(caught.value).endswith(SAFE)
    assert "make room" in str(caught.value) or "lift the limit" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "before"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x"), "its disk is full; make room"),
        (OSError(errno.EDQUOT, "x"), "quota"),
        (OSError(errno.EIO, "x"), "input/output error"),
        (OSError(errno.EROFS, "x"), "read-only"),
        (PermissionError(errno.EACCES, "x"), "may not write there"),
        (RuntimeError("write() failed: No space left on device; at byte 192512"), "its disk is full"),
        (OSError("16384 requested and 0 written"), "its disk is full"),
    ],
)
def test_every_trouble_of_a_disk(tmp_path: Path, error: Exception, words: str) -> None:
    with pytest.raises(DiskError, match=f"{tmp_path} cannot be written: .*{words}.* {SAFE}"), writing(tmp_path, SAFE):
        try:
            raise error
        except Exception as cause:
            raise ValueError("a library's own words") from cause


def test_other_errors_pass(tmp_path: Path) -> None:
    for error in (ValueError("its values"), FileNotFoundError(errno.ENOENT, "no such file")):
        assert trouble(error, tmp_path) is None
        with pytest.raises(type(error)), writing(tmp_path, SAFE):
            raise error
    with pytest.raises(DiskError, match="^said once$"), writing(tmp_path, SAFE), writing(tmp_path, "inner"):
        raise DiskError("said once")


def test_troubles_with_what_is_read_pass(tmp_path: Path) -> None:
    """Told by the file that they name: one above, beside or below is being written."""
    out = tmp_path / "data/set"
    for named, about in (
        ("set", True), ("set/videos/a.mp4", True), (".set.partial", True), ("..", True), ("../scene.xml", False),
    ):  # fmt: skip
        error = PermissionError(errno.EACCES, "Permission denied", os.path.normpath(out.parent / named))
        with pytest.raises(DiskError if about else PermissionError, match="may not write" if about else "denied"):
            with writing(out, SAFE):
                raise error


def test_what_a_killed_writer_left_is_not_taken_for_the_file(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from data_pipelines.disk import whole_file\n"
        "with whole_file(pathlib.Path(sys.argv[1])) as partial: partial.write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / "file"
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=REPOSITORY).returncode == -9
    assert not path.exists() and len(list(tmp_path.iterdir())) == 1
    with whole_file(path) as partial:
        assert partial.read_text() == "" and not path.exists()
        partial.write_text("all")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "all"


def test_two_writers_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second finds the first one's file under its own name, and writes another."""
    path, inside, go_on = tmp_path / "file", threading.Event(), threading.Event()

    def first() -> None:
        with whole_file(path) as partial:
            partial.write_text("first")
            inside.set()
            go_on.wait(30)

    def second() -> None:
        with whole_file(path) as partial:
            seen.append((path.read_text(), partial.read_text()))
            partial.write_text("second")

    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    seen, threads = [], [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(30)
    threads[1].start()
    while "waiting for another process, which writes file" not in said.getvalue():
        assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert seen == [("first", "")] and path.read_text() == "second"
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock is gone with its holder
    os.close(descriptor)


def test_room_is_asked_for_before_the_start(tmp_path: Path) -> None:
    require_room(tmp_path / "not/there/yet", 1, "choose")
    with pytest.raises(DiskError, match=r"set needs 1,000,000,000.0 GB more, .* free; choose another folder\."):
        require_room(tmp_path / "set", 10**18, "choose another folder")
