"""The record of an exported folder: what is in it, of which checkpoint, written by what, and how well it matched.

manifest.json is the last file of an export and lists all others with size and sha256, so a folder that has one is
whole, and a file that was cut off, or belongs to another export, is noticed.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_pipelines.disk import writing
from data_pipelines.files import read_json, unfetched
from data_pipelines.ownership import owned

FILE = "manifest.json"
FORMAT = 1
MODEL, VAE, CONFIG, TEXT = "model.safetensors", "vae.safetensors", "config.json", "text_tokens"
EMBODIMENT = "embodiment.json"  # of a robot whose own vectors differ from the model's


class ExportError(ValueError):
    """An export that cannot be made or used; the message says which, what was expected and what to do."""


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder to write to, which gets the name `out` when the block ends and is removed if it fails.

    Raises ExportError if `out` exists, OwnedError if another process is writing it, DiskError if it finds no room.
    """
    safe = "Nothing of it is kept, and what it is made of is as it was: the same command starts anew."
    with owned(out.parent, out.name), writing(out, safe):
        require_new(out)
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        try:
            yield partial
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def require_new(out: Path) -> None:
    """Raises ExportError if `out` exists."""
    if out.exists():
        raise ExportError(f"{out} exists; remove it or give another --out, nothing is overwritten.")


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Lists every file of the folder beside `facts`; all of it is on the disk when this returns."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files[str(path.relative_to(folder))] = {"size": path.stat().st_size, "sha256": sha256(path)}
    packages = {name: version(name) for name in ("torch", "jax", "numpy")}
    record = {"format": FORMAT, **facts, "files": files, "versions": {"python": platform.python_version(), **packages}}
    (folder / FILE).write_text(json.dumps(record, indent=1) + "\n")
    sha256(folder / FILE)


def read_manifest(folder: str | Path, hashes: bool = False) -> dict[str, Any]:
    """The record of an export whose files all have their sizes and, with `hashes`, their contents.

    Raises ExportError for what is no export, and for a file that is missing, cut off or another one.
    """
    folder = Path(folder)
    path = folder / FILE
    if not path.is_file():
        raise ExportError(
            f"{folder} is no finished export, it has no {FILE}; write one with ahawam to-torch CHECKPOINT "
            f"--out {folder}."
        )
    record = read_json(path, ExportError, "convert the checkpoint again")
    try:
        found, files = record["format"], {name: (x["size"], x["sha256"]) for name, x in record["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{path} is not readable ({error!r}); convert the checkpoint again.") from error
    if found != FORMAT:
        raise ExportError(f"{path} has format {found}, this version reads {FORMAT}; convert the checkpoint again.")
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            raise ExportError(f"{file} is missing, although {FILE} lists it; copy the export again.")
        if found := unfetched(file):
            raise ExportError(f"{file} {found}.")
        if file.stat().st_size != size:
            raise ExportError(
                f"{file} has {file.stat().st_size:,} bytes, {FILE} says {size:,}: it is cut off or of another export; "
                "copy the export again."
            )
        if hashes and sha256(file) != digest:
            raise ExportError(
                f"{file} is not the file that was exported (its sha256 differs from {FILE}): it is damaged or of "
                "another export; copy the export again."
            )
    return record


def require(record: Mapping[str, Any], folder: Path, names: Sequence[str]) -> None:
    """Raises ExportError where the record lacks one of the files that every such export has."""
    for name in names:
        if name not in record["files"]:
            raise ExportError(f"{folder} has no {name}; convert the checkpoint again.")


def sha256(path: Path) -> str:
    """Hash of a file's content, which is on the disk afterwards."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
