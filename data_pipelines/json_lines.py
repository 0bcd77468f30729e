"""Results, one JSON object a line, in a file that is only ever appended to."""

import json
import os
from pathlib import Path
from typing import Any

from data_pipelines.disk import writing


def read(path: Path) -> list[dict[str, Any]]:
    """All lines, none where there is no file. What a killed writer left of its last is removed. Raises ValueError."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} has a line that is no JSON ({error}); restore it or name another folder.") from error


def append(path: Path, line: dict[str, Any], safe: str) -> None:
    """Adds a line, which is on the disk then. Raises DiskError; safe: what is kept all the same, a sentence."""
    with writing(path, safe), path.open("ab") as file:
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
