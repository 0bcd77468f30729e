"""One owner at a time: between processes, after a death, across forks, without locks and between machines."""

import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_pipelines import ownership
from data_pipelines.disk import DiskError
from data_pipelines.ownership import OwnedError, Owner, owned
from tests.conftest import REPOSITORY

HOLD = r"""
import os, sys, time
from data_pipelines.ownership import Owner
owner = Owner(sys.argv[1])
if sys.argv[2:] and os.fork() == 0:
    owner.release()  # not the child's to give up
os.write(1, f"{os.getpid()}\n".encode())  # whole lines from both
time.sleep(60)
"""


def holder(folder: Path, *fork: str) -> tuple[subprocess.Popen, list[int]]:
    """Another process that owns the folder once this returns; the numbers of it and its children."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *fork], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    return process, [int(process.stdout.readline()) for _ in range(1 + len(fork))]


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_who_has_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    process, _ = holder(tmp_path)
    for _ in range(2):
        who = rf"{tmp_path} is being written by process {process.pid} on {socket.gethostname()} \(.*, since 20"
        with pytest.raises(OwnedError, match=who):
            Owner(tmp_path)
    kill(process)
    with owned(tmp_path):
        said = capsys.readouterr().err
        assert f"process {process.pid} on" in said and "is gone, taking over" in said
        with pytest.raises(OwnedError, match=f"process {os.getpid()} on"):  # nor twice in one process
            Owner(tmp_path)
    assert not list(tmp_path.iterdir())
    with owned(tmp_path):  # was given up: nobody is gone
        assert not capsys.readouterr().err


def test_a_child_is_no_second_owner_and_outlives_none(tmp_path: Path) -> None:
    process, numbers = holder(tmp_path, "fork")
    with pytest.raises(OwnedError, match=f"process {process.pid} "):
        Owner(tmp_path)
    kill(process)
    (child,) = set(numbers) - {process.pid}
    os.kill(child, 0)  # still there
    owned_again = Owner(tmp_path)
    os.kill(child, signal.SIGKILL)
    owned_again.release()


def test_what_is_not_given_up_ends_with_the_process(tmp_path: Path) -> None:
    code = f"from data_pipelines.ownership import Owner; owner = Owner({str(tmp_path / 'a')!r})"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=30)
    assert not list(tmp_path.iterdir())
    Owner(tmp_path)  # nor longer than anybody holds it
    assert not list(tmp_path.iterdir())


def test_waiting_for_the_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "POLL", 0.01)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    first, got = Owner(tmp_path, "part"), []
    thread = threading.Thread(target=lambda: got.append(Owner(tmp_path, "part", wait=True)))
    thread.start()
    while "waiting for it" not in (said := sys.stderr.getvalue()):
        time.sleep(0.01)
    assert f"{tmp_path / 'part'} is being written by process {os.getpid()}" in said and not got
    Owner(tmp_path, "another part").release()  # does not wait
    first.release()
    thread.join(10)
    got[0].release()


def test_what_was_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with owned(tmp_path / "a"):
        assert (tmp_path / "a" / ".owner").is_file()
    assert not (tmp_path / "a").exists()
    with owned(tmp_path / "b"):
        (tmp_path / "b" / "result").touch()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["result"]


def test_a_note_cut_off_is_nobody(tmp_path: Path) -> None:
    for note in ("", '{"host": "a", "proc', '{"host": "a"}', "[]"):
        (tmp_path / ".owner").write_text(note)
        Owner(tmp_path).release()


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(ownership.fcntl, "flock", refuse)
    monkeypatch.setattr(ownership, "SETTLE", 0.0)


def left_by(folder: Path, **changes: object) -> None:
    """The note of an owner that is this process, but for the changes."""
    note = ownership._own_note()
    (folder / ".owner").write_text(json.dumps({**note, **changes}))


def test_without_locks_the_process_is_looked_up(without_locks: None, tmp_path: Path) -> None:
    left_by(tmp_path)
    with pytest.raises(OwnedError, match=f"process {os.getpid()} on"):
        Owner(tmp_path)
    left_by(tmp_path, started="1")  # its number was given to another process since
    Owner(tmp_path).release()
    ended = subprocess.Popen(["sleep", "60"])
    left_by(tmp_path, process=ended.pid, started=ownership._start_of(ended.pid))
    with pytest.raises(OwnedError, match=f"process {ended.pid} on"):
        Owner(tmp_path)
    ended.kill()
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # a zombie until it is waited for
    Owner(tmp_path).release()
    ended.wait()


def test_without_locks_the_later_note_counts(
    without_locks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership.time, "sleep", lambda _: left_by(tmp_path, process=1, host="elsewhere"))
    with pytest.raises(OwnedError, match="process 1 on elsewhere"):
        Owner(tmp_path)


def test_an_owner_on_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Whose lock is not seen here: it counts for a minute after its last sign of life."""
    left_by(tmp_path, machine="another", host="elsewhere")
    with pytest.raises(OwnedError, match=r"process \d+ on elsewhere .*, which gave a sign of life 0 s ago"):
        Owner(tmp_path)
    long_ago = time.time() - ownership.SILENT - 1
    os.utime(tmp_path / ".owner", (long_ago, long_ago))
    with owned(tmp_path) as owner:
        assert "elsewhere" in capsys.readouterr().err
        owner.check()
        left_by(tmp_path, host="third")  # one that did the same to this process
        with pytest.raises(OwnedError, match=r"taken over by process \d+ on third"):
            owner.check()
        (tmp_path / ".owner").unlink()
        with pytest.raises(OwnedError, match=".owner was removed while this process wrote there"):
            owner.check()
        left_by(tmp_path, host="third")
    assert (tmp_path / ".owner").exists()  # not this process's to remove


def test_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT", 0.01)
    with owned(tmp_path):
        os.utime(tmp_path / ".owner", (0, 0))
        while (tmp_path / ".owner").stat().st_mtime == 0:
            time.sleep(0.01)


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ownership.os, "pwrite", full)
    with pytest.raises(DiskError, match=r"/.owner cannot be written: its disk is full; .* Nothing was begun"):
        Owner(tmp_path)
