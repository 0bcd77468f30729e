"""One process at a time writes to a folder: who it is, and when its place is free again.

The owner holds a lock (flock) on a small file in the folder and has written down there who it is. The kernel, or the
server of a shared disk, lets go of the lock when the process is gone, however it went, and the next one takes over.
Two cases need more. Some disks have no locks: then a process of this machine counts as gone if no process has its
number and its time of start. Some have locks that other machines do not see: then an owner elsewhere counts as gone
after a minute without a sign of life, which it gives every ten seconds. Readers never ask.
"""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipelines.disk import writing

FILE = ".owner"  # in a folder that one process owns all of
BEAT, SILENT = 10.0, 60.0  # seconds: between two signs of life, and without any until an owner elsewhere is gone
POLL, SETTLE = 0.5, 1.0  # seconds: between two looks of who waits; until a note without a lock counts as kept
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class OwnedError(ValueError):
    """Another process writes there; the message says which, on which host, and what to do."""


class Owner:
    """This process's right to write to `folder`, until `release`. A forked child has no part in it.

    Args:
      folder: is made where it does not exist.
      name: of what is owned in the folder, where several may be, each by another process; "" for all of it.
      wait: for the process that has it, instead of raising OwnedError at once.
    Raises DiskError where the folder cannot be written.
    """

    def __init__(self, folder: str | Path, name: str = "", wait: bool = False) -> None:
        self.folder, self.file = Path(folder), f".{name}.owner" if name else FILE
        self._subject = self.folder / name
        made, told = not self.folder.exists(), False
        while (other := self._try()) is not None:
            if not wait:
                raise OwnedError(
                    f"{self._subject} is being written by {other}; one process writes there at a time: wait for it, "
                    "end it, or name another place."
                )
            if not told:
                print(f"{self._subject} is being written by {other}; waiting for it.", file=sys.stderr, flush=True)
            told = True
            time.sleep(POLL)
        ended, path = threading.Event(), self.folder / self.file
        threading.Thread(target=_beat, args=(self._descriptor, ended), daemon=True).start()
        self._release = weakref.finalize(self, _release, self._descriptor, path, self._note, made, ended)
        _owners.add(self)

    def check(self) -> None:
        """Raises OwnedError if another process took over, because this one was silent for too long."""
        path = self.folder / self.file
        if not path.exists():
            raise OwnedError(f"{path} was removed while this process wrote there; nothing more is written from here.")
        now = path.read_bytes()
        if now != self._note:
            raise OwnedError(
                f"{self._subject} was taken over by {_describe(_parse(now))} after this process had given no sign of "
                "life; nothing more is written from here."
            )

    def release(self) -> None:
        """Gives it up; also removes the folder if it was made for this and is empty."""
        self._release()  # once; not in the child of a fork

    def _try(self) -> str | None:
        """Takes it, or says who has it."""
        path = self.folder / self.file
        with writing(path, "Nothing was begun."):
            return self._try_file(path)

    def _try_file(self, path: Path) -> str | None:
        descriptor, locks = _open(path)
        try:
            before = _parse(os.pread(descriptor, 4096, 0))
            if locks is None:
                return _describe(before)
            if before:
                silence = _age(descriptor, self.folder)
                if not _gone(before, locks, silence):
                    return f"{_describe(before)}, which gave a sign of life {max(silence, 0):.0f} s ago"
                print(f"{self._subject}: {_describe(before)} is gone, taking over.", file=sys.stderr, flush=True)
            self._note = json.dumps(_own_note()).encode()
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, self._note, 0)
            if not locks:  # two may have come at once; the later note counts
                time.sleep(SETTLE)
                if (now := path.read_bytes()) != self._note:
                    return _describe(_parse(now))
            self._descriptor, descriptor = descriptor, -1
            return None
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def _open(path: Path) -> tuple[int, bool | None]:
    """Opens the file; whether its lock was taken, None if another process has it, False where there are no locks."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return descriptor, None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            return descriptor, False
        if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor, True
        os.close(descriptor)  # who had it has just removed the file


def _beat(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):  # a disk that does not answer: `check` will say what came of it
            os.utime(descriptor)
    os.close(descriptor)


def _release(descriptor: int, path: Path, note: bytes, made: bool, ended: threading.Event) -> None:
    with suppress(OSError):  # not empty, or gone: nothing of it is ours to remove
        if path.read_bytes() == note:
            path.unlink()
        if made:
            path.parent.rmdir()
    with suppress(OSError):  # no locks here
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    ended.set()


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


def _forget() -> None:
    """In the child of a fork: the lock goes with the parent, not with the last of its children."""
    for owner in _owners:
        if owner._release.detach():
            os.close(owner._descriptor)


os.register_at_fork(after_in_child=_forget)


@contextmanager
def owned(folder: str | Path, name: str = "", wait: bool = False) -> Iterator[Owner]:
    """`Owner` for the length of a block."""
    owner = Owner(folder, name, wait)
    try:
        yield owner
    finally:
        owner.release()


def _own_note() -> dict[str, Any]:
    program = Path(sys.argv[0]).name
    return {
        "host": socket.gethostname(), "process": os.getpid(), "started": _start_of(os.getpid()),
        "machine": _machine(), "processes": _process_space(),
        "command": " ".join(["ahawam" if program == "__main__.py" else program, *sys.argv[1:2]]),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip


def _parse(note: bytes) -> dict[str, Any]:
    """Empty for one that is empty or cut off: its writer never came to write."""
    try:
        found = dict(json.loads(note))
    except (ValueError, TypeError):
        return {}
    return found if set(found) >= set(_own_note()) else {}


def _describe(note: dict[str, Any]) -> str:
    if not note:
        return "a process that has just begun"
    return f"process {note['process']} on {note['host']} ({note['command']}, since {note['since']})"


def _gone(note: dict[str, Any], locks: bool, silence: float) -> bool:
    """Whether the writer of a note has ended, where the disk has locks and this process got it, or has none."""
    if locks and note["machine"] == _machine():  # one kernel: it would not have given the lock to two
        return True
    if note["machine"] == _machine() and note["processes"] == _process_space():
        return _start_of(note["process"]) != note["started"]
    return silence > SILENT


def _age(descriptor: int, folder: Path) -> float:
    """Seconds since the owner's last sign of life, by the clock of the disk."""
    last = os.fstat(descriptor).st_mtime
    with tempfile.TemporaryFile(dir=folder) as now:
        return os.fstat(now.fileno()).st_mtime - last


def _start_of(process: int) -> str:
    """When a process of this machine began, "" if there is none: numbers are given again, times are not."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # a zombie writes no more
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self").exists():
            return ""
    command = ["ps", "-o", "lstart=", "-p", str(process)]  # macOS
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _machine() -> str:
    """This boot of this machine."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else socket.gethostname()


def _process_space() -> str:
    """Where process numbers mean what they mean here: a container has its own."""
    path = "/proc/self/ns/pid"
    return os.readlink(path) if os.path.islink(path) else ""
