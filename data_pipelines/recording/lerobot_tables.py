"""The tables of a LeRobot dataset and the statistics beside them, as the `lerobot` package writes them."""

import json

import numpy as np
import pyarrow as pa

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
VECTORS = ("observation.state", "action")
SCALARS = {
    "timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64", "task_index": "int64",
}  # fmt: skip


def data_schema(width: int) -> pa.Schema:
    """The columns of the data files, with the note by which the `datasets` package knows them again.

    A vector of one number is a plain number there.
    """
    number = {"dtype": "float32", "_type": "Value"}
    vector = number if width == 1 else {"feature": number, "length": width, "_type": "List"}
    features = {name: vector for name in VECTORS}
    features |= {name: {"dtype": dtype, "_type": "Value"} for name, dtype in SCALARS.items()}
    fields = [(name, pa.float32() if width == 1 else pa.list_(pa.float32(), width)) for name in VECTORS]
    fields += [(name, pa.float32() if dtype == "float32" else pa.int64()) for name, dtype in SCALARS.items()]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def data_table(columns: dict[str, np.ndarray]) -> pa.Table:
    """Rows of a data file: VECTORS float32 [T, width], SCALARS [T]."""
    width = columns["action"].shape[1]
    arrays = [
        pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width)
        if name in VECTORS and width > 1
        else pa.array(values.ravel())
        for name, values in columns.items()
    ]
    return pa.Table.from_arrays(arrays, schema=data_schema(width))


def task_table(tasks: list[str]) -> pa.Table:
    """Task numbers, with the instructions as what pandas calls the index."""
    index = "__index_level_0__"
    columns = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
        {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object"},
    ]
    label = {
        "name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object",
        "metadata": {"encoding": "UTF-8"},
    }  # fmt: skip
    pandas = {
        "index_columns": [index],
        "column_indexes": [label],
        "columns": [column | {"metadata": None} for column in columns],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    schema = pa.schema(
        [("task_index", pa.int64()), (index, pa.large_string())], metadata={"pandas": json.dumps(pandas)}
    )
    return pa.table({"task_index": list(range(len(tasks))), index: tasks}, schema=schema)


def vector_stats(rows: np.ndarray) -> dict[str, list]:
    """Statistics over the first axis; a scalar column counts as a vector of one."""
    rows = rows.reshape(len(rows), -1)
    exact = rows.astype(np.float64)
    stats = {
        "min": rows.min(axis=0),
        "max": rows.max(axis=0),
        "mean": exact.mean(axis=0),
        "std": exact.std(axis=0),
        "count": np.array([len(rows)]),
    }
    stats |= dict(zip(QUANTILES, np.quantile(exact, list(QUANTILES.values()), axis=0), strict=True))
    return {name: value.tolist() for name, value in stats.items()}


def image_stats(histogram: np.ndarray, frames: int) -> dict[str, list]:
    """Statistics of pixel values 0..1 per colour, each shaped [3, 1, 1]."""
    levels = np.arange(256) / 255
    share = histogram / histogram.sum(axis=1, keepdims=True)
    mean = share @ levels
    stats = {
        "min": levels[(histogram > 0).argmax(axis=1)],
        "max": levels[255 - (histogram[:, ::-1] > 0).argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ levels**2 - mean**2, 0)),
    }
    below = share.cumsum(axis=1)
    stats |= {name: levels[(below >= q - 1e-12).argmax(axis=1)] for name, q in QUANTILES.items()}
    shaped = {name: value.reshape(3, 1, 1).tolist() for name, value in stats.items()}
    return {**{n: shaped[n] for n in ("min", "max", "mean", "std")}, "count": [frames]} | {
        name: shaped[name] for name in QUANTILES
    }
