"""What a run remembers of its data, and what has changed since then, in words.

Of rows every value counts: they are read for the statistics anyway. Of the files with pictures the size and both ends
count, where a video has its table of frames: another encoding shows, and 80 GB need not be read. Where a dataset lies
does not count, nor what no window shows: other cameras, tasks of no episode.
"""

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.episodes import DatasetError, Episodes
from data_pipelines.readers.subset import Part, origin_of

DIGITS = 8  # of a checksum
ENDS = 16_384  # bytes at the start and the end of a file that tell it from another
EPISODE = ("number of rows", "states", "actions", "instruction")  # what may differ in one
SUMMED = ("states", "actions")  # of which only a checksum is kept

Record = dict[str, Any]
Rows = tuple[int, str, str]  # of an episode: how many, checksums of states and actions


def describe(part: Part, cameras: Sequence[str]) -> Record:
    """A dataset of a mixture, seen by these cameras, JSON-ready; reads all of its rows.

    name, path, robot, fps, weight; cameras {name: [height, width]}; texts: the instructions that an episode has, in
    order. Of each episode: lengths; origins, see `origin_of`; instructions, places in texts; and, one after the other,
    checksums: states and actions, of the values; pictures {camera: of its file and the place in it}.
    Raises DatasetError for damaged rows and files that cannot be read.
    """
    dataset, threads = part.dataset, os.cpu_count() or 1
    # Neighbours share a file, which one thread reads.
    runs = np.array_split(np.arange(len(dataset.lengths)), threads)
    with ThreadPoolExecutor(threads) as pool:
        episodes = chain(*pool.map(lambda run: [_episode(dataset, int(e)) for e in run], runs))
        states, actions, texts = zip(*episodes, strict=True)
        pictures = {camera: _pictures(dataset, camera, pool) for camera in cameras}
    known = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return {
        "name": part.name,
        "path": str(dataset.root),
        "robot": dataset.robot,
        "fps": float(dataset.fps),
        "weight": float(part.weight),
        "cameras": {camera: list(dataset.cameras[camera]) for camera in cameras},
        "pictures": pictures,
        "texts": list(known),
        "lengths": dataset.lengths.tolist(),
        "origins": origin_of(dataset).tolist(),
        "states": "".join(states),
        "actions": "".join(actions),
        "instructions": [known[text] for text in texts],
    }


def _episode(dataset: Episodes, episode: int) -> tuple[str, str, str]:
    """Checksums of states and actions, and the instruction."""
    rows = (dataset.states(episode), dataset.actions(episode))
    states, actions = (f"{zlib.crc32(np.ascontiguousarray(x, '<f4')):0{DIGITS}x}" for x in rows)
    return states, actions, dataset.instruction(episode)


def _pictures(dataset: Episodes, camera: str, pool: ThreadPoolExecutor) -> str:
    places = [dataset.picture_file(episode, camera) for episode in range(len(dataset.lengths))]
    paths = list(dict.fromkeys(path for path, _ in places))
    sums = dict(zip(paths, pool.map(_ends, paths), strict=True))
    return "".join(f"{zlib.crc32(place.encode(), sums[path]):0{DIGITS}x}" for path, place in places)


