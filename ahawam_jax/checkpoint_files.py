"""Which file of a saved checkpoint is damaged, found from what the files say of each other, without reading arrays.

Orbax keeps the arrays of an item in an OCDBT store: a manifest names a tree of nodes, these name byte ranges of data
files. Imports nothing of ours.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorstore

DESCRIPTION, MANIFEST = "_METADATA", "manifest.ocdbt"
# As tensorstore writes a place: kind, folder, file, first byte, number of bytes.
PLACE = re.compile(r"(btreenode|versionnode|value):(.*):(.*):(\d+):(\d+)")


class Damage(Exception):
    """The message names the file and says what is wrong with it."""


def check_item(item: Path) -> None:
    """Raises Damage for the first file of an item that is missing, cut off or not what it should be."""
    if not item.is_dir():
        raise Damage(f"{item} is missing")
    for path in (item / DESCRIPTION, item / "_sharding", *sorted((item / "array_metadatas").glob("*"))):
        if path.exists() or path.name == DESCRIPTION:
            read_json(path)
    _check_store(item)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object. Raises Damage."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise Damage(f"{path} is missing") from None
    if not content:
        raise Damage(f"{path} is empty")
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise Damage(f"{path} is cut off or holds something else than JSON ({error})") from None


def _check_store(item: Path) -> None:
    """Follows the store's tree from its manifest down; every byte range that it names must be there."""
    store = tensorstore.KvStore.open({"driver": "file", "path": f"{item}/"}).result()
    path = item / MANIFEST
    if not path.is_file():
        raise Damage(f"{path} is missing")
    nodes: list[tuple[Path, str | None]] = [(path, None)]
    while nodes:
        path, node = nodes.pop()
        try:
            content = tensorstore.ocdbt.dump(store, node).result()
        except ValueError as error:
            size = path.stat().st_size
            raise Damage(f"{path} is {'damaged' if size else 'empty'} ({_first_line(error)})") from None
        for place in _texts(content):
            kind, folder, name, first, count = PLACE.fullmatch(place).groups()
            path = item / folder / name
            size, end = path.stat().st_size if path.is_file() else -1, int(first) + int(count)
            if size < end:
                there = f"{size:,} of {end:,} bytes or more"
                raise Damage(f"{path} is {'missing' if size < 0 else f'cut off, {there}' if size else 'empty'}")
            if kind != "value":
                nodes.append((path, place))


def _texts(content: Any) -> Iterator[str]:
    """All places in what tensorstore says of a node."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, (list, tuple)):
        for part in content:
            yield from _texts(part)
    elif isinstance(content, str) and PLACE.fullmatch(content):
        yield content


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
