"""A subset file out of findings: robots, units, what is left out and why, and which are chosen."""

import dataclasses
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.inspection import proposal as module
from data_pipelines.inspection.choosing import SelectError, draw, selection
from data_pipelines.inspection.findings import Finding, Grip
from data_pipelines.inspection.overview import table
from data_pipelines.inspection.proposal import Proposal, propose, slug, to_toml
from data_pipelines.inspection.units import unit_of
from data_pipelines.readers.naming import reading_of
from data_pipelines.readers.subset import Entry, load_subset

SIX = tuple(
    f"{side}_{what}"
    for side in ("left", "right")
    for what in (*(f"arm_joint_{n}_rad" for n in range(1, 7)), "gripper_open_scale")
)
R1, AGIBOT = "galaxea_r1_lite", "ruantong_a2d"  # the table of robots says 0..100 mm, and that it is in doubt


def grips(state: tuple[float, float], action: tuple[float, float] | None = None, scale: float | None = None) -> Any:
    """Both grippers of a dataset, from the least to the greatest."""
    ends = {"state": state, "action": action or state}
    return tuple(
        Grip(side, kind, low, high, low + 0.01 * (high - low), high - 0.01 * (high - low), 0.4 * (high - low), scale)
        for side in ("left", "right")
        for kind, (low, high) in ends.items()
    )


def finding(path: str, robot: str = "bot", minutes: float = 60, **more: Any) -> Finding:
    """A dataset of two arms of six joints with grippers of 0..1."""
    said: dict[str, Any] = {
        "rate": 30.0, "lengths": (round(minutes * 1800),), "names": {"state": SIX, "action": SIX}, "arms": 2,
        "present": {"state": SIX, "action": SIX}, "layout": "two_6dof_arms", "joints": 6, "gripper": True,
        "grippers": grips((0.0, 1.0)),
    }  # fmt: skip
    return Finding(path, robot=robot, **(said | more))


def written(proposal: Proposal, tmp_path: Path) -> dict[str, Entry]:
    out = tmp_path / "subset.toml"
    out.write_text(to_toml(proposal, tmp_path / "coin", out, ["About."]))
    return {entry.name: entry for entry in load_subset(out)}


def excluded(findings: Iterable[Finding]) -> dict[str, tuple[str, str]]:
    return {c.finding.path: (c.reason, c.exclude) for c in propose([*findings]).candidates if c.exclude}


# ---------------------------------------------------------------- units
@pytest.mark.parametrize(
    "ranges, expected",
    [
        ([(0.0, 1.0), (0.02, 0.6)], (0.0, 1.0)),
        ([(0.0, 0.7), (-0.01, 1.08)], (0.0, 1.0)),
        ([(0.0, 9.8), (0.5, 10.4)], (0.0, 10.0)),
        ([(-2.0, 60.0), (0.0, 101.0)], (0.0, 100.0)),
        ([(0.0, 850.0)], (0.0, 1000.0)),
        ([(0.1, 1.3), (0.2, 1.9)], (0.112, 1.883)),  # 1% from either end
        ([(-1.0, 0.0)], (-0.99, -0.01)),
        ([(0.0, 4.0)], (0.04, 3.96)),
    ],
)
def test_a_unit_is_a_power_of_ten_or_what_was_measured(
    ranges: list[tuple[float, float]], expected: tuple[float, float]
) -> None:
    unit = unit_of([finding(f"{k}", grippers=grips(ends)) for k, ends in enumerate(ranges)])
    assert not unit.stated and not unit.odd and not unit.doubt
    for kind in ("state", "action"):
        for span in unit.spans[kind]:
            assert span == pytest.approx(expected, rel=1e-9)


