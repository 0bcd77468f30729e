"""Remember and react: what a policy can see and when, and what becomes of an expert that knows less."""

import io
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipelines.caches.frame_cache import DecodingFrames
from data_pipelines.canvas import Canvas
from data_pipelines.readers.opening import open_episodes
from data_pipelines.recording.encoded_video import encode_video
from data_pipelines.recording.record import disturbance, record
from data_pipelines.simulation import rendering
from data_pipelines.simulation.env import EPISODE_STEPS, FPS, IMAGE_SIZES, AlohaSim
from data_pipelines.simulation.expert import plan
from data_pipelines.windows import WindowConfig, Windows

GONE, PARTED = 28, 52  # rows of *remember*: the first without the mark, the first whose action depends on it


@pytest.fixture(scope="module")
def drawing() -> None:
    if problem := rendering.check_rendering():
        pytest.skip(problem)


def run(sim: AlohaSim, actions: np.ndarray) -> AlohaSim:
    for action in actions:
        sim.step(action)
    return sim


def green(images: np.ndarray) -> np.ndarray:
    """Pixels of the mark's colour in uint8 [..., h, w, 3]."""
    red, green, blue = np.moveaxis(images.astype(int), -1, 0)
    return (green > np.maximum(red, blue) + 60).sum((-2, -1))


