"""What the files of a LeRobot dataset say, or the sentence about what they do not: features, tables, listings."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.episodes import DatasetError
from data_pipelines.files import absent, disguised, read_json_lines

INFO = "meta/info.json"
IMAGE_PREFIX = "observation.images."
AGAIN = "copy the dataset again"
TEXT_COLUMNS = ("task", "__index_level_0__")  # what versions of lerobot call the instruction: the index of a table
NAMED = 5  # numbers listed in a sentence

Fields = Mapping[str, type | tuple[type, ...]]
NUMBER = (int, float)


def require(record: Any, fields: Fields, where: object) -> None:
    """Raises DatasetError, beginning with `where`, unless the record has all fields of these kinds."""
    record = record if isinstance(record, dict) else {}
    bad = [name for name, kind in fields.items() if not isinstance(record.get(name), kind)]
    if bad:
        found = ", ".join(f"{name} = {record[name]!r}" if name in record else f"no {name}" for name in bad)
        raise DatasetError(f"{where} lacks {', '.join(bad)} or holds the wrong kind ({found}); {AGAIN}.")


def read_lines(path: Path, fields: Fields) -> list[dict[str, Any]]:
    """A JSON object per line, each with `fields`."""
    records = read_json_lines(path, DatasetError, AGAIN)
    for where, record in records:
        require(record, fields, where)
    return [record for _, record in records]


def numbered(records: list[dict[str, Any]], key: str, path: Path) -> list[dict[str, Any]]:
    """The episodes in the order of `key`, which must count from 0."""
    records = sorted(records, key=lambda record: record[key])
    found = [record[key] for record in records]
    if found == list(range(len(found))):
        return records
    there = set(found)
    missing = [number for number in range(min(max(found) + 1, len(found) + NAMED)) if number not in there]
    twice = sorted({a for a, b in zip(found, found[1:], strict=False) if a == b})
    faults = [f"{what} {_some(numbers)}" for what, numbers in (("lacks", missing), ("repeats", twice)) if numbers]
    raise DatasetError(
        f"{path}: {key} must count from 0 without gaps or repeats; it {' and '.join(faults) or f'has {found[0]}'}. "
        "Where episodes were taken out on purpose, lerobot's own lerobot-edit-dataset (delete_episodes) numbers the "
        "others anew; where they were lost, copy them again."
    )


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:NAMED])) + (", ..." if len(numbers) > NAMED else "")


# ---------------------------------------------------------------- features
def vector(features: dict, keys: Sequence[str], path: Path) -> tuple[str, int, tuple[str, ...]]:
    """Which of `keys` the dataset has, its width, and the names of its numbers, () where there are none."""
    found = [key for key in keys if key in features]
    if len(found) != 1:
        raise DatasetError(
            f"{path}: expected exactly one of the features {' and '.join(keys)}, found {', '.join(features)}."
        )
    require(features[found[0]], {"shape": list}, f"{path}: {found[0]}")
    shape, names = features[found[0]]["shape"], features[found[0]].get("names")
    if len(shape) != 1 or not isinstance(shape[0], int) or shape[0] < 1:
        raise DatasetError(f"{path}: the feature {found[0]} has shape {shape}, expected one axis of numbers.")
    return found[0], shape[0], _names(names, shape[0])


def _names(names: Any, width: int) -> tuple[str, ...]:
    """Names of a vector's numbers; () where info.json names none, or the axis as a whole.

    Names that are too few are those of the first numbers; the others have none.
    """
    # Older versions wrap the list: {"motors": [...]} or [[...]].
    if isinstance(names, dict) and len(names) == 1:
        names = list(names.values())
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], list):
        names = names[0]
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not listed or not (len(names) == width or 1 < len(names) < width):
        return ()
    return (*names, *[""] * (width - len(names)))


def cameras(features: dict, path: Path) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """{camera: (height, width)} of those that can be read, and {camera: why not} of the others.

    A depth map that nobody asks for, or pictures of a kind that is not read, are no fault of the dataset.
    """
    good, bad = {}, {}
    for key, feature in features.items():
        if not key.startswith(IMAGE_PREFIX):
            continue
        camera = key.removeprefix(IMAGE_PREFIX)
        try:
            good[camera] = _size(key, feature, path)
        except DatasetError as error:
            bad[camera] = str(error)
    return good, bad


def _size(key: str, feature: Any, path: Path) -> tuple[int, int]:
    require(feature, {"dtype": str, "shape": list}, f"{path}: {key}")
    names, shape = feature.get("names"), feature["shape"]
    sized = isinstance(names, list) and len(names) == len(shape) and {"height", "width"} <= {*map(str, names)}
    if feature["dtype"] != "video" or not sized or not all(isinstance(n, int) and n > 0 for n in shape):
        raise DatasetError(
            f"{path}: {key} must have dtype 'video' and a shape whose axes are named, among them height and width, "
            f"found dtype {feature['dtype']!r}, shape {shape} and names {names}."
        )
    about = [feature.get(name) or {} for name in ("info", "video_info")]
    if any(of.get(name) for of in about if isinstance(of, dict) for name in ("is_depth_map", "video.is_depth_map")):
        raise DatasetError(f"{path}: {key} is a depth map, which is not read; choose a camera of colours.")
    return shape[names.index("height")], shape[names.index("width")]


# ---------------------------------------------------------------- parquet
@contextmanager
def parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """The open file; complaints of the parquet library become a DatasetError."""
    if not path.is_file():
        raise DatasetError(f"{path} {absent(path)}; {AGAIN}.")
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        found = disguised(path, own=b"PAR1") or f"cannot be read as parquet ({error}); {AGAIN}"
        raise DatasetError(f"{path} {found}.") from error


def read_columns(file: pq.ParquetFile, columns: Sequence[str], path: Path) -> pa.Table:
    """These columns and no other: what else a version of lerobot writes is read past."""
    names = file.schema_arrow.names
    wrong = [name for name in columns if names.count(name) != 1]
    if wrong:
        what = "lacks the column" if wrong[0] not in names else "has more than one column"
        raise DatasetError(f"{path} {what} {', '.join(wrong)}; it has: {', '.join(names)}.")
    return file.read(list(columns)).select(list(columns))


def read_tasks(path: Path) -> list[dict[str, Any]]:
    """Rows of meta/tasks.parquet, {"task_index": number, "task": text}."""
    with parquet(path) as file:
        schema = file.schema_arrow
        text = [name for name in TEXT_COLUMNS if name in schema.names] or [
            field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
        ]
        if "task_index" not in schema.names or len(text) != 1:
            raise DatasetError(
                f"{path}: expected the column task_index and one text column, found {', '.join(schema.names)}."
            )
        tasks = read_columns(file, ["task_index", text[0]], path).to_pylist()
    return [{"task_index": task["task_index"], "task": task[text[0]]} for task in tasks]


def numbers(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """A column of numbers, none missing, [rows]."""
    kind = table.schema.field(name).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)) or table[name].null_count:
        raise DatasetError(f"{path}: every row of {name} must hold a number, as in {INFO}; {AGAIN}.")
    return table[name].to_numpy()


def matrix(table: pa.Table, name: str, width: int, path: Path) -> np.ndarray:
    """A column of fixed or variable lists as float32 [rows, width]; of plain numbers where the width is 1."""
    if width == 1 and not pa.types.is_nested(table.schema.field(name).type):
        return numbers(table, name, path).astype(np.float32)[:, None]
    values = table[name].combine_chunks()
    ragged = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
    if ragged or pa.types.is_fixed_size_list(values.type):
        flat = values.flatten()
        kind = flat.type
        if (
            (pa.types.is_integer(kind) or pa.types.is_floating(kind))
            and not values.null_count + flat.null_count
            and len(flat) == len(table) * width
            and not (ragged and (values.value_lengths().to_numpy() != width).any())
        ):
            return flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(table), width)
    raise DatasetError(f"{path}: every row of {name} must hold {width} numbers, as {INFO} says.")
