"""Files that appear whole or not at all, and the sentence for a disk that takes no more of them.

Imports nothing of ours; everything that writes may import it.
"""

import errno
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ELSEWHERE = "make room or choose another folder"
# errno -> what is the matter, and the way out.
TROUBLES = {
    errno.ENOSPC: ("its disk is full", ELSEWHERE),
    errno.EDQUOT: ("the quota on its disk is used up", ELSEWHERE),
    errno.EFBIG: ("files may not grow further here", "lift the limit (ulimit -f) or choose another folder"),
    errno.EIO: ("its disk reports an input/output error", "check that disk or choose another folder"),
    errno.EROFS: ("its file system is read-only", "choose another folder"),
    errno.EACCES: ("this user may not write there", "change the rights of its folder or choose another one"),
    errno.ENOTDIR: ("a part of its path is a file", "choose another folder"),
}  # fmt: skip
# Libraries in C++ raise errors of their own kinds, with the system's words; these cannot be about reading.
WORDS = {os.strerror(code): code for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)}
SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # numpy's tofile, which loses the system's words


class DiskError(OSError):
    """A file that cannot be written; the message says which, why, the way out and what is safe."""


@contextmanager
def writing(path: str | Path, safe: str) -> Iterator[None]:
    """Makes one sentence of whatever a library raises when the disk of `path` takes no more; other errors pass.

    safe: a sentence that says what was kept and how to go on. Raises DiskError.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        code = trouble(error, path)
        if code is None:
            raise
        reason, way = TROUBLES[code]
        raise DiskError(f"{path} cannot be written: {reason}; {way}. {safe}") from error


def trouble(error: BaseException | None, path: str | Path) -> int | None:
    """The errno of TROUBLES behind an error, or behind what it was raised from; None where it is no such error.

    Nor where it names a file that is neither at `path`, nor beside it, nor above: that one was read.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in TROUBLES and _concerns(error.filename, Path(path).absolute()):
            return error.errno
        found = [code for words, code in WORDS.items() if words in str(error)]
        if found or SHORT_WRITE.search(str(error)):
            return found[0] if found else errno.ENOSPC
        error = error.__cause__ or error.__context__
    return None


def _concerns(named: str | bytes | int | None, path: Path) -> bool:
    if not isinstance(named, str):
        return True
    found = Path(named).absolute()
    return found.is_relative_to(path.parent) or path.is_relative_to(found)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields the name to write a file under; it gets its own name when all of it is on the disk, and is removed else.

    Whoever writes the same file meanwhile, in whichever process, waits until this one is done.
    """
    partial = path.with_name(f".{path.name}.partial")
    lock = _locked(partial, path.name)
    try:
        yield partial
        os.fsync(lock)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    finally:
        os.close(lock)


def _locked(path: Path, name: str) -> int:
    """Descriptor of a file that nobody else holds, emptied of what a killed writer left."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process, which writes {name}", file=sys.stderr, flush=True)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):  # else the other has given its file the final name, or removed it
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    os.truncate(descriptor, 0)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def require_room(folder: str | Path, size: int, advice: str) -> None:
    """Raises DiskError where the disk of `folder`, which need not exist yet, has no room for `size` bytes more."""
    there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise DiskError(f"{folder} needs {_bytes(size)} more, {_bytes(free)} are free; {advice}.")


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
