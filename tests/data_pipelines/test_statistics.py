"""Statistics at scale: partial results merge exactly, per robot, and without opening a video."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.episodes import DatasetError
from data_pipelines.normalization import RULES, Normalization, denormalize, normalize
from data_pipelines.readers.lerobot import open_lerobot
from data_pipelines.statistics import (
    BATCH_ROWS,
    NAMES,
    Partial,
    _batches,
    compute_by_robot,
    compute_statistics,
    load_by_robot,
    save_by_robot,
)
from tests.data_pipelines import tiny_dataset as tiny


def expected(rows: np.ndarray) -> dict[str, np.ndarray]:
    rows = rows.astype(np.float64)
    values = (rows.mean(0), rows.std(0), rows.min(0), rows.max(0), *np.quantile(rows, [0.01, 0.99], axis=0))
    return dict(zip(NAMES, values, strict=True))


def assert_exact(found: dict[str, np.ndarray], rows: np.ndarray) -> None:
    """Mean and std to 1e-12 of what they measure, all else to the bit."""
    for name, values in expected(rows).items():
        assert found[name].dtype == np.float64
        if name in ("mean", "std"):
            np.testing.assert_allclose(found[name], values, rtol=1e-12, atol=1e-12 * rows.std(), err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], values, err_msg=name)


def sample(count: int) -> np.ndarray:
    """Rows [count, 5]: noise, drift, far off zero, heavy tails, few distinct values."""
    rng = np.random.default_rng(count)
    noise = rng.normal(size=(5, count))
    columns = (noise[0], np.arange(count) + noise[1], 1e4 + noise[2], noise[3] ** 5, noise[4].round())
    return np.stack(columns, 1).astype(np.float32)


# ---------------------------------------------------------------- merging
@pytest.mark.parametrize("seed", range(5))
def test_any_grouping_and_order_gives_the_same(seed: int) -> None:
    rng, rows = np.random.default_rng(seed), sample(5_000)
    cuts = np.sort(rng.choice(np.arange(1, len(rows)), 30, replace=False))
    parts = [Partial.of(part, len(rows)) for part in np.split(rows, cuts)]
    while len(parts) > 1:  # two at random, until one is left
        one, other = (parts.pop(rng.integers(len(parts))) for _ in range(2))
        parts.append(one.merge(other))
    assert_exact(parts[0].finish(), rows)


def test_quantiles_of_every_number_of_rows() -> None:
    """Also where q (n - 1) is a whole number, up to rounding, the tails must be long enough."""
    values = np.random.default_rng(0).normal(size=1_302).astype(np.float32)
    for count in [*range(1, 1_302), 30_001, 100_001]:
        rows = (values[:count] if count < 2_000 else np.resize(values, count))[:, None]
        found = Partial.of(rows, count).finish()
        low, high = np.quantile(rows.astype(np.float64), [0.01, 0.99], axis=0)
        assert (found["q01"], found["q99"]) == (low, high), count


def test_tails_stay_short() -> None:
    rows = sample(10_000)
    merged = Partial.of(rows[:6_000], 10_000).merge(Partial.of(rows[6_000:], 10_000))
    assert merged.low.shape == merged.high.shape == (5, 101)


def test_a_joint_that_never_moves_has_no_deviation() -> None:
    rows = np.full((3_000, 2), 0.1, np.float32)
    merged = Partial.of(rows[:1_000], 3_000).merge(Partial.of(rows[1_000:], 3_000)).finish()
    assert (merged["std"] == 0).all() and (merged["mean"] == np.float32(0.1)).all()


def test_partials_of_different_totals_or_with_rows_missing() -> None:
    with pytest.raises(ValueError, match="out of 10 and 11 rows do not merge"):
        Partial.of(sample(10), 10).merge(Partial.of(sample(1), 11))
    with pytest.raises(ValueError, match="of 11 rows have seen 10"):
        Partial.of(sample(10), 11).finish()


def test_batches_hold_each_episode_once() -> None:
    lengths = np.array([1, BATCH_ROWS - 1, 5, 3 * BATCH_ROWS, 7, 2])
    batches = _batches(lengths)
    assert [e for batch in batches for e in batch] == list(range(6))
    assert [list(batch) for batch in batches] == [[0, 1], [2, 3], [4, 5]]


# ---------------------------------------------------------------- datasets
@pytest.fixture(scope="module", params=["v2.1", "v3.0"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("tiny"), request.param)


def rows_of(root: Path, what: str) -> np.ndarray:
    dataset = open_lerobot(root)
    return np.concatenate([getattr(dataset, what)(e) for e in range(len(dataset.lengths))])


def test_of_a_dataset_in_many_batches(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with the videos gone."""
    without = shutil.copytree(root, tmp_path / "set", ignore=shutil.ignore_patterns("*.mp4"))
    for batch_rows in (1, 50, 10_000):
        monkeypatch.setattr("data_pipelines.statistics.BATCH_ROWS", batch_rows)
        stats = compute_statistics(open_lerobot(without))
        assert_exact(stats["state"], rows_of(root, "states"))
        assert_exact(stats["action"], rows_of(root, "actions"))