def test_states_actions_and_sides_may_have_units_of_their_own(tmp_path: Path) -> None:
    rows = grips((0.0, 100.0), (0.0, 1.0))
    entries = written(propose([finding("a", grippers=rows)]), tmp_path)
    assert entries["a"].said.gripper.state == ((0.0, 100.0),) * 2
    assert entries["a"].said.gripper.action == ((0.0, 1.0),) * 2
    turned = tuple(
        dataclasses.replace(grip, least=-1.5, greatest=0.5, q01=-1.5, q99=0.5) if grip.side == "right" else grip
        for grip in grips((0.0, 3.0))
    )
    entries = written(propose([finding("a", grippers=turned)]), tmp_path)
    assert entries["a"].said.gripper.state == ((0.03, 2.97), (-1.5, 0.5)) == entries["a"].said.gripper.action


def test_the_recorded_opening_tells_the_direction(tmp_path: Path) -> None:
    found = [finding(str(k), grippers=grips((0.0, 100.0), scale=r)) for k, r in enumerate((-1.0, -0.9, 0.1))]
    entries = written(propose(found), tmp_path)
    assert entries["0"].said.gripper.state == entries["2"].said.gripper.action == ((100.0, 0.0),) * 2
    assert "states and actions fall as the gripper opens" in propose(found).units["bot"].measured


def test_each_side_has_a_direction_of_its_own() -> None:
    """As joints of two arms that mirror each other; a side without a recorded opening goes as the other."""
    rows = tuple(
        dataclasses.replace(grip, scale=-0.9 if grip.side == "right" else 0.9) for grip in grips((0.0, 100.0))
    )
    unit = unit_of([finding("a", grippers=rows)])
    assert unit.spans["state"] == unit.spans["action"] == ((0.0, 100.0), (100.0, 0.0))
    assert "right states and right actions fall as the gripper opens" in unit.measured
    unknown = tuple(dataclasses.replace(grip, scale=None if grip.side == "left" else grip.scale) for grip in rows)
    assert unit_of([finding("a", grippers=unknown)]).spans["state"] == ((100.0, 0.0),) * 2
    assert not unit_of([finding("a", R1, grippers=rows)]).stated


def test_what_the_table_says_is_not_written_unless_it_does_not_fit(tmp_path: Path) -> None:
    fits = propose([finding("a", R1, grippers=grips((0.0, 40.0))), finding("b", R1, grippers=grips((0.0, 99.0)))])
    assert fits.units[R1].stated and "gripper = " not in to_toml(fits, tmp_path, tmp_path / "x.toml", [])
    for ends in ((0.0, 1.0), (0.0, 160.0)):
        other = propose([finding("a", R1, grippers=grips(ends)), finding("b", R1, grippers=grips(ends))])
        assert not other.units[R1].stated
        text = to_toml(other, tmp_path, tmp_path / "x.toml", [])
        assert "the table of robots says { closed = 0.0, open = 100.0 }, which does not fit" in text
        assert written(other, tmp_path)["a"].said.gripper != reading_of(R1).gripper
    falling = unit_of([finding("a", R1, grippers=grips((0.0, 99.0), scale=-1.0))])
    assert falling.spans["state"] == ((100.0, 0.0),) * 2


def test_a_dataset_in_another_unit_is_left_out_with_the_numbers() -> None:
    found = [finding(str(k), grippers=grips((0.0, 10.0))) for k in range(3)]
    out = excluded([*found, finding("odd", grippers=grips((0.0, 1.0))), finding("more", grippers=grips((0.0, 51.0)))])
    assert out.keys() == {"odd", "more"} and {reason for reason, _ in out.values()} == {module.ODD}
    assert "gripper's actions are 0 to 1, in the other datasets of its robot 0 to 10." in out["odd"][1]
    # One that holds it shut, and one that opens it a little, say nothing of the unit.
    assert not excluded([*found, finding("shut", grippers=grips((0.0, 0.04))), finding("x", grippers=grips((0, 2.1)))])
    # What is proposed, statistics take: any two are alike, and each gripper counts by itself.
    out = excluded([*found, finding("a", grippers=grips((0.0, 3.0))), finding("b", grippers=grips((0.0, 45.0)))])
    assert out.keys() == {"b"}
    idle = tuple(g if g.side == "left" else dataclasses.replace(g, greatest=1.0) for g in grips((0.0, 10.0)))
    assert excluded([*found, finding("idle", grippers=idle)]).keys() == {"idle"}
    unit = propose([*found, finding("odd", grippers=grips((0.0, 1000.0)))]).units["bot"]
    assert unit.spans["state"] == ((0.0, 10.0),) * 2 and "in 3 datasets" in unit.measured


