"""Paths as users give them: files and folders of this machine, or a sentence at once. Imports nothing of ours.

Nothing here reads or writes object stores. Taken as a path, gs://bucket/run is the folder `gs:` in the folder one is
in, and a job would find out after hours of work, or never.
"""

import re
from argparse import ArgumentTypeError
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")  # with one slash: what Path makes of two
MOUNT = "mount it as a folder ({}) and give that, or copy what is needed to a disk and back"
WAYS = {
    "gs": MOUNT.format("gcsfuse"),
    "s3": MOUNT.format("mount-s3"),
    "hf": "download it (hf download REPOSITORY --local-dir DIR) and give DIR",
    "http": "download it and give the file",
    "https": "download it and give the file",
    "file": "give the path alone, without file://",
}


class AddressError(ArgumentTypeError, ValueError):
    """An address where a path was expected. As argparse's type, `local_path` says so in its words."""


def local_path(path: str | Path) -> Path:
    """The path. Raises AddressError for an address, gs://bucket/run say, and for a ~ that no shell has replaced."""
    if found := ADDRESS.match(str(path)):
        way = WAYS.get(found[1].lower(), MOUNT.format("rclone mount"))
        raise AddressError(
            f"{path} is an address, but only files and folders of this machine are read and written: {way}."
        )
    if str(path).startswith("~"):
        raise AddressError(f"{path} begins with ~, which the shell replaces at the start of a word only; write $HOME.")
    return Path(path)


def refuse_addresses(tree: Mapping[str, Any], prefix: str) -> None:
    """Raises AddressError for a text that is an address anywhere in a tree of settings.

    prefix: goes before their names, "config." say.
    """
    for key, value in tree.items():
        if isinstance(value, Mapping):
            refuse_addresses(value, f"{prefix}{key}.")
        elif isinstance(value, (str, Path)):
            try:
                local_path(value)
            except AddressError as error:
                raise AddressError(f"{prefix}{key}: {error}") from None
