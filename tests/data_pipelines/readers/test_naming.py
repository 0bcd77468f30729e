"""What numbers and cameras are called, and what is never guessed."""

from collections.abc import Sequence

import numpy as np
import pytest

from data_pipelines.episodes import DatasetError
from data_pipelines.readers.layouts import LAYOUTS, default_layout
from data_pipelines.readers.naming import (
    AS_NAMED,
    SIDES,
    Gripper,
    Reading,
    UnmappableError,
    find_cameras,
    number_of,
    reading_of,
)

SIX, ALL = LAYOUTS["two_6dof_arms"], LAYOUTS["two_arms"]
GRIPPERS = dict(zip(SIDES, AS_NAMED.state, strict=True))
WRISTS = ["cam_left_wrist_rgb", "cam_right_wrist_rgb"]
RECORDED = tuple(name.replace("_scale", "") for name in SIX.names)


def places(names: Sequence[str], layout=ALL, **said: str | int) -> list[int]:
    return list(layout.vector(names, said, GRIPPERS, "set (robot 'bot'): the state").places)


# ---------------------------------------------------------------- numbers
def test_layouts_and_units() -> None:
    assert len(SIX.names) == 14 and len(ALL.names) == 16
    assert SIX.names[0] == "left_arm_joint_1_rad" and SIX.names[6] == "left_gripper_open_scale"
    assert ALL.names[8] == "right_arm_joint_1_rad" and ALL.names[15] == "right_gripper_open_scale"
    assert SIX.units == ("rad",) * 6 + ("0 closed .. 1 open",) + ("rad",) * 6 + ("0 closed .. 1 open",)


def test_what_is_no_number_of_a_layout() -> None:
    names = ("left_arm_joint_1_vel_rad_s", "left_hand_joint_1_rad", "left_eef_pos_x_m", "gripper_open", "", "robot")
    assert [number_of(name) for name in names] == [""] * len(names)


def test_any_order_and_what_lies_between() -> None:
    names = ("waist_yaw_rad", *RECORDED[::-1], "left_hand_joint_1_rad")
    assert places(names, SIX) == list(range(14, 0, -1))
    assert places(names)[6] == -1 and places(names)[14] == -1


def test_arms_of_one_side() -> None:
    vector = ALL.vector(RECORDED[7:], {}, GRIPPERS, "set: the state")
    assert vector.present.tolist() == [False] * 8 + [True] * 6 + [False, True]
    np.testing.assert_array_equal(vector.to_layout(np.arange(7))[8:], [0, 1, 2, 3, 4, 5, 0, 6])