def test_most_hours_decide_and_the_common_unit_counts() -> None:
    many = [finding(str(k), minutes=10, grippers=grips((0.0, 1.0))) for k in range(3)]
    assert excluded([*many, finding("long", minutes=40, grippers=grips((0.0, 10.0)))]).keys() == {"0", "1", "2"}
    # 0.6 and 1.9 are alike; less what is recorded closed, 0.5, they are not.
    found = [finding("a", grippers=grips((0.5, 1.9))), finding("b", minutes=50, grippers=grips((0.5, 0.6)))]
    assert excluded(found).keys() == {"b"}


def test_ends_that_are_near_are_one_and_a_gripper_seldom_used_has_some() -> None:
    near = tuple(dataclasses.replace(g, q01=g.q01 + 0.1 * (g.side == "left")) for g in grips((0.2, 2.2)))
    assert unit_of([finding("a", grippers=near)]).spans["state"] == ((0.22, 2.18),) * 2
    seldom = tuple(dataclasses.replace(g, q99=g.q01) for g in grips((0.2, 2.2)))
    assert unit_of([finding("a", grippers=seldom)]).spans["action"] == ((0.2, 2.2),) * 2


def test_a_direction_in_doubt_is_for_the_user_to_say(tmp_path: Path) -> None:
    rows = grips((35.0, 120.0), (0.0, 1.0))
    proposal = propose([finding("a", AGIBOT, grippers=rows), finding("b", AGIBOT, grippers=rows), finding("c")])
    out = {c.name: c.exclude for c in proposal.candidates if c.exclude}
    assert out.keys() == {"a", "b"} and reading_of(AGIBOT).doubtful in out["a"]
    text = to_toml(proposal, tmp_path, tmp_path / "x.toml", [])
    assert f"# [robot.{AGIBOT}]\n# gripper = {{ state = {{ closed = 35.85, open = 119.15 }}" in text
    # Stated, and the line deleted, it is in.
    text = text.replace(f"# [robot.{AGIBOT}]\n# gripper", f"[robot.{AGIBOT}]\ngripper")
    (tmp_path / "x.toml").write_text("\n".join(line for line in text.splitlines() if not line.startswith("exclude")))
    entries = {entry.name: entry for entry in load_subset(tmp_path / "x.toml")}
    assert not entries["a"].exclude and entries["a"].said.gripper.state == ((35.85, 119.15),) * 2


def test_actions_against_states_are_in_doubt_or_odd() -> None:
    against = {"together": {"left": -0.9, "right": -0.95}}
    ((_, (reason, why)),) = excluded([finding("a", **against)]).items()
    assert reason == module.DOUBTFUL and "its actions fall where its states rise" in why
    assert not excluded([finding("a", **against, grippers=grips((0.0, 1.0), scale=0.9))])
    out = excluded([finding("a", **against), *(finding(x, together={"left": 0.9}) for x in "bcd")])
    assert out.keys() == {"a"} and out["a"][0] == module.ODD and "(correlation -0.93)" in out["a"][1]


# ---------------------------------------------------------------- robots, names, what is left out
def test_robots_of_one_type_with_other_numbers_are_apart() -> None:
    seven = {"state": (*SIX, "left_arm_joint_7_rad"), "action": SIX}
    wide = {"state": SIX, "action": (*SIX, "left_arm_joint_7_rad")}
    found = [finding("a", "R 1"), finding("b", "R 1"), finding("c", "R 1", present=seven, joints=7)]
    names = {c.finding.path: c.robot for c in propose(found).candidates}
    assert names == {"a": "R_1-2x6-gripper", "b": "R_1-2x6-gripper", "c": "R_1-2x7-gripper"}
    names = {c.finding.path: c.robot for c in propose([*found, finding("d", "R 1", present=wide)]).candidates}
    assert names["a"] == "R_1-2x6-gripper-1" and names["d"] == "R_1-2x6-gripper-2"
    assert {c.robot for c in propose(found[:2]).candidates} == {"R_1"}
    assert [slug(text) for text in ("a b/c", "..", "Äx", "R1-Lite_2.0")] == ["a_b_c", "unknown", "x", "R1-Lite_2.0"]


