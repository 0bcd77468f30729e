"""Every dataset below a folder, each read once: what was found is kept in a file, so that a stopped scan goes on."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import as_completed
from pathlib import Path

import pyarrow as pa

from data_pipelines.disk import writing
from data_pipelines.episodes import DatasetError
from data_pipelines.inspection.findings import Finding, find, state_of_files
from data_pipelines.processes import worker_pool
from data_pipelines.progress import Progress, finish_line
from data_pipelines.readers.base import keep_rows
from data_pipelines.readers.lerobot_files import INFO


def folders(root: Path) -> list[Path]:
    """Every folder at or below `root` that holds a dataset, sorted; links are followed, but nowhere twice."""
    found, seen = [], set()
    for name, below, _ in os.walk(root, followlinks=True):
        folder, real = Path(name), os.path.realpath(name)
        if real in seen or (folder / INFO).is_file():
            below.clear()
        if real not in seen and (folder / INFO).is_file():
            found.append(folder)
        seen.add(real)
        below[:] = [part for part in below if not part.startswith(".")]  # .cache of a download, .git
    if not found:
        raise DatasetError(
            f"{root} {'holds no dataset, no folder below it has' if root.is_dir() else 'is no folder with'} {INFO}; "
            "give the folder that RoboCOIN's repositories were downloaded into."
        )
    return sorted(found)


def scan(root: Path, kept: Path, videos: bool = False) -> list[Finding]:
    """What is found of every dataset below a folder, in the order of their paths.

    kept: file of findings, a JSON line each; what is there of a dataset that has not changed is not read again, what
    is new is added at once. videos: also the header of every video.
    """
    root = root.resolve()
    names = {str(path.relative_to(root)): path for path in folders(root)}
    found: dict[str, Finding] = {}
    keys = {name: state_of_files(path, videos) for name, path in names.items()}
    for record in _read(kept):
        if keys.get(record["finding"]["path"]) == record["key"]:
            found[record["finding"]["path"]] = Finding.from_json(record["finding"])
    left = [name for name in names if name not in found]
    if found:
        print(f"{len(found)} of {len(names)} datasets are as they were when {kept} was written", file=sys.stderr)
    safe = f"What was found until then is in {kept}; the same command goes on from there."
    if left:
        try:
            _scan(names, keys, left, found, kept, videos, safe)
        except KeyboardInterrupt:
            finish_line()
            print(safe, file=sys.stderr)
            raise
    return [found[name] for name in names]


def _scan(
    names: Mapping[str, Path], keys: Mapping[str, str], left: list[str], found: dict[str, Finding], kept: Path,
    videos: bool, safe: str,
) -> None:  # fmt: skip
    """Adds what is left to `found` and to the file."""
    progress = Progress(len(names), "datasets", done=len(found), stream=sys.stderr)
    episodes = broken = 0
    workers = min(os.cpu_count() or 1, len(left))
    with worker_pool(workers, safe, _begin) as pool, writing(kept, safe), kept.open("a") as file:
        if file.tell() and not kept.read_bytes().endswith(b"\n"):  # a line that a killed scan began
            file.write("\n")
        futures = {pool.submit(find, names[name], name, videos): name for name in left}
        for future in as_completed(futures):
            name, finding = futures.pop(future), future.result()
            found[name] = finding
            file.write(json.dumps({"key": keys[name], "finding": finding.to_json()}) + "\n")
            file.flush()
            episodes, broken = episodes + len(finding.lengths), broken + bool(finding.problem)
            progress.add(f"{episodes:,} episodes, {broken} broken", 1)


def _begin() -> None:
    """In each process: the processes share the processors already, and no row is asked for twice."""
    pa.set_cpu_count(1)
    keep_rows(0)


def _read(kept: Path) -> Iterator[dict]:
    """The records of a file of findings; a line that a killed scan did not finish is none."""
    for line in kept.read_bytes().splitlines() if kept.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        yield record
