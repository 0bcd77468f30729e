"""What a file really holds where it is not what its name says, and JSON whose faults name their file and line.

Imports nothing of ours; everything that reads may import it.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEAD = 4096  # bytes looked at
Fault = Callable[[str], Exception]  # makes an error of a sentence

AGAIN = "the download met a page in place of the file (a login, an error); download it again"
UNPACK = "unpack it first"
# How a file begins -> what it is then, and the way out.
BEGINNINGS = (
    (b"version https://git-lfs.github.com/spec/", "a pointer of Git LFS, not the file itself",
     "run git lfs pull in its repository, or download the file itself"),
    (b"/annex/objects/", "a pointer of git-annex, not the file itself", "run git annex get on it"),
    (b"GGUF", "a GGUF file (quantised weights), which is not read", "get the model's .safetensors or .pt file"),
    (b"\x1f\x8b", "compressed (gzip)", UNPACK),
    (b"BZh", "compressed (bzip2)", UNPACK),
    (b"\xfd7zXZ", "compressed (xz)", UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd)", UNPACK),
    (b"7z\xbc\xaf", "an archive (7z)", UNPACK),
    (b"Rar!", "an archive (rar)", UNPACK),
    (b"PK\x03\x04", "a zip file", "unpack it, or name it .pt if torch.save wrote it"),
    (b"PAR1", "a parquet file", "give the right file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "give the right file"),
    (b"\x93NUMPY", "a numpy file", "give the right file"),
    (b"\x89PNG", "a PNG picture", "give the right file"),
    (b"\xff\xd8\xff", "a JPEG picture", "give the right file"),
)  # fmt: skip


def disguised(path: Path, own: bytes = b"", text: bool = False) -> str:
    """What a file that could not be read is instead of what it should be, and the way out: "is empty; copy it again".

    To follow its name in a sentence; "" where nothing is known. own: how a file of the right kind begins, or b"ftyp"
    for mp4: a damaged one is no other kind. text: whether it should hold text.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return ""
    if not head:
        return "is empty (0 bytes); copy or download it again"
    if not head.strip(b"\0"):
        return "holds zeros from its start on, as a download that was not finished; copy or download it again"
    words = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for beginning, what, way in BEGINNINGS:
        if beginning != own and words.startswith(beginning):
            return f"is {what}; {way}"
    if b".git/annex/objects/" in head and len(head) < 1024:
        return "is a pointer of git-annex, not the file itself; run git annex get on it"
    if words[:9].lower() == b"<!doctype" or words[:5].lower() == b"<html":
        return f"is a web page (HTML); {AGAIN}"
    if words.startswith(b"<?xml"):
        return f"is an XML document; {AGAIN}"
    if head[8:10] == b'{"' and not words.startswith(b"{"):
        return "is a safetensors file; name it so" if own != b"{" else ""
    if head[4:8] == b"ftyp" != own:
        return "is an mp4 video; give the right file"
    if head[257:262] == b"ustar":
        return f"is an archive (tar); {UNPACK}"
    if not text and len(head) < HEAD and _is_text(head):
        shown = " ".join(head.decode().split())
        return f"is a text of {len(head)} bytes ({shown[:60]!r}); {AGAIN}"
    return ""


def unfetched(path: Path) -> str:
    """As `disguised`, but only for a pointer of Git LFS or git-annex, whatever the file should be."""
    found = disguised(path, text=True)
    return found if "pointer" in found else ""


def absent(path: Path) -> str:
    """How a file is not there, to follow its name in a sentence."""
    if not path.is_symlink():
        return "is a folder, expected a file" if path.is_dir() else "does not exist"
    target = os.readlink(path)
    way = " (git annex get brings it)" if ".git/annex/objects" in target else ""
    return f"is a link to {target}, which does not exist{way}"


def read_json(path: Path, fault: Fault, way: str) -> dict[str, Any]:
    """The JSON object in a file. Raises fault(a sentence that names the file and ends with `way`)."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise fault(f"{path} {absent(path) if not path.is_file() else error.strerror}; {way}.") from error
    return _object(content, str(path), path, fault, way)


def read_json_lines(path: Path, fault: Fault, way: str) -> list[tuple[str, dict[str, Any]]]:
    """Where each JSON object of a file with one per line stands ("FILE, line 3"), and the object."""
    if not path.is_file():
        raise fault(f"{path} {absent(path)}; {way}.")
    lines = enumerate(path.read_bytes().splitlines(), 1)
    return [
        (f"{path}, line {number},", _object(line, f"{path}, line {number},", path, fault, way))
        for number, line in lines
        if line.strip()
    ]


def _object(content: bytes, where: str, path: Path, fault: Fault, way: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        if found := disguised(path, text=True):
            raise fault(f"{path} {found}.") from error
        one_line = isinstance(error, json.JSONDecodeError) and where != str(path)
        reason = f"{error.msg} at column {error.colno}" if one_line else error
        raise fault(f"{where} is not valid JSON ({reason}); {way}.") from error
    if not isinstance(value, dict):
        raise fault(f"{where} holds {str(value)[:40]!r}, expected a JSON object; {way}.")
    return value


def _is_text(content: bytes) -> bool:
    try:
        return all(letter.isprintable() or letter.isspace() for letter in content.decode())
    except UnicodeDecodeError:
        return False
