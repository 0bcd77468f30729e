"""Randomised scenes: another look for each seed, the same for the same seed, and nothing else changed."""

import os
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines.recording.record import record_episode
from data_pipelines.simulation import rendering
from data_pipelines.simulation.env import AlohaSim
from data_pipelines.simulation.expert import plan
from data_pipelines.simulation.looks import THINGS
from data_pipelines.simulation.parallel import ParallelSims


@pytest.fixture(scope="module", autouse=True)
def drawing() -> None:
    if problem := rendering.check_rendering():
        pytest.skip(problem)


def look(sim: AlohaSim) -> np.ndarray:
    return np.concatenate([image.ravel() for image in sim.images().values()]).astype(int)


@pytest.mark.parametrize("task", ["insertion", "react"])
def test_arms_and_objects_move_as_without(task: str) -> None:
    sims = [AlohaSim(task), AlohaSim(task, randomise=True)]
    for sim in sims:
        sim.reset(4)
    actions = plan(sims[0])
    np.testing.assert_array_equal(plan(sims[1]), actions)
    for action in actions[:90]:
        for sim in sims:
            sim.step(action)
        np.testing.assert_array_equal(sims[0].data.qpos, sims[1].data.qpos)
    assert sims[0].stage == sims[1].stage > 0
    assert np.abs(look(sims[0]) - look(sims[1])).mean() > 5


def test_each_seed_has_its_own_look_and_keeps_it() -> None:
    """Also beside other simulations of the process, whose scenes are shared as far as they are the same."""
    plain, one, other = AlohaSim("transfer_cube"), *(AlohaSim("transfer_cube", randomise=True) for _ in range(2))
    pose = one.objects()
    looks = []
    for seed in (0, 1, 2):
        one.reset(seed)
        one.reset_objects(pose)  # what is different is not the cube
        looks.append(look(one))
    apart = [np.abs(looks[i] - looks[j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(apart) > 5
    before = look(plain)
    other.reset(0)
    other.reset_objects(pose)
    np.testing.assert_array_equal(look(other), looks[0])
    np.testing.assert_array_equal(look(one), looks[2])
    np.testing.assert_array_equal(look(plain), before)


def test_cameras_stay_upright_and_near_their_place() -> None:
    """From where the cube is seen: a shift of 3 cm, and a tilt of 0.04 at 0.8 m, are 3 pixels each."""
    plain, sim = (AlohaSim("transfer_cube", randomise=randomise) for randomise in (False, True))

    def cube(sim: AlohaSim, seed: int) -> np.ndarray:
        sim.reset(seed)
        red, green, blue = np.moveaxis(sim.images()["cam_high"].astype(int), -1, 0)
        return np.argwhere((red > 90) & (red > 3 * np.maximum(green, blue))).mean(axis=0)

    off = np.array([cube(sim, seed) - cube(plain, seed) for seed in range(6)])
    assert np.abs(off).max() < 8 and np.abs(off).max() > 0.5


def test_the_table_light_and_clutter_are_seen_and_films_show_them() -> None:
    sim, tables = AlohaSim("react", randomise=True), []
    for seed in range(6):
        sim.reset(seed)
        picture = sim.images()["cam_high"]
        tables.append(picture[20:24, 60:64].mean(axis=(0, 1)))
        for number in range(THINGS):
            sim.model.geom(f"thing_{number}").rgba[3] = 0
        assert (sim.images()["cam_high"] != picture).any(-1).sum() > 40, seed  # pixels of things
    red, _, blue = np.transpose(tables)
    assert (red / blue).max() / (red / blue).min() > 1.9  # light alone: (1.15 / 0.85) ** 2 at most
    light = np.mean(tables, axis=1)
    assert light.max() / light.min() > 1.5
    film, plain = sim.film().astype(int), AlohaSim("react").film().astype(int)
    assert np.abs(film[150:] - plain[150:]).mean() > 5  # the table
    blue = film[60:150, :240]  # its arm keeps its colour
    assert ((blue[..., 2] - blue[..., 0]) > 20).mean() > 0.05


def test_the_look_does_not_tell_the_marked_plate() -> None:
    sims = [AlohaSim("remember", randomise=True) for _ in range(2)]
    for marked, sim in enumerate(sims):
        sim.reset(5, marked=marked)
    assert np.abs(look(sims[0]) - look(sims[1])).max() > 60
    for sim in sims:
        for _ in range(28):
            sim.step(sim.state())
    np.testing.assert_array_equal(look(sims[0]), look(sims[1]))


def test_workers_and_recordings_see_the_same_scene() -> None:
    sim = AlohaSim("transfer_cube", randomise=True)
    with ParallelSims("transfer_cube", [3, 1000], 1, randomise=True) as parallel:
        for number, seed in enumerate((3, 1000)):
            sim.reset(seed)
            for camera, image in sim.images().items():
                np.testing.assert_array_equal(parallel.observe()[1][camera][number], image)
    plain, randomised = (record_episode("transfer_cube", 1000, 0.0, randomise) for randomise in (False, True))
    np.testing.assert_array_equal(plain.actions, randomised.actions)
    np.testing.assert_array_equal(plain.states, randomised.states)
    # The sum of all that the top camera saw, against this scene and its neighbour.
    key = "observation.images.cam_high"
    mean = [video.videos[key].histogram @ np.arange(256) / video.videos[key].histogram.sum(-1) for video in
            (plain, randomised)]  # fmt: skip
    here = sim.images()["cam_high"].mean(axis=(0, 1))
    assert np.abs(mean[1] - here).max() < np.abs(mean[0] - here).max() / 2


def test_dots_have_no_light() -> None:
    code = "from data_pipelines.simulation.env import AlohaSim; AlohaSim('react', randomise=True).images()"
    environment = {**os.environ, "MUJOCO_GL": "points"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "MUJOCO_GL=points has no light to draw randomised scenes in: use egl or osmesa." in result.stderr
