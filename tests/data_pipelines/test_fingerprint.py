"""What has changed in a mixture; of single datasets, see tests/training/test_resuming.py."""

from pathlib import Path

import pytest

from ahawam_jax.training.resuming import accept
from data_pipelines.canvas import CAMERAS
from data_pipelines.episodes import DatasetError
from data_pipelines.fingerprint import Record, changes, describe, hold_out, pair
from data_pipelines.readers.excerpt import Excerpt
from data_pipelines.readers.naming import Gripper, Reading
from data_pipelines.readers.resampled import Resampled
from data_pipelines.readers.robocoin import Mapped, open_robocoin
from data_pipelines.readers.subset import Part
from tests.data_pipelines import synthetic_robocoin as coin


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


# ---------------------------------------------------------------- pieces of recorded episodes, and embodiments
@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = coin.Synthetic(coin.UNSEEN["first_person"], (60, 60, 60), (0, 100), (0, 100))
    return made.write(tmp_path_factory.mktemp("coin") / "set", "distinct")


def seen_as(recorded: Path, said: Reading, pieces: list[tuple[int, int, int]] | None = None) -> Record:
    dataset = Mapped(open_robocoin(recorded), None, "bot", said)
    return describe(Part("", Resampled(Excerpt(dataset, pieces), 15.0) if pieces else dataset), CAMERAS)


PIECES = [(0, 0, 20), (1, 0, 20), (1, 25, 45), (1, 46, 60), (2, 0, 30), (2, 30, 60)]


@pytest.mark.parametrize(("count", "held"), [(0, []), (1, [4, 5]), (2, [1, 2, 3, 4, 5])])
def test_pieces_of_an_episode_are_held_out_together(recorded: Path, count: int, held: list[int]) -> None:
    record = seen_as(recorded, Reading(), PIECES)
    assert record["origins"] == [0, 1, 1, 1, 2, 2]
    hold_out(record, count, None)
    assert record["held_out"] == held
    again = seen_as(recorded, Reading(), PIECES)
    hold_out(again, count, record)
    assert again["held_out"] == held and changes([record], [again]) == []


def test_all_episodes_held_out(recorded: Path) -> None:
    for count in (3, 4):
        with pytest.raises(DatasetError, match="all 6 episodes are held out of training"):
            hold_out(seen_as(recorded, Reading(), PIECES), count, None)


def test_a_piece_that_is_new_goes_with_the_others(recorded: Path) -> None:
    """The held-out episode was in two pieces and now is in three, of which one is as it was."""
    before = seen_as(recorded, Reading(), PIECES)
    hold_out(before, 1, None)
    now = seen_as(recorded, Reading(), [*PIECES[:4], (2, 0, 12), (2, 14, 28), (2, 30, 60)])
    hold_out(now, 1, before)
    assert now["held_out"] == [4, 5, 6]


HUNDRED = Gripper.parse({"closed": 0.0, "open": 100.0}, "test")


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (Reading(gripper=Gripper.parse({"closed": 100.0, "open": 0.0}, "test")), "the states changed in 3 of its 3"),
        (Reading(gripper=Gripper(HUNDRED.state, ((0.0, 90.0),) * 2)), "the actions changed in 3 of its 3 episodes"),
        (
            Reading(gripper=HUNDRED, action={"left_arm_joint_1_rad": 1, "left_arm_joint_2_rad": 0}),
            "the actions changed in 3 of its 3 episodes",
        ),
        (Reading({"cam_high": "cam_ego_rgb"}, gripper=HUNDRED), "its list of cameras was"),
        (
            Reading(dict(zip(CAMERAS, ["cam_ego_rgb", *coin.WRISTS[::-1]], strict=True)), gripper=HUNDRED),
            "the pictures of cam_left_wrist changed in 3 of its 3 episodes",
        ),
    ],
)
def test_a_run_does_not_go_on_with_another_embodiment(recorded: Path, said: Reading, sentence: str) -> None:
    before, now = (seen_as(recorded, reading) for reading in (Reading(gripper=HUNDRED), said))
    for record in (before, now):
        hold_out(record, 0, None)
    assert changes([before], [before]) == []
    with pytest.raises(ValueError) as refused:
        accept(changes([before], [now]), False, 7)
    assert sentence in str(refused.value) and ("states" in sentence) is ("states changed" in str(refused.value))
