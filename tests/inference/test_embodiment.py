"""A policy of 16 numbers on a robot of 15 of its own: two arms of six joints, right first, grippers in mm, a waist."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahawam_jax.checkpoints import save_params
from ahawam_jax.commands import compile_policy
from ahawam_jax.inference.policy import Policy, PolicyConfig
from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.config import ModelConfig
from data_pipelines.embodiment import Embodiment, Vector
from data_pipelines.episodes import DatasetError
from data_pipelines.normalization import RELEASED
from data_pipelines.statistics import NAMES, Statistics, to_lists
from tests.inference.test_policy import INSTRUCTIONS, observation
from tests.tiny_config import get_config
from tests.tiny_model import assert_close, narrowed, normal, random_params

CONFIG = get_config()
CONFIG.model.update(action_dim=16, state_dim=16)
MODEL = ModelConfig.create(CONFIG.model)
PARAMS = random_params(MODEL)
SETTINGS = PolicyConfig(steps=2, execute=4, refresh_every=2)

KEEP = np.tile([True] * 6 + [False, True], 2)  # of the layout: left joints 1 to 7, left gripper, right the same
RIGHT, GRIPPER, WAIST, LEFT, LEFT_GRIPPER = range(6), 6, 7, range(8, 14), 14
OWN = Vector(
    names=(*(f"right_{k}" for k in range(6)), "right_mm", "waist", *(f"left_{k}" for k in range(6)), "left_mm"),
    places=(*LEFT, -1, LEFT_GRIPPER, *RIGHT, -1, GRIPPER), zero=(0.0,) * 16, one=2 * (*(1.0,) * 7, 100.0),
)  # fmt: skip
ROBOT = Embodiment(OWN, OWN)


def own(x: np.ndarray, waist: np.ndarray) -> np.ndarray:
    """x [..., 16] of the layout -> [..., 15] of the robot, written out."""
    left, right = x[..., :8], x[..., 8:]
    parts = right[..., :6], 100 * right[..., 7:], waist, left[..., :6], 100 * left[..., 7:]
    return np.concatenate(parts, -1).astype(np.float32)


def statistics() -> Statistics:
    """Around 0.5 for the robot's numbers, 0 for the absent ones, as they are computed of zeros."""
    values = {name: (np.abs(normal(i, 16)) + 0.5).astype(float) * KEEP for i, name in enumerate(NAMES)}
    return {kind: values | RELEASED.of(kind, (), 16) for kind in ("state", "action")}


def policy(embodiment: Embodiment | None) -> Policy:
    return Policy(AhaWam(MODEL), PARAMS, CONFIG, statistics(), SETTINGS, embodiment)


@pytest.fixture(scope="module")
def masked() -> Policy:
    return policy(ROBOT)


def drive(policy: Policy, states: list[np.ndarray], views: tuple[str, ...] = ()) -> np.ndarray:
    """Three calls, a refresh and a second plan among them. views: of the cameras, all by default."""
    state, out = policy.start(INSTRUCTIONS), []
    for call, robot_state in enumerate(states):
        images = {name: view for name, view in observation(call)[0].items() if not views or name in views}
        actions, state = policy(images, robot_state, state)
        out.append(actions)
    return np.stack(out)


STATES = [normal(10 + call, 2, 16) * KEEP for call in range(3)]  # in the layout
WAISTS = [normal(20 + call, 2, 1) for call in range(3)]
OWN_STATES = [own(state, waist) for state, waist in zip(STATES, WAISTS, strict=True)]


