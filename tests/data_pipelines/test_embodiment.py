"""A robot's own vector and the layout's: exact to float32 there and back."""

import json

import numpy as np
import pytest

from data_pipelines.embodiment import Embodiment, Vector, pick_embodiment
from data_pipelines.episodes import DatasetError

# Right first, a waist that nobody drives, a gripper of 0..100 mm and an inverted one; the layout: left, right, third.
STATE = Vector(("right", "waist", "left"), (2, 0, -1), (0.0, 1.0, 0.0), (100.0, 0.0, 1.0))
ACTION = Vector(("left", "waist", "right", "", "base"), (0, 2, -1), (0.0, 1.0, 0.0), (100.0, 0.0, 1.0))
ROBOT = Embodiment(STATE, ACTION, ("cam_left_wrist",))


def test_values_in_the_layout():
    own = np.float32([[0.25, 7, 50], [1, 8, 100]])
    np.testing.assert_array_equal(STATE.to_layout(own), np.float32([[0.5, 0.75, 0], [1, 0, 0]]))
    assert STATE.to_layout(own).dtype == np.float32
    assert STATE.present.tolist() == [True, True, False]


def test_there_and_back_within_float32():
    own = np.random.default_rng(0).uniform(0, 100, (50, 3)).astype(np.float32)
    # The layout's float32 rounds once, relative to 1, which is 100 and 1 in the robot's units.
    back = STATE.from_layout(STATE.to_layout(own), own)
    np.testing.assert_allclose(back[:, 2], own[:, 2], rtol=0, atol=100 * np.finfo(np.float32).eps)
    np.testing.assert_allclose(back[:, 0], own[:, 0], rtol=np.finfo(np.float32).eps)


def test_what_is_not_driven_is_held_and_named():
    x = np.zeros((2, 4, 3), np.float32)
    own_state = np.float32([[0, 3, 0], [0, 5, 0]])
    actions = ROBOT.act(x, own_state)
    assert actions.shape == (2, 4, 5) and ROBOT.held == ("waist", "#3", "base")
    np.testing.assert_array_equal(actions[:, :, 1], [[3] * 4, [5] * 4])
    assert np.isnan(actions[:, :, 3:]).all()
    np.testing.assert_array_equal(actions[:, :, [0, 2]], np.broadcast_to([0, 1], (2, 4, 2)))


def test_absent_views_are_black():
    views = ROBOT.views({"cam_high": np.ones((2, 8, 8, 3), np.uint8)})
    assert views["cam_left_wrist"].shape[0] == 2 and not views["cam_left_wrist"].any()


def test_a_robot_read_as_it_is():
    own, x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    plain = Embodiment.as_recorded(3, 3)
    np.testing.assert_array_equal(plain.state.to_layout(own), own)
    np.testing.assert_array_equal(plain.act(x[:, None], own), x[:, None])
    assert plain.action.present.all() and not plain.held


def test_survives_a_file():
    assert Embodiment.from_json(json.loads(json.dumps(ROBOT.to_json()))) == ROBOT


def test_pick():
    one = {"datasets": ["a"], **ROBOT.to_json()}
    other = {"datasets": ["b"], **Embodiment(ACTION, ACTION).to_json()}
    assert pick_embodiment({}, None) is None
    assert pick_embodiment({"r": [one]}, None) == ROBOT
    assert pick_embodiment({"r": [one, other]}, "r", "b") == Embodiment(ACTION, ACTION)
    with pytest.raises(DatasetError, match="differ in its own vector"):
        pick_embodiment({"r": [one, other]}, "r")
    with pytest.raises(DatasetError, match="no dataset 'c'; it has a, b"):
        pick_embodiment({"r": [one, other]}, "r", "c")