def _ends(path: Path) -> int:
    """Checksum of a file's size, start and end."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(ENDS)
            file.seek(max(0, size - ENDS))
            return zlib.crc32(start + file.read(ENDS), size)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}); copy the dataset again.") from error


def hold_out(record: Record, count: int, before: Record | None) -> None:
    """Adds to a description which episodes are kept from training, and the count that was asked for.

    They are the last `count` recorded ones, or, of a dataset that was described `before` and asked for as many, the
    same ones as then, found by their rows where they have moved; with an episode, all pieces of the one that was
    recorded. Raises DatasetError where no episode is left to train on.
    """
    origins, total = record["origins"], len(record["lengths"])
    recorded = sorted({*origins})
    last = recorded[max(0, len(recorded) - count) :]
    chosen = [episode for episode, origin in enumerate(origins) if origin in last]
    if before and before["hold_out"] == count:
        then, now = ([episode[:3] for episode in _episodes(x)] for x in (before, record))  # whatever is said to do
        found = {origins[e] for e in (_now(place, then, now) for place in before["held_out"]) if e is not None}
        chosen = [episode for episode, origin in enumerate(origins) if origin in found]
    if len(chosen) >= total:
        raise DatasetError(f"{record['path']}: all {total} episodes are held out of training; begin a new run on it.")
    record |= {"hold_out": count, "held_out": chosen}


def _now(place: int, then: list[Rows], now: list[Rows]) -> int | None:
    """Where an episode is now: in its place, where its rows are, or in its place with other rows than any had."""
    if now[place : place + 1] == [then[place]]:
        return place
    if then[place] in now:
        return now.index(then[place])
    return place if place < len(now) and now[place] not in then else None


def changes(before: Sequence[Record], now: Sequence[Record]) -> list[str]:
    """What is another in the descriptions of a mixture, a sentence each; [] where a run would go on as it began."""
    if len(before) == len(now) == 1:
        return list(_of_dataset(before[0], now[0]))
    old, new = ({record["name"] or record["path"]: record for record in records} for records in (before, now))
    found = [f"the dataset {name} is missing" for name in old if name not in new]
    found += [f"the dataset {name} is new" for name in new if name not in old]
    if not found:
        if list(old) != list(new):
            found.append(f"the datasets are in another order: {', '.join(old)} then, {', '.join(new)} now")
        shares, wanted = _shares(old), _shares(new)
        found += [
            f"{name} has weight {new[name]['weight']:g}, had {old[name]['weight']:g}, another share of the mixture"
            for name in new
            if shares[name] != wanted[name]
        ]
    return found + [line for name in new if name in old for line in _of_dataset(old[name], new[name])]


def pair(before: Sequence[Record], record: Record, count: int) -> Record | None:
    """The description of a dataset among those of a run, out of `count` datasets now."""
    if len(before) == count == 1:
        return before[0]
    return next((old for old in before if old["name"] and old["name"] == record["name"]), None)


def _shares(records: Mapping[str, Record]) -> dict[str, Fraction]:
    total = sum(Fraction(record["weight"]) for record in records.values())
    return {name: Fraction(record["weight"]) / total for name, record in records.items()}


def _of_dataset(before: Record, now: Record) -> Iterator[str]:
    where = now["path"]
    for key, what in (("robot", "robot"), ("fps", "number of rows per second"), ("cameras", "list of cameras")):
        if before[key] != now[key]:
            yield f"{where}: its {what} was {before[key]!r}, is {now[key]!r}"
    yield from (f"{where}: {line}" for line in _of_episodes(before, now))
    if before["hold_out"] != now["hold_out"]:
        yield f"{where}: {before['hold_out']} episodes were held out of training, now {now['hold_out']} are to be"


def _of_episodes(before: Record, now: Record) -> Iterator[str]:
    then, here = _episodes(before), _episodes(now)
    if then != here and sorted(then) == sorted(here):
        first = next(e for e, pair in enumerate(zip(then, here, strict=True)) if pair[0] != pair[1])
        yield f"its episodes are in another order, from episode {first} on"
    elif len(then) != len(here):
        same = next((e for e, (old, new) in enumerate(zip(then, here, strict=False)) if old != new), None)
        which = "the former ones unchanged" if same is None else f"another one from episode {same} on"
        yield f"it has {len(here)} episodes, had {len(then)}; {which}"
    else:
        for place, what in enumerate(EPISODE):
            values = [[episode[place] for episode in episodes] for episodes in (then, here)]
            yield from _differing(what, *values, shown=what not in SUMMED)
        for camera in sorted({*before["pictures"]} & {*now["pictures"]}):
            yield from _differing(f"pictures of {camera}", *(_split(of["pictures"][camera]) for of in (before, now)))


def _differing(what: str, before: Sequence[Any], now: Sequence[Any], shown: bool = False) -> Iterator[str]:
    """Of a value of each episode; shown: the first two that differ."""
    other = [episode for episode, (old, new) in enumerate(zip(before, now, strict=True)) if old != new]
    if other:
        first = other[0]
        values = f" ({before[first]!r} then, {now[first]!r} now)" if shown else ""
        yield f"the {what} changed in {len(other)} of its {len(now)} episodes, first in episode {first}{values}"


def _episodes(record: Record) -> list[tuple[int, str, str, str]]:
    """Of each episode what EPISODE lists, the instruction as text."""
    states, actions = _split(record["states"]), _split(record["actions"])
    texts = [record["texts"][number] for number in record["instructions"]]
    return list(zip(record["lengths"], states, actions, texts, strict=True))


def _split(sums: str) -> list[str]:
    return [sums[i : i + DIGITS] for i in range(0, len(sums), DIGITS)]