def test_every_dataset_has_a_name_of_its_own(tmp_path: Path) -> None:
    found = [finding(path) for path in ("x/fold", "y/fold", "y/a b", "y/a_b", "x__fold", ".")]
    entries = written(propose(found), tmp_path)
    assert entries.keys() >= {"x__fold", "x__fold-2", "y__fold", "dataset"} and len(entries) == 6
    assert {entry.path.resolve() for entry in entries.values()} == {
        (tmp_path / "coin" / one.path).resolve() for one in found
    }


@pytest.mark.parametrize(
    "said, reason, part",
    [
        ({"problem": "gone.", "names": {}, "present": {}}, module.UNREADABLE, "gone."),
        ({"problem": "e.", "broken": (4,)}, module.UNREADABLE, "1 of 1 episodes cannot be read (4): e."),
        ({"unmappable": "two for one.", "present": {}}, module.UNMAPPABLE, "two for one."),
        ({"equal": True}, module.EQUAL, "stand still"),
        ({"crossed": True}, module.CROSSED, "follow the states of the other"),
        ({"misplaced": ("left_x",)}, module.CROSSED, "left_x stand among the joints of the other arm"),
        ({"lengths": (64, 30)}, module.SHORT, "its longest episode has 64 rows, a window of training takes 65"),
        ({"lengths": (100,), "bad": 100}, module.SHORT, "all its rows are marked as bad"),
        ({"videos": ("v.",)}, module.VIDEOS, "v."),
    ],
)
def test_what_is_left_out_stays_in_the_file_with_its_reason(
    said: dict[str, Any], reason: str, part: str, tmp_path: Path
) -> None:
    proposal = propose([finding("good"), finding("b/ad", **said)])
    entries = written(proposal, tmp_path)
    assert not entries["good"].exclude and part in entries["ad"].exclude
    assert entries["ad"].without == said.get("broken", ()) and entries["ad"].said.lead == ("equal" in said)
    lines = [*table(proposal)]
    assert f"left out, {reason}: 1" in lines and f"  ad: {entries['ad'].exclude}" in lines


def test_layout_and_rate_are_those_of_what_is_included(tmp_path: Path) -> None:
    odd = finding("odd", "other", layout="two_arms", rate=10.0)
    both = propose([finding("a"), finding("b", rate=50.0), dataclasses.replace(odd, equal=True)])
    assert both.layout == "two_6dof_arms" and both.rate == 30
    entries = written(both, tmp_path)
    assert {entry.layout for entry in entries.values()} == {"two_6dof_arms"} and entries["a"].rate == 30
    assert propose([finding("a"), odd]).layout == "two_arms" and propose([finding("a"), finding("b")]).rate is None


def test_what_is_no_reason_to_leave_a_dataset_out_is_said(tmp_path: Path) -> None:
    plain = finding("a")
    said = finding("b", off=0.25, bad=12, unnamed={"action": (12, 13)}, absent=("cam_left_wrist",), still=3)
    texts = [to_toml(propose([one]), tmp_path, tmp_path / "x.toml", []) for one in (plain, said)]
    notes = (
        "# Time stamps are up to 0.25 rows off;",
        "# 12 rows are marked as bad; they are left out.",
        "# Of the action's 14 numbers, 12, 13 (from 0) have no name; not used.",
        "# No camera for cam_left_wrist: black.",
        "still_tail = 1.0  # 3 episodes stand still",
    )
    assert [sum(note in text for note in notes) for text in texts] == [0, 5]
    assert "--config.model.action_dim=14" in texts[0]


