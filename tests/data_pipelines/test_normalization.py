"""Every number by its own rule: what comes back of it, what a cut takes, and that a run says so."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipelines.episodes import DatasetError
from data_pipelines.normalization import (
    RELEASED,
    RULES,
    STD_FLOOR,
    Normalization,
    choose,
    denormalize,
    describe,
    losses,
    normalize,
    recoverable,
)
from data_pipelines.statistics import (
    NAMES,
    Partial,
    compute_by_robot,
    compute_statistics,
    describe_losses,
    load_statistics,
    pick_robot,
    save_statistics,
    to_lists,
)

JOINTS = ("waist", "elbow", "gripper")


def stats_of(rows: np.ndarray, rules: str = "", clip: float = 5.0) -> dict[str, np.ndarray]:
    """Statistics of rows [n, d] normalised by `rules`."""
    how = Normalization(action=rules, clip=clip)
    return Partial.of(rows, len(rows)).finish() | how.of("action", JOINTS[: rows.shape[1]], rows.shape[1])


def command(share: int, rows: int = 500) -> np.ndarray:
    """A gripper that closes in `share` of its rows, float32 [rows, 1]."""
    x = np.zeros((rows, 1), np.float32)
    x[100 : 100 + share] = 1
    return x


def told(kind: str, names: tuple[str, ...], stats: dict[str, np.ndarray], rows: np.ndarray) -> list[str]:
    """What is said of these rows."""
    ends = np.stack([rows.min(0), rows.max(0)])
    return list(losses(kind, names, stats, ends, (rows != recoverable(rows, stats)).mean(0)))


def back(x: np.ndarray, stats: dict[str, np.ndarray]) -> np.ndarray:
    return denormalize(normalize(x, stats), stats)


# ---------------------------------------------------------------- values
def test_the_release_s_z_score_bit_for_bit() -> None:
    rows = np.random.default_rng(0).normal(3, [0.1, 1e-5, 40], (900, 3)).astype(np.float32)
    stats = stats_of(rows)
    expected = np.clip((rows - stats["mean"]) / np.maximum(stats["std"], 1e-3), -5, 5).astype(np.float32)
    np.testing.assert_array_equal(normalize(rows, stats), expected)
    np.testing.assert_array_equal(
        denormalize(expected, stats), (expected * np.maximum(stats["std"], 1e-3) + stats["mean"]).astype(np.float32)
    )
    assert normalize(rows, stats).dtype == denormalize(expected, stats).dtype == np.float32
    far = normalize(np.array([[1e6, -1e6, 0]]), stats)
    assert far[0, :2].tolist() == [5, -5]


@pytest.mark.parametrize("share", [1, 6, 19, 20, 250])
def test_a_two_valued_command(share: int) -> None:
    """It survives a z-score cut at 5 from one row in 26 on, min-max always."""
    rows = command(share)
    closed = back(rows, stats_of(rows))[:, 0].max()
    assert (closed == pytest.approx(1, abs=1e-6)) == (share / 500 > 1 / 26)
    if share == 6:
        assert closed == pytest.approx(0.5564, abs=1e-4)
    stats = stats_of(rows, "min-max")
    np.testing.assert_array_equal(np.unique(normalize(rows, stats)), [-1, 1])
    np.testing.assert_array_equal(back(rows, stats), rows)
    np.testing.assert_allclose(back(rows, stats_of(rows, clip=0)), rows, atol=1e-6)  # float32 of z = 22


def test_a_quantile_that_holds_one_value_alone_is_no_way_out() -> None:
    """Where a command has less than 1% of the rows, q99 does not see it: the loss is told, not hidden."""
    rows = command(4)
    stats = stats_of(rows, "quantile")
    assert back(rows, stats).max() == pytest.approx(5 * STD_FLOOR)
    (sentence,) = told("action", ("gripper",), stats, rows)
    assert "in 0.8% of the rows, where 1 comes back as 0.005" in sentence
    assert back(command(6), stats_of(command(6), "quantile")).max() == pytest.approx(1)


@pytest.mark.parametrize("rule", RULES)
def test_a_number_that_never_changes(rule: str) -> None:
    """0.1 comes back as 0.1, and a reading beside it stays small."""
    rows = np.full((300, 1), 0.1, np.float32)
    stats = stats_of(rows, rule)
    assert (normalize(rows, stats) == 0).all() and (back(rows, stats) == np.float32(0.1)).all()
    assert normalize(rows + 1e-3, stats).max() == pytest.approx(1, rel=1e-4) and normalize(rows + 1, stats).max() == 5
    assert told("action", (), stats, rows) == []


def test_small_numbers() -> None:
    """Below the floor a z-score keeps too little; min-max spreads what there is."""
    rows = np.linspace(-2e-4, 2e-4, 101, dtype=np.float32)[:, None]
    assert np.abs(normalize(rows, stats_of(rows))).max() == pytest.approx(0.2)
    assert np.abs(normalize(rows, stats_of(rows, "min-max"))).max() == 1
    (sentence,) = told("state", JOINTS, stats_of(rows), rows)
    assert "less than the 0.001 that a z-score divides by" in sentence and "0 (waist) by 0.00012" in sentence
    assert '--config.data.normalization.state="waist=min-max"' in sentence
    assert told("state", JOINTS, stats_of(rows, "min-max"), rows) == []
    still = np.array([0.7, np.nextafter(np.float32(0.7), np.float32(1))] * 50, np.float32)[:, None]
    assert told("state", JOINTS, stats_of(still), still) == []  # rounding is no signal
    solver = np.stack([np.linspace(-1e-8, 1e-8, 100), np.linspace(-1, 1, 100)], 1).astype(np.float32)
    assert told("action", (), stats_of(solver), solver) == []  # nor is what a solver leaves of a joint at rest


def test_spans_and_mixed_rules() -> None:
    rows = np.random.default_rng(1).normal([1, 20, -3], [1, 5, 0.2], (1000, 3)).astype(np.float32)
    stats = stats_of(rows, "elbow=min-max, 2=quantile")
    assert stats["normalization"].tolist() == ["z-score", "min-max", "quantile"]
    z, alone = normalize(rows, stats), stats_of(rows)
    np.testing.assert_array_equal(z[:, 0], normalize(rows, alone)[:, 0])
    assert (z[:, 1].min(), z[:, 1].max()) == (-1, 1)
    ends = normalize(np.stack([stats["q01"], stats["q99"]]), stats)[:, 2]
    np.testing.assert_allclose(ends, [-1, 1], rtol=1e-6)
    assert np.mean(np.abs(z[:, 2]) > 1) == pytest.approx(0.02, abs=1e-3)
    np.testing.assert_allclose(back(rows, stats), rows, rtol=1e-5, atol=1e-6)
    assert back(rows, stats_of(rows, clip=1.5))[:, 0].max() == pytest.approx(alone["mean"][0] + 1.5 * alone["std"][0])


# ---------------------------------------------------------------- the choice
@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("", "zzz"), ("z-score", "zzz"), ("min-max", "mmm"), ("gripper=min-max", "zzm"), ("2=min-max", "zzm"),
        (" quantile ,waist = z-score,", "zqq"), ("waist=quantile, 1=min-max", "qmz"),
        ("2=min-max,gripper=min-max", "zzm"),
    ],
)  # fmt: skip
def test_rules_as_they_are_written(text: str, rules: str) -> None:
    assert "".join(rule[0] for rule in choose(text, "action", JOINTS, 3)) == rules


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("minmax", "config.data.normalization.action asks for 'minmax'; expected one of z-score, min-max, quantile"),
        ("gripper=", "asks for ''"),
        ("hand=min-max", "names 'hand'; the numbers of the action are 0 to 2, waist, elbow, gripper"),
        ("3=min-max", "names '3'"),
        ("-1=min-max", "names '-1'"),
        ("min-max, quantile", "gives all numbers the rules min-max and quantile"),
        ("gripper=min-max, 2=quantile", "gives '2' two rules, min-max and quantile"),
    ],
)
def test_rules_that_do_not_fit_are_sentences(text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        choose(text, "action", JOINTS, 3)


def test_numbers_without_names_and_a_clip_without_sense() -> None:
    with pytest.raises(DatasetError, match="0 to 2, which have no names"):
        choose("gripper=min-max", "action", (), 3)
    with pytest.raises(DatasetError, match="names 'joint', which 2 numbers are called; give places"):
        choose("joint=min-max", "action", ("joint", "hand", "joint"), 3)
    stats = stats_of(command(1)) | RELEASED.of("action", (), 1)
    (sentence,) = told("action", ("a,b",), stats, command(1))
    assert '"0=min-max"' in sentence
    for clip in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="config.data.clip is .*; expected a number above 0, or 0"):
            Normalization(clip=clip)


# ---------------------------------------------------------------- files and records
def statistics_of(rules: str = "gripper=min-max", clip: float = 7.0) -> dict:
    rows = np.random.default_rng(2).normal(size=(50, 3)).astype(np.float32)
    return {kind: Partial.of(rows, 50).finish() | Normalization(state="quantile", action=rules, clip=clip)
            .of(kind, JOINTS, 3) for kind in ("state", "action")}  # fmt: skip


def assert_same(found: dict, expected: dict) -> None:
    for kind, values in expected.items():
        assert found[kind].keys() == values.keys()
        for name, x in values.items():
            np.testing.assert_array_equal(found[kind][name], x)


def test_round_trip_of_the_release_s_file(tmp_path: Path) -> None:
    stats, path = statistics_of(), tmp_path / "dataset_stats.json"
    save_statistics(stats, path)
    assert_same(load_statistics(path), stats)
    content = json.loads(path.read_text())
    assert content["action"]["default"]["normalization"] == ["z-score", "z-score", "min-max"]
    assert content["action"]["default"]["clip"] == [7.0] * 3
    assert_same(pick_robot(json.loads(json.dumps(to_lists({"a": stats}))), "a"), stats)


def test_what_does_not_say_is_as_released(tmp_path: Path) -> None:
    """A release's file with a field per arm, one of them ours; and a record without it."""
    stats, path = statistics_of(), tmp_path / "dataset_stats.json"
    save_statistics(stats, path)
    content = json.loads(path.read_text())
    ours = content["action"]["default"]
    release = {name: x for name, x in ours.items() if name.startswith("global_")}
    content["action"] = {"left": release, "right": ours}
    path.write_text(json.dumps(content))
    found = load_statistics(path)["action"]
    assert found["normalization"].tolist() == ["z-score"] * 5 + ["min-max"]
    assert found["clip"].tolist() == [5] * 3 + [7] * 3
    record = to_lists({"": {kind: {name: x[name] for name in NAMES} for kind, x in stats.items()}})
    assert_same(pick_robot(record, None), {kind: x | RELEASED.of(kind, (), 3) for kind, x in stats.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalization": ["z-score", "min-max", "median"]}, "must normalise every number of the action by z-score"),
        ({"clip": [5.0, -5.0, 5.0]}, "cut at 0 or more"),
        ({"clip": [5.0, 5.0]}, "differing lengths"),
        ({"clip": [5.0, float("nan"), 5.0]}, "not finite"),
    ],
)
def test_files_that_were_changed_by_hand(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "dataset_stats.json"
    save_statistics(statistics_of(), path)
    content = json.loads(path.read_text())
    content["action"]["default"] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=message):
        load_statistics(path)


