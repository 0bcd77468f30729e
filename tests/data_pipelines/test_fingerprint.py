"""What has changed in a mixture; of single datasets, see tests/training/test_resuming.py."""

import pytest

from data_pipelines.fingerprint import Record, changes, pair


def described(name: str, weight: float = 1.0, **more: object) -> Record:
    """A dataset of two episodes, as `describe` and `hold_out` leave it."""
    same = {
        "path": f"data/{name}", "robot": "bot", "fps": 25.0, "cameras": {"cam_high": [8, 8]},
        "texts": ["lift"], "lengths": [3, 4], "instructions": [0, 0], "states": "0" * 16, "actions": "1" * 16,
        "pictures": {"cam_high": "2" * 16}, "hold_out": 1, "held_out": [1],
    }  # fmt: skip
    return {"name": name, "weight": weight} | same | more


BEFORE = [described("a"), described("b", 2.0)]


@pytest.mark.parametrize(
    ("now", "sentences"),
    [
        ([described("a"), described("b", 2.0)], []),
        ([described("a", 0.5), described("b")], []),  # the same shares
        ([described("a", path="moved/a"), described("b", 2.0)], []),
        ([described("b", 2.0), described("a")], ["the datasets are in another order: a, b then, b, a now"]),
        (
            [described("a"), described("b", 3.0)],
            [f"{name} has weight {now:g}, had {then:g}, another share of the mixture"
             for name, now, then in (("a", 1, 1), ("b", 3, 2))],
        ),
        ([described("a")], ["the dataset b is missing"]),
        ([*BEFORE, described("c")], ["the dataset c is new"]),
        ([described("a"), described("b", 2.0, fps=30.0)], ["data/b: its number of rows per second was 25.0, is 30.0"]),
        (
            [described("a", cameras={"cam_high": [9, 9]}), described("b", 2.0)],
            ["data/a: its list of cameras was {'cam_high': [8, 8]}, is {'cam_high': [9, 9]}"],
        ),
        (
            [described("a"), described("b", 2.0, actions="1" * 15 + "3", pictures={"cam_high": "4" * 16})],
            ["data/b: the actions changed in 1 of its 2 episodes, first in episode 1",
             "data/b: the pictures of cam_high changed in 2 of its 2 episodes, first in episode 0"],
        ),
    ],
)  # fmt: skip
def test_a_mixture(now: list[Record], sentences: list[str]) -> None:
    assert changes(BEFORE, now) == sentences


def test_which_dataset_is_which() -> None:
    """By name in a mixture; alone, whatever it is called."""
    assert pair(BEFORE, described("b"), 2) is BEFORE[1] and pair(BEFORE, described("c"), 2) is None
    alone = described("")
    assert pair([alone], described("a"), 1) is alone and pair([alone], described(""), 2) is None
    assert pair([], described("a"), 1) is None and changes([alone], [described("a")]) == []
