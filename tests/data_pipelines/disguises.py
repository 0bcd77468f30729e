"""Files that are something else than their names say, each with what the sentence about them must say."""

import gzip
import io
import os
import zipfile
from pathlib import Path

import numpy as np

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 14703\n"


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return buffer.getvalue()


def _numpy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(9))
    return buffer.getvalue()


DISGUISES: dict[str, tuple[bytes, str]] = {
    "lfs": (LFS, r"is a pointer of Git LFS, not the file itself; run git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s14703--4d7a21.mp4\n", "is a pointer of git-annex.*; run git annex get on"),
    "annex link": (b"../../.git/annex/objects/gf/k8/SHA256E-s1/SHA256E-s1", "is a pointer of git-annex"),
    "web page": (b"\xef\xbb\xbf\n<!DOCTYPE html><html><title>Sign in</title>", r"is a web page \(HTML\); .*again"),
    "web page without a type": (b"<HTML>\n<body>404</body></HTML>", r"is a web page \(HTML\)"),
    "server's error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is an XML document"),
    "server's words": (b"Invalid username.", "is a text of 17 bytes .'Invalid username.'.; .*again"),
    "nothing": (b"", r"is empty \(0 bytes\); copy or download it again"),
    "zeros": (bytes(9000), "holds zeros from its start on"),
    "gzip": (gzip.compress(b"x" * 99), r"is compressed \(gzip\); unpack it first"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(100), "is a GGUF file .*; get the model's .safetensors or .pt"),
    "numpy": (_numpy(), "is a numpy file"),
    "zip": (_zip(), "is a zip file"),
    "mp4": (b"\0\0\0\x20ftypisom" + bytes(100), "is an mp4 video"),
    "tar": (b"name".ljust(257, b"\0") + b"ustar\x0000" + bytes(300), r"is an archive \(tar\)"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file"),
    "parquet": (b"PAR1" + bytes(100), "is a parquet file"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "is a PNG picture"),
}


def put(path: Path, name: str) -> str:
    """Puts a disguise in a file's place; the pattern that the sentence must match, behind the file's name."""
    path.unlink(missing_ok=True)
    content, says = DISGUISES[name]
    path.write_bytes(content)
    return says


def dangle(path: Path) -> str:
    """Puts a link that leads nowhere in a file's place, as a dataset kept by git-annex has them."""
    path.unlink()
    os.symlink("../.git/annex/objects/Xx/SHA256-s1", path)
    return r"is a link to ../.git/annex/objects/Xx/SHA256-s1, which does not exist \(git annex get brings it\)"


def but(*kinds: str) -> list[str]:
    """All disguises but these."""
    return [name for name in DISGUISES if name not in kinds]