@pytest.mark.parametrize(
    ("layout", "names", "message"),
    [
        (SIX, RECORDED[:5] + RECORDED[6:], "the state lacks left_arm_joint_6_rad; its names are left_arm"),
        (SIX, (*RECORDED, "left_arm_joint_7_rad"), "the state has beyond the layout left_arm_joint_7_rad"),
        (ALL, (*RECORDED, "right_arm_joint_8_rad"), "has beyond the layout right_arm_joint_8_rad"),
        (ALL, RECORDED[:2] + RECORDED[3:], "lacks left_arm_joint_3_rad;"),
        (ALL, ("left_gripper_open", "left_hand_joint_1_rad"), "lacks left_arm_joint_1_rad, right_arm_joint_1_rad"),
        (ALL, (), "lacks .* its names are not recorded"),
        (SIX, (*RECORDED, RECORDED[3]), r"left_arm_joint_4_rad \(place 3\) and left_arm_joint_4_rad \(place 14\) for"),
        (ALL, (*RECORDED, SIX.names[6]), r"left_gripper_open \(place 6\) and left_gripper_open_scale \(place 14\) .*"
         r"as in state = { left_gripper_open_scale = 6 }"),
    ],
)  # fmt: skip
def test_robot_that_does_not_fit(layout, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(UnmappableError, match=message):
        places(names, layout)


def test_what_a_subset_file_says() -> None:
    """By place, by name, and what a robot has not although it is named."""
    names = (*RECORDED, RECORDED[3], "left_arm_joint_7_rad")
    said = {"left_arm_joint_4_rad": 14, "left_arm_joint_7_rad": "", "left_gripper_open_scale": "left_gripper_open"}
    found = places(names, **said)
    assert found[3] == 14 and found[6] == -1 and found[7] == 6
    assert places(names, SIX, left_arm_joint_4_rad=3, left_arm_joint_7_rad="")[3] == 3
    for said, message in (("knob", "is said to be 'knob', which is not there"), (16, "16, which is not there")):
        with pytest.raises(UnmappableError, match=message):
            places(names, left_arm_joint_4_rad=said)
    with pytest.raises(UnmappableError, match="said to be 'left_arm_joint_4_rad', which is there 2 times"):
        places(names, left_arm_joint_4_rad="left_arm_joint_4_rad")
    with pytest.raises(UnmappableError, match="has one number for two of the layout"):
        places(RECORDED, left_arm_joint_4_rad=0)


def test_default_layout() -> None:
    assert default_layout([RECORDED, (*RECORDED, "left_eef_pos_x_m")]) is SIX
    for other in (RECORDED[:6] + RECORDED[7:], (*RECORDED, "left_arm_joint_7_rad")):
        assert default_layout([RECORDED, other]) is ALL


# ---------------------------------------------------------------- cameras
@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        (WRISTS, "has no known camera for cam_high among its cameras cam_left"),
        (["cam_high_rgb", "cam_head_left_rgb"], "has cam_high_rgb and cam_head_left_rgb for cam_high"),
        (["cam_high_rgb", "cam_right_wrist_rgb", "hand_eye"], 'for cam_left_wrist .*perhaps hand_eye; .*t = "..."'),
        ([], r"its cameras \(none\)"),
    ],
)
def test_cameras_that_are_not_clear(recorded: list[str], message: str) -> None:
    with pytest.raises(UnmappableError, match=message):
        find_cameras(recorded, "set")


@pytest.mark.parametrize("head", ["cam_high_rgb", "cam_head_left_rgb", "camera_head_rgb", "image_top", "ego_view"])
def test_every_known_head_camera_serves(head: str) -> None:
    found = find_cameras([*WRISTS, "cam_head_right_rgb", head, "cam_chest_depth", "strange"], "set")
    assert found == dict(zip(("cam_high", "cam_left_wrist", "cam_right_wrist"), (head, *WRISTS), strict=True))


def test_views_that_are_not_there() -> None:
    """Where no camera is left that a missing view could be."""
    assert find_cameras(["ego_view", "cam_high_depth"], "set") == {"cam_high": "ego_view"}
    assert list(find_cameras(["image_top", "image_left"], "set")) == ["cam_high", "cam_left_wrist"]


# ---------------------------------------------------------------- robots and grippers
def test_what_the_table_says_of_robots() -> None:
    assert reading_of("Galaxea_R1_Lite").gripper.state == ((0.0, 100.0),) * 2
    assert "AgiBot" in reading_of("AgiBot-g1").doubtful and not reading_of("Airbot_MMK2").doubtful
    assert reading_of("") == Reading()


def test_the_nearer_word_is_heard() -> None:
    unit = Gripper.parse({"closed": 1, "open": 0}, "x")
    near = Reading(state={"left_arm_joint_1_rad": 3}, gripper=unit)
    far = Reading({"cam_high": "a"}, {"left_arm_joint_1_rad": 1, "left_arm_joint_2_rad": 2}, doubtful="why")
    assert near.over(far) == Reading(
        {"cam_high": "a"}, {"left_arm_joint_1_rad": 3, "left_arm_joint_2_rad": 2}, {}, unit, "why"
    )


@pytest.mark.parametrize(
    "value",
    [3, {}, {"closed": 0}, {"closed": 1, "open": 1}, {"closed": 0, "open": [1]}, {"closed": 0, "open": "1"},
     {"closed": 0, "open": float("nan")}, {"closed": 0, "open": 1, "unit": "mm"}, {"state": {"closed": 0, "open": 1}},
     {"closed": False, "open": True}, {"closed": [0, 0], "open": [1, 0]}],
)  # fmt: skip
def test_grippers_that_say_nothing(value: object) -> None:
    with pytest.raises(DatasetError, match="^where is .* expected what is recorded of a closed and of an open"):
        Gripper.parse(value, "where")
