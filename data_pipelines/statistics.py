"""Per-dimension statistics of states and actions, and the z-score built on them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_pipelines.lerobot import DatasetError, LeRobotDataset

FILE_NAME = "dataset_stats.json"
NAMES = ("mean", "std", "min", "max", "q01", "q99")
# A joint that never moves has std near 0; dividing by it would blow sensor noise up to huge inputs.
STD_FLOOR = 1e-3

Statistics = dict[str, dict[str, np.ndarray]]


def compute_statistics(dataset: LeRobotDataset) -> Statistics:
    """{"state": s, "action": a}, each with mean, std, min, max, q01, q99 as float64 [d], from parquet alone.

    Every row of every episode counts once; units are those of the recording.
    """
    episodes = range(len(dataset.lengths))
    return {
        "state": _describe(np.concatenate([dataset.states(e) for e in episodes])),
        "action": _describe(np.concatenate([dataset.actions(e) for e in episodes])),
    }


def save_statistics(stats: Statistics, folder: str | Path) -> Path:
    """Writes `dataset_stats.json` into the folder and returns its path."""
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = {key: {name: values.tolist() for name, values in stats[key].items()} for key in ("state", "action")}
    path.write_text(json.dumps(lists, indent=1) + "\n")
    return path


def load_statistics(folder: str | Path) -> Statistics:
    """Reads what `save_statistics` wrote; the values come back exactly."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise DatasetError(f"{path} does not exist; compute it from the training data with compute_statistics.")
    try:
        lists = json.loads(path.read_text())
        return {key: {name: np.array(lists[key][name], np.float64) for name in NAMES} for key in ("state", "action")}
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{path} must hold {', '.join(NAMES)} for state and action ({error!r}); compute it again."
        ) from error


def normalize(x: np.ndarray, stats: Mapping[str, np.ndarray]) -> np.ndarray:
    """z-score of x [..., d] by stats["mean"], stats["std"] [d]; float32, unitless."""
    return ((x - stats["mean"]) / np.maximum(stats["std"], STD_FLOOR)).astype(np.float32)


def denormalize(x: np.ndarray, stats: Mapping[str, np.ndarray]) -> np.ndarray:
    """Inverse of `normalize`: [..., d] unitless -> float32 [..., d] in the units of the recording."""
    return (x * np.maximum(stats["std"], STD_FLOOR) + stats["mean"]).astype(np.float32)


def _describe(rows: np.ndarray) -> dict[str, np.ndarray]:
    low, high = np.quantile(rows, [0.01, 0.99], axis=0).astype(np.float64)
    values = (
        rows.mean(0, dtype=np.float64),
        rows.std(0, dtype=np.float64),
        rows.min(0),
        rows.max(0),
        low,
        high,
    )
    return {name: value.astype(np.float64) for name, value in zip(NAMES, values, strict=True)}