def test_order_units_and_absent_numbers_against_a_model_of_14(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same chunks as a policy that has no absent numbers, in the robot's terms; what is not driven is held."""
    config = get_config()
    config.model.update(action_dim=14, state_dim=14)
    stats = {kind: {name: x[KEEP] for name, x in of.items()} for kind, of in statistics().items()}
    narrow = Policy(AhaWam(ModelConfig.create(config.model)), narrowed(PARAMS, KEEP), config, stats, SETTINGS)

    def noise(key: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
        return normal(30, *shape[:-1], 16)[..., KEEP if shape[-1] == 14 else slice(None)]

    monkeypatch.setattr(jax.random, "normal", noise)
    masked = policy(ROBOT)
    want = np.zeros((3, 2, 4, 16))
    want[..., KEEP] = drive(narrow, [state[:, KEEP] for state in STATES])
    got, waist = drive(masked, OWN_STATES), np.broadcast_to(np.stack(WAISTS)[:, :, None], (3, 2, 4, 1))
    assert got.dtype == np.float32 and masked.embodiment.held == ("waist",)
    np.testing.assert_array_equal(got[..., WAIST], waist[..., 0])
    assert_close(got, own(want, waist), 5e-5)  # sums of other lengths, through two plans and two steps
    assert got[..., GRIPPER].std() > 10 * got[..., RIGHT].std(0).mean() > 0.1  # mm beside radians


def test_a_robot_of_one_camera_sees_black_beside_it() -> None:
    wrists = ("cam_left_wrist", "cam_right_wrist")
    head_alone = policy(dataclasses.replace(ROBOT, absent=wrists))
    got = drive(head_alone, OWN_STATES[:1], views=("cam_high",))
    images, _ = observation(0)
    images |= {name: np.zeros_like(images[name]) for name in wrists}
    want, _ = head_alone(images, OWN_STATES[0], head_alone.start(INSTRUCTIONS))
    np.testing.assert_array_equal(got[0], want)


def test_a_vector_of_the_layout_is_refused(masked: Policy) -> None:
    images, _ = observation(0)
    with pytest.raises(ValueError, match=r"shape \(2, 16\); expected \(2, 15\) finite numbers \(right_0, .*, waist,"):
        masked(images, STATES[0], masked.start(INSTRUCTIONS))


# ------------------------------------------------------------------------------------------------- from a checkpoint
OTHER = dataclasses.replace(ROBOT, action=dataclasses.replace(OWN, one=(1.0,) * 16))


def save_run(folder: Path) -> Path:
    """A checkpoint of a robot "a" that is recorded in two ways, and of "b", whose vectors are the model's."""
    ways = [{"datasets": ["cups"], **ROBOT.to_json()}, {"datasets": ["cloth"], **OTHER.to_json()}]
    save_params(folder, jax.tree.map(jnp.asarray, PARAMS), {
        "config": json.loads(CONFIG.to_json()), "instructions": INSTRUCTIONS, "robots": {"a": ways},
        "statistics": to_lists({"a": statistics(), "b": statistics()}),
    })  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"))


def load(run: Path, *arguments: Any, **settings: Any) -> Policy:
    return Policy.load(run, *arguments, **{**dataclasses.asdict(SETTINGS), **settings})


def test_robot_and_dataset_choose_the_embodiment(run: Path) -> None:
    assert load(run, "a", "cups").embodiment == ROBOT
    assert load(run, "a", "cloth").embodiment == OTHER
    assert load(run, "b").embodiment == Embodiment.as_recorded(16, 16)
    with pytest.raises(DatasetError, match="'a' differ in its own vector .*15 numbers in cups; 15 numbers in cloth"):
        load(run, "a")
    with pytest.raises(DatasetError, match="none was chosen"):
        load(run)


def test_compiled_functions_are_of_one_mask(run: Path, masked: Policy, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path), "--episodes", "2"]
    assert compile_policy.main([str(run), *out, "--robot", "a", "--dataset", "cups"]) == 0
    again = load(run, "a", "cups", compiled_in=tmp_path)
    np.testing.assert_array_equal(drive(again, OWN_STATES), drive(masked, OWN_STATES))
    with pytest.raises(ValueError, match=r"compiled for another policy \(present: \[True, .* False, .* there, \[True"):
        load(run, "b", compiled_in=tmp_path)