def test_the_file_is_the_same_whatever_the_order(tmp_path: Path) -> None:
    found = [finding(x, "r.1" if x < "c" else "s") for x in "abcd"]
    texts = {to_toml(propose(order), tmp_path, tmp_path / "x.toml", []) for order in (found, found[::-1])}
    assert len(texts) == 1
    assert tomllib.loads(texts.pop())["robot"].keys() == {"r.1", "s"}
    assert [written(propose(found), tmp_path)[x].weight for x in "ab"] == [1.0, 1.0]


# ---------------------------------------------------------------- choosing
@pytest.mark.parametrize(
    "text, expected",
    [
        ("arms == 2 and gripper and joints==6", True),
        ("not gripper or hands > 0", False),
        ("robot in ('bot', 'other') and 0.9 < hours <= 1", True),
        ("robot not in ['bot']", False),
        ("views >= 1 and -1 < episodes", True),
        ("layout == 'two_6dof_arms'", True),
        ("'fold' in path and rate == 30 and instructions != 1", True),
    ],
)
def test_an_expression_holds(text: str, expected: bool) -> None:
    assert selection(text)(finding("x/fold")) is expected


@pytest.mark.parametrize(
    "text, said",
    [
        ("legs > 2", "a dataset has no legs; it may compare path, robot, arms"),
        ("arms ==", "is no expression"),
        ("__import__('os')", "a dataset has no __import__"),
        ("robot.upper() == 'BOT'", "'robot.upper()' is not understood"),
        ("arms + 1 == 2", "'arms + 1' is not understood"),
        ("gripper and (lambda: 0)", "'lambda: 0' is not understood"),
        ("gripper or robot is None", "'robot is None' is not understood"),
    ],
)
def test_an_expression_that_is_none_is_a_sentence(text: str, said: str) -> None:
    with pytest.raises(SelectError) as error:
        selection(text)
    assert said in str(error.value)


def test_what_cannot_be_compared_is_a_sentence() -> None:
    with pytest.raises(SelectError, match="not supported between instances of 'str' and 'int'"):
        selection("robot > 2")(finding("a"))


def test_hours_are_drawn_of_every_robot_in_its_share() -> None:
    found = [finding(f"{robot}{k}", robot, 20 + 7 * k % 31) for robot, many in (("a", 60), ("b", 30), ("c", 10))
             for k in range(many)]  # fmt: skip
    everything = propose([*found, finding("bad", "a", equal=True)])
    drawn = draw(everything, 12.0, seed=0)
    hours = {robot: 0.0 for robot in "abc"}
    whole = dict(hours)
    for of, proposal in ((hours, drawn), (whole, everything)):
        for candidate in proposal.included:
            of[candidate.robot] += candidate.finding.hours
    assert sum(hours.values()) == pytest.approx(12, rel=0.01)
    for robot in "abc":  # within the longest dataset, 50 minutes
        assert abs(hours[robot] - 12 * whole[robot] / sum(whole.values())) < 50 / 60
    assert drawn == draw(everything, 12.0, seed=0) != draw(everything, 12.0, seed=1)
    assert [c.name for c in drawn.candidates if c.exclude] == ["bad"]
    assert draw(everything, 1e6, seed=0) == everything
    three = propose([finding(x) for x in "abc"])  # an hour each: the nearest number of them
    assert [len(draw(three, hours, 0).included) for hours in (0.6, 1.4, 1.6, 3.0)] == [1, 1, 2, 3]


def test_the_table_has_a_line_for_each_robot_and_the_totals() -> None:
    found = [finding("a", "x", bad=7), finding("b", "y", grippers=grips((0.0, 50.0)), rate=15.0), finding("c", "y")]
    head, _, x, y, _, total, *_ = table(propose([*found, finding("d", "y", equal=True)]))
    assert head.split()[:6] == ["robot", "datasets", "out", "episodes", "hours", "rows/s"]
    assert x.split() == "x 1 0 1 1.0 30 14 3 0 to 1 0.01 to 0.99 7 0".split()
    assert y.split()[:5] == "y 1 2 1 2.0".split() and total.split()[:6] == "all 2 2 2 3.0 15/30".split()