def test_of_a_robot_over_its_datasets(root: Path, tmp_path: Path) -> None:
    other = shutil.copytree(root, tmp_path / "other")
    alone = shutil.copytree(root, tmp_path / "alone")
    tiny.change_info(alone, robot_type="lonely")
    stats = compute_by_robot(open_lerobot(path) for path in (root, other, alone))
    assert stats.keys() == {"tiny", "lonely"}
    assert_exact(stats["tiny"]["state"], np.concatenate([rows_of(root, "states")] * 2))
    assert_exact(stats["lonely"]["action"], rows_of(root, "actions"))
    save_by_robot(stats, tmp_path / "stats")
    again = load_by_robot(tmp_path / "stats")
    assert again.keys() == stats.keys()
    for robot, key, name in ((r, k, n) for r in stats for k in ("state", "action") for n in NAMES):
        np.testing.assert_array_equal(again[robot][key][name], stats[robot][key][name])


def test_datasets_of_one_robot_must_mean_the_same(root: Path, tmp_path: Path) -> None:
    other = shutil.copytree(root, tmp_path / "other")
    path = other / "meta/info.json"
    path.write_text(path.read_text().replace('"waist"', '"hip"'))
    with pytest.raises(DatasetError, match="both of the robot 'tiny', but their states or actions differ"):
        compute_by_robot([open_lerobot(root), open_lerobot(other)])


# ---------------------------------------------------------------- mapped datasets
class Grippers:
    """Two numbers of a layout, a gripper among them, and one that the robot lacks."""

    robot, state_dim, action_dim, instructions = "bot", 3, 3, ["lift"]
    state_names = action_names = ("left_arm_joint_1_rad", "left_gripper_open_scale", "right_gripper_open_scale")
    state_present = action_present = np.array([True, True, False])

    def __init__(self, root: str, low: float, high: float, rows: int = 50) -> None:
        self.root, self.lengths, self.starts = Path(root), np.array([rows, rows]), np.array([0, rows])
        way = np.linspace(low, high, rows)
        self._rows = np.stack([np.sin(way), way, 0 * way], 1).astype(np.float32)

    def states(self, episode: int) -> np.ndarray:
        return np.clip(self._rows, -1, 1)  # the states of all are alike

    def actions(self, episode: int) -> np.ndarray:
        return self._rows if episode else self._rows[:1].repeat(len(self._rows), 0)  # the first stands still


def test_grippers_of_one_robot_in_two_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.statistics.BATCH_ROWS", 50)  # an episode each
    datasets = [Grippers("a", 0, 1), Grippers("b", -0.1, 0.9), Grippers("c", 0, 100)]
    with pytest.raises(DatasetError) as stopped:
        compute_by_robot(datasets)
    assert str(stopped.value).startswith(
        "The robot 'bot' has its left_gripper_open_scale (action) from -0.1 to 0.9 in b and from 0 to 100 in c, which "
        "cannot be one unit: their statistics would fit neither. In the subset file, write what one of them records "
        "of a closed and of an open gripper, "
        "as in gripper = { closed = 0.0, open = 100.0 }, leave it out by exclude = "
    )
    compute_by_robot(datasets[:2])
    idle = Grippers("idle", 0, 1, rows=1000)  # of a task for the other arm
    idle._rows[:, 1] = np.random.default_rng(0).normal(0.03, 0.005, 1000)
    compute_by_robot([datasets[0], idle])
    compute_by_robot([datasets[0], Grippers("d", 0, 4.9), Grippers("still", 100, 100.9)])
    with pytest.raises(DatasetError, match="from 0 to 0.19 in mm"):
        compute_by_robot([datasets[0], Grippers("mm", 0, 0.19)])
    datasets[2].robot = "other"
    compute_by_robot(datasets)


@pytest.mark.parametrize("rule", RULES)
def test_numbers_that_a_robot_lacks_stay_zero(rule: str) -> None:
    stats = compute_by_robot([Grippers("a", 0.2, 1), Grippers("b", 0.3, 1)], Normalization(rule, rule))["bot"]
    rows = np.concatenate([Grippers("a", 0.2, 1).actions(1), Grippers("b", 0.3, 1).actions(1)])
    for kind in ("state", "action"):
        assert all(stats[kind][name][2] == 0 for name in NAMES)
        normalized = normalize(rows, stats[kind])
        assert (normalized[:, 2] == 0).all() and (normalized[:, :2] != 0).any(0).all()
        back = denormalize(normalized, stats[kind])
        assert (back[:, 2] == 0).all()
        np.testing.assert_allclose(back, rows, atol=1e-6)  # float32 of numbers about 1


def test_statistics_by_robot_need_names_and_files(root: Path, tmp_path: Path) -> None:
    stats = compute_statistics(open_lerobot(root))
    for name in ("", "..", "../arm", "."):
        with pytest.raises(DatasetError, match="cannot name a folder"):
            save_by_robot({name: stats}, tmp_path / "stats")
    with pytest.raises(DatasetError, match="holds no <robot>/dataset_stats.json"):
        load_by_robot(tmp_path)