def decoded(frames: np.ndarray) -> np.ndarray:
    """uint8 [n, h, w, 3] as a recording gives them back."""
    with av.open(io.BytesIO(encode_video(frames, FPS).mp4)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_nothing_that_a_policy_sees_tells_the_plate_once_the_mark_has_gone(drawing: None) -> None:
    """Both variants of one scene, arms disturbed as in a recording: pictures and joints are the same, bit for bit."""
    seed, shown, acted = 3, [], []
    for marked in (0, 1):
        sim = AlohaSim("remember")
        sim.reset(seed, marked=marked)
        acted.append(plan(sim))
        rows = []
        for action in (acted[-1] + disturbance(EPISODE_STEPS, 0.01, seed))[: PARTED + 12]:
            rows.append({**sim.images(), "state": sim.state()})
            sim.step(action)
        shown.append(rows)
    for row, (one, other) in enumerate(zip(*(rows[: PARTED + 1] for rows in shown), strict=True)):
        same = {name: np.array_equal(one[name], other[name]) for name in one}
        assert same["state"] and same["cam_high"] == (row >= GONE), row
        assert row < GONE or all(same.values()), (row, same)
        assert (green(one["cam_high"]) > 60) == (green(other["cam_high"]) > 60) == (row < GONE)
    for camera in IMAGE_SIZES:  # nor does a recording's compression keep a trace, or foretell what comes
        one, other = (decoded(np.stack([row[camera] for row in rows]))[GONE : PARTED + 1] for rows in shown)
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(acted[0][:PARTED], acted[1][:PARTED])
    assert np.abs(acted[0][PARTED + 8] - acted[1][PARTED + 8]).max() > 0.03


def test_stages_of_remember() -> None:
    sim = AlohaSim("remember")
    for seed in range(2):
        sim.reset(seed)
        marked = sim.scene["marked"]
        actions = plan(sim)
        assert run(sim, actions[:30]).stage == 0
        assert run(sim, actions[30:90]).stage == 1  # in the hand
        run(sim, actions[90:])
        assert sim.stage == sim.reward() == 3 and sim.success and sim.held
        sim.reset(seed)
        run(sim, plan(sim, plate=1 - marked))
        assert sim.stage == sim.reward() == 2 and not sim.success


def test_the_marked_plate_is_a_fair_coin_that_the_cube_does_not_give_away() -> None:
    sim, marked, place = AlohaSim("remember"), [], []
    for seed in range(400):
        sim.reset(seed)
        marked.append(sim.scene["marked"])
        place.append(sim.objects()[0, :2])
    assert 160 <= sum(marked) <= 240  # 4 standard deviations
    assert np.abs([np.corrcoef(axis, marked)[0, 1] for axis in np.transpose(place)]).max() < 0.2


@pytest.mark.parametrize(("refresh_every", "frames", "remembers"), [
    (1, 2, False), (1, 3, True), (2, 1, False), (2, 2, True), (3, 1, True), (3, 2, True), (4, 1, True), (5, 1, True),
    (6, 1, True),
])  # fmt: skip
def test_which_memory_reaches_the_mark(refresh_every: int, frames: int, remembers: bool) -> None:
    """The table of docs/tasks.md: 8 actions are run a call, the planner is refreshed every so many calls."""
    apart = 8 * refresh_every
    planned = PARTED // apart * apart  # the frame of the plan in use when the ways part
    assert planned >= GONE  # which no longer shows the mark
    memory = [planned - apart * back for back in range(1, frames + 1)]
    assert any(0 <= row < GONE for row in memory) == remembers


def test_training_windows_remember_the_mark(drawing: None, tmp_path: Path) -> None:
    """The demo's windows over a recording: W = 2 frames, 16 rows apart, reach it from every row that needs it."""
    record("remember", episodes=1, out=tmp_path / "set", processes=1, noise=0.01, seed0=1000)
    dataset = open_episodes(tmp_path / "set")
    windows = Windows(dataset, DecodingFrames(dataset, Canvas((64, 128))), WindowConfig(16, 16, 8, 2, 16, 15))
    starts = np.array([20, *range(GONE, 56, 3), 55, 64])
    batch = windows.gather(starts, np.zeros(len(starts), int))
    head = slice(64)  # the canvas below is of the wrists
    remembered = (green(batch["history"][:, :, head]) > 60).any(1)
    seen = (green(batch["video"][:, :, head]) > 60).any(1) | (green(batch["observations"][:, :, head]) > 60).any(1)
    assert seen.tolist() == [start < GONE for start in starts]
    assert remembered.tolist() == [start < 56 for start in starts]


def test_the_knock_comes_without_notice() -> None:
    """It leaves no trace in the joints, nor in the scene before; the cube slides upright to where the arm reaches."""
    slid, knocks, ways = [], set(), set()
    for seed in range(16):
        sim, calm = AlohaSim("react"), AlohaSim("react")
        sim.reset(seed)
        calm.reset(seed, knock=EPISODE_STEPS + 1)
        knock, above = sim.scene["knock"], sim.state()
        above[13] = 1
        for step in range(70):
            sim.step(above)
            calm.step(above)
            moved = np.abs(sim.objects() - calm.objects()).max()
            assert (moved == 0) == (step < knock or not sim.scene["way"]), (seed, step)
            # One solver iterates over all contacts together, until its residual is 1e-8.
            np.testing.assert_allclose(sim.state(), calm.state(), rtol=0, atol=0 if step < knock else 1e-6)
        off = (sim.objects() - calm.objects())[0, :2]
        np.testing.assert_array_equal(np.where(np.abs(off) > 0.02, np.sign(off), 0), sim.rules.ways[sim.scene["way"]])
        slid += [np.linalg.norm(off)] * bool(sim.scene["way"])
        ways.add(sim.scene["way"])
        knocks.add(knock)
        x, y = sim.objects()[0, :2]
        assert -0.02 < x < 0.2 and 0.33 < y < 0.67 and abs(sim.objects()[0, 2] - 0.02) < 1e-3
    assert 0.06 < min(slid) and max(slid) < 0.13 and len(knocks) > 4 and knocks <= {*range(42, 53)}
    assert ways == {0, 1, 2, 3}


@pytest.mark.parametrize(("delay", "solved"), [(8, True), (24, False)])
def test_reacting_needs_a_fresh_look(delay: int, solved: bool) -> None:
    sim = AlohaSim("react")
    for seed in (1, 3, 5):  # one of each way
        sim.reset(seed)
        run(sim, plan(sim, delay=delay))
        assert sim.success == sim.held == solved, (seed, sim.scene)


def test_stages_of_react() -> None:
    sim = AlohaSim("react")
    sim.reset(1)  # in others the cube leaves the table in the row in which the fingers close
    actions = plan(sim)
    stages = []
    for action in actions:
        sim.step(action)
        stages.append(sim.reward())
    assert stages[60] == 0 and stages[-1] == 3 and [*dict.fromkeys(stages)][:4] == [0, 1, 2, 3]


def test_a_copy_goes_its_own_way() -> None:
    sim = AlohaSim("react")
    sim.reset(2)
    action = sim.state()
    for _ in range(5):
        sim.step(action)
    twin, before = sim.copy(), sim.data.qpos.copy()
    for _ in range(50):
        twin.step(action)
    np.testing.assert_array_equal(sim.data.qpos, before)
    for _ in range(50):
        sim.step(action)
    np.testing.assert_array_equal(sim.data.qpos, twin.data.qpos)


def test_a_scene_has_only_what_is_drawn_for_it() -> None:
    with pytest.raises(ValueError, match=r"remember draws \['marked'\] for an episode, not 'knock'"):
        AlohaSim("remember").reset(0, knock=3)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["remember", "react"])
def test_the_expert_solves_95_of_100(task: str) -> None:
    sim, solved = AlohaSim(task), 0
    for seed in range(1000, 1100):
        sim.reset(seed)
        solved += run(sim, plan(sim)).held
    assert solved >= 95
