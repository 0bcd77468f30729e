"""Which file of a saved checkpoint is damaged, found from what the files say of each other, without reading arrays.

Orbax keeps the arrays of an item in an OCDBT store: a manifest names a tree of nodes, these name byte ranges of data
files. Imports nothing of ours.
"""

import json
import re
from collections.abc import Iterable, Iterator
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


def file_of(item: Path, array: str) -> Path:
    """Where the values of an array, by its path joined with '/', begin; small ones lie in the store's own nodes."""
    found = [path for key, path, _ in _references(item) if key.startswith(f"{_stored(array)}/")]
    return found[0] if found else item


def find_undecodable(item: Path, arrays: Iterable[str]) -> str | None:
    """Reads the arrays of an item one after the other up to the first that cannot be read, and says where it lies."""
    base = {"driver": "file", "path": f"{item}/"}
    for array in arrays:
        store = {"driver": "ocdbt", "base": base, "path": f"{_stored(array)}/"}
        try:
            tensorstore.open({"driver": "zarr", "kvstore": store}).result().read().result()
        except ValueError:
            return f"{file_of(item, array)} cannot be decoded where {array} lies"
    return None


def _stored(array: str) -> str:
    return array.replace("/", ".")


def _check_store(item: Path) -> None:
    """Every byte range that the store names must be there."""
    for _, path, end in _references(item):
        size = path.stat().st_size if path.is_file() else -1
        if size < end:
            there = f"{size:,} of {end:,} bytes or more"
            raise Damage(f"{path} is {'missing' if size < 0 else f'cut off, {there}' if size else 'empty'}")


def _references(item: Path) -> Iterator[tuple[str, Path, int]]:
    """What the store's tree, from its manifest down, says of files: key of a value or "", file, least size."""
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
        for key, place in _places(content):
            kind, folder, name, first, count = PLACE.fullmatch(place).groups()
            path = item / folder / name
            yield key, path, int(first) + int(count)
            if kind != "value":
                nodes.append((path, place))


def _places(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All places in what tensorstore says of a node, with the key that each is for."""
    if isinstance(content, dict):
        key = content["key"].decode() if isinstance(content.get("key"), bytes) else key
        content = list(content.values())
    if isinstance(content, (list, tuple)):
        for part in content:
            yield from _places(part, key)
    elif isinstance(content, str) and PLACE.fullmatch(content):
        yield key, content


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