# ---------------------------------------------------------------- what a run says
def recording(robot: str, *actions: np.ndarray) -> SimpleNamespace:
    """Episodes of three numbers, without pictures."""
    states = [np.cos(np.arange(len(x))[:, None] + [1, 2, 3]) for x in actions]
    return SimpleNamespace(
        root=Path(robot), robot=robot, lengths=np.array([len(x) for x in actions]), state_dim=3, action_dim=3,
        state_names=JOINTS, action_names=JOINTS, state_present=np.ones(3, bool), action_present=np.ones(3, bool),
        states=states.__getitem__, actions=actions.__getitem__,
    )  # fmt: skip


def episode(share: int) -> np.ndarray:
    moving = np.sin(np.arange(500)[:, None] + np.array([0, 1]))
    return np.concatenate([moving, command(share)], 1).astype(np.float32)


def test_a_run_says_what_it_loses_and_how_to_keep_it() -> None:
    datasets = [recording("piper", episode(6), episode(6)), recording("piper", episode(9))]
    datasets.append(recording("other", episode(99)))
    stats = compute_by_robot(datasets)
    (sentence,) = describe_losses(datasets, stats)
    closed = back(episode(6), stats["piper"]["action"])[:, 2].max()
    assert sentence.startswith("robot 'piper': Normalised, the action is cut at 5: 2 (gripper) in 1.4% of the rows")
    assert f"where 1 comes back as {closed:.4g}, {1 - closed:.3g} off" in sentence
    assert '--config.data.normalization.action="gripper=min-max"' in sentence and "--config.data.clip" in sentence
    for kept in (Normalization(action="gripper=min-max"), Normalization(clip=0), Normalization(clip=20)):
        assert list(describe_losses(datasets, compute_by_robot(datasets, kept))) == []
    (sentence,) = describe_losses([recording("piper", 10 * episode(99))], {"piper": stats["other"]})
    assert "2 (gripper) in 20% of the rows, where 10 comes back as" in sentence  # rows the statistics have not seen
    with pytest.raises(DatasetError, match="names 'hand'"):
        compute_statistics(datasets[0], Normalization(state="hand=min-max"))


def test_the_longest_losses_come_first_and_long_lists_are_cut() -> None:
    rows = np.zeros((2000, 8), np.float32)
    for d in range(8):
        rows[: 1 + 5 * d, d] = 1
    stats = Partial.of(rows, 2000).finish() | RELEASED.of("action", (), 8)
    (sentence,) = told("action", (), stats, rows)
    assert sentence.index("dimension 0 in 0.05%") < sentence.index("dimension 5 in 1.3%")
    assert "dimension 6" not in sentence and "; and 2 more." in sentence and "7=min-max" in sentence


def test_described_in_words() -> None:
    assert describe(statistics_of()) == (
        "state quantile cut at 7, action z-score cut at 7 but 2 min-max"
    )
    assert describe(statistics_of("z-score", 0)) == "state quantile not cut, action z-score not cut"
