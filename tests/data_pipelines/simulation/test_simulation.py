import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.processes import WorkerError
from data_pipelines.recording.record import record
from data_pipelines.simulation import rendering
from data_pipelines.simulation.env import EPISODE_STEPS, FILM_SIZE, IMAGE_SIZES, AlohaSim
from data_pipelines.simulation.expert import plan
from data_pipelines.simulation.parallel import ParallelSims

STOCK = ("transfer_cube", "insertion")
TASKS = (*STOCK, "remember", "react")


@pytest.fixture(scope="module")
def drawing() -> None:
    if problem := rendering.check_rendering():
        pytest.skip(problem)


def rollout(sim: AlohaSim, seed: int) -> list[int]:
    sim.reset(seed)
    rewards = []
    for action in plan(sim):
        sim.step(action)
        rewards.append(sim.reward())
    return rewards


@pytest.mark.parametrize("task", STOCK)
def test_agrees_with_stock_gym_aloha(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "disable")  # read by dm_control when it is imported
    from dm_control import mujoco
    from dm_control.rl import control
    from gym_aloha.constants import ASSETS_DIR, DT
    from gym_aloha.tasks import sim as stock

    physics = mujoco.Physics.from_xml_path(str(ASSETS_DIR / f"bimanual_viperx_{task}.xml"))
    monkeypatch.setattr(type(physics), "render", lambda *_, **__: None)
    stock_task = {"transfer_cube": stock.TransferCubeTask, "insertion": stock.InsertionTask}[task]()
    ours = AlohaSim(task, rate=50)
    ours.reset(3)
    monkeypatch.setattr(stock, "BOX_POSE", [ours.objects().reshape(-1)])
    environment = control.Environment(physics, stock_task, float("inf"), control_timestep=DT)
    environment.reset()
    np.testing.assert_array_equal(ours.data.qpos, physics.data.qpos)

    rewards = []
    for action in np.repeat(plan(ours).astype(np.float64), 2, axis=0):
        ours.step(action)
        seen = environment.step(action)
        np.testing.assert_array_equal(ours.data.qpos, physics.data.qpos)
        np.testing.assert_array_equal(ours.state(), seen.observation["qpos"].astype(np.float32))
        assert ours.reward() == seen.reward
        rewards.append(ours.reward())
    assert {0, 2, 4} <= set(rewards)  # the comparison met every interesting contact


@pytest.mark.parametrize("task", TASKS)
def test_expert_solves_unseen_scenes_and_holds_to_the_end(task: str) -> None:
    sim = AlohaSim(task)
    for seed in (1, 5, 7, 13):
        rewards = rollout(sim, seed)
        assert (sim.success, sim.held) == (True, True), f"seed {seed}: rewards {rewards}"


@pytest.mark.parametrize("task", TASKS)
def test_expert_is_a_smooth_function_of_the_scene(task: str) -> None:
    sim = AlohaSim(task)
    sim.reset(5)
    actions = plan(sim)
    assert actions.shape == (EPISODE_STEPS, 14) and actions.dtype == np.float32
    np.testing.assert_array_equal(actions, plan(sim))
    assert np.abs(np.diff(actions, axis=0)).max() < 0.25
    assert np.abs(actions[:, [3, 10]]).max() < 1e-3  # forearms do not roll
    low, high = sim.model.jnt_range[[*range(6), *range(8, 14)]].T
    arms = np.delete(actions, [6, 13], axis=1)
    assert (arms >= low - 1e-6).all() and (arms <= high + 1e-6).all()
    moved = sim.objects()
    moved[:, :2] += 1e-3  # a millimetre
    sim.reset_objects(moved)
    assert 0 < np.abs(plan(sim) - actions).max() < 0.02


@pytest.mark.parametrize("task", TASKS)
def test_reset_draws_objects_from_their_ranges(task: str) -> None:
    sim = AlohaSim(task)
    poses = []
    for seed in range(50):
        sim.reset(seed)
        poses.append(sim.objects())
    poses = np.stack(poses)
    # (x, y) ranges of the objects in metres.
    ranges = {
        "transfer_cube": [((0, 0.2), (0.4, 0.6))],
        "insertion": [((0.1, 0.2), (0.4, 0.6)), ((-0.2, -0.1), (0.4, 0.6))],
        "remember": [((0.12, 0.2), (0.45, 0.55))],
        "react": [((0.1, 0.18), (0.46, 0.54))],
    }[task]
    for i, bounds in enumerate(ranges):
        for axis, (low, high) in enumerate(bounds):
            drawn, edge = poses[:, i, axis], 0.1 * (high - low)
            assert low <= drawn.min() < low + edge and high - edge < drawn.max() <= high
    np.testing.assert_array_equal(poses[..., 2:], np.broadcast_to([0.05, 1, 0, 0, 0], poses[..., 2:].shape))
    sim.reset(49)
    np.testing.assert_array_equal(sim.objects(), poses[-1])


def test_an_action_lasts_40_ms_and_moves_the_arms_there() -> None:
    sim = AlohaSim("transfer_cube")
    target = sim.state()
    np.testing.assert_allclose(target[[6, 13]], 0.0998, atol=1e-3)
    target[[0, 6, 7, 13]] = 0.3, 0.9, -0.2, 0.5
    for _ in range(40):
        sim.step(target)
    assert sim.data.time == pytest.approx(40 * 0.04)
    np.testing.assert_allclose(sim.state(), target, atol=0.05)


def test_success_lasts_and_held_does_not() -> None:
    sim = AlohaSim("transfer_cube")
    rollout(sim, 0)
    action = plan(sim)[-1]
    action[6] = 1
    for _ in range(25):
        sim.step(action)
    assert sim.success and not sim.held
    sim.reset(0)
    assert not sim.success


def test_missing_scene_files_are_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = "gym-aloha 0.1.5, which is not installed: run `pip install --no-deps gym-aloha==0.1.5`"
    with pytest.raises(RuntimeError, match=said):
        ParallelSims("insertion", [0], processes=1)  # not a worker's traceback
    with pytest.raises(RuntimeError, match=said):
        record("insertion", episodes=1, out=tmp_path / "dataset", processes=1, noise=0, seed0=0)
    assert not list(tmp_path.iterdir())


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="Unknown task 'fold'.*transfer_cube"):
        AlohaSim("fold")
    with pytest.raises(ValueError, match="Unknown camera 'cam_low'"):
        AlohaSim("insertion", {"cam_low": (64, 64)})
    sim = AlohaSim("transfer_cube")
    with pytest.raises(ValueError, match=r"shape \(7,\).*expected 14"):
        sim.step(np.zeros(7))
    with pytest.raises(ValueError, match="nan"):
        sim.step(np.full(14, np.nan))


def test_views(drawing: None) -> None:
    sim = AlohaSim("transfer_cube")
    images = sim.images()
    assert {camera: image.shape for camera, image in images.items()} == {
        camera: (*size, 3) for camera, size in IMAGE_SIZES.items()
    }
    assert all(image.dtype == np.uint8 for image in images.values())

    def cube(x: float, y: float) -> np.ndarray:
        sim.reset_objects(np.array([[x, y, 0.05, 1, 0, 0, 0]]))
        red, green, _ = np.moveaxis(sim.images()["cam_high"].astype(int), -1, 0)
        return np.argwhere(red > green + 100).mean(axis=0)

    # Seen from above: x to the right, y (away from the viewer) upwards.
    here, right, away = cube(0.05, 0.5), cube(0.15, 0.5), cube(0.05, 0.6)
    assert right[1] > here[1] + 5 and abs(right[0] - here[0]) < 1.5
    assert away[0] < here[0] - 5 and abs(away[1] - here[1]) < 1.5
    assert AlohaSim("transfer_cube", {"cam_high": (48, 80)}).images()["cam_high"].shape == (48, 80, 3)
    with pytest.raises(ValueError, match="1000x1000.*at most"):
        sim.render("cam_high", (1000, 1000))


@pytest.mark.parametrize("task", TASKS)
def test_films_show_both_arms_whole(task: str) -> None:
    """Every vertex of every mesh, in an episode that moves both arms."""
    sim = AlohaSim(task)
    camera = sim.model.camera("angle").id
    arms = [geom for geom in range(sim.model.ngeom) if sim.model.geom(geom).name.startswith("vx300s")]
    height, width = FILM_SIZE

    def farthest() -> float:
        """From the picture's centre, 1 at its edge."""
        out = []
        for geom in arms:
            mesh = sim.model.geom_dataid[geom]
            start, count = sim.model.mesh_vertadr[mesh], sim.model.mesh_vertnum[mesh]
            turned = sim.model.mesh_vert[start : start + count] @ sim.data.geom_xmat[geom].reshape(3, 3).T
            apart = turned + sim.data.geom_xpos[geom] - sim.data.cam_xpos[camera]
            seen = apart @ sim.data.cam_xmat[camera].reshape(3, 3)
            tangent = np.abs(seen[:, :2] / -seen[:, 2:]) / np.tan(np.radians(sim.model.cam_fovy[camera]) / 2)
            out.append((tangent / [width / height, 1]).max())
        return max(out)

    sim.reset(0)
    worst = farthest()
    for step, action in enumerate(plan(sim)):
        sim.step(action)
        if step % 5 == 0:
            worst = max(worst, farthest())
    assert worst < 0.95


def test_films_are_for_people(drawing: None) -> None:
    """Each arm in its colour before a light backdrop; what a policy sees has neither."""
    sim = AlohaSim("transfer_cube")
    seen = sim.images()["cam_high"].copy()
    red, _, blue = np.moveaxis(sim.film().astype(int), -1, 0)
    left, right = (blue - red)[:, :240], (red - blue)[:, 240:]
    assert (left > 40).mean() > 0.05 and (right > 40).mean() > 0.05 and (right < -40).mean() < 0.01
    assert sim.film()[0].min() > 200
    np.testing.assert_array_equal(sim.images()["cam_high"], seen)


@pytest.mark.parametrize(("side", "joint"), [("left", 5), ("right", 12)])
def test_each_wrist_camera_turns_with_its_own_hand(side: str, joint: int, drawing: None) -> None:
    sim = AlohaSim("insertion")
    action = sim.state()
    for _ in range(20):  # until everything lies still
        sim.step(action)
    before = sim.images()
    action[joint] = 0.5
    for _ in range(15):
        sim.step(action)
    change = {camera: np.abs(image.astype(int) - before[camera]).mean() for camera, image in sim.images().items()}
    other = "cam_left_wrist" if side == "right" else "cam_right_wrist"
    assert change[f"cam_{side}_wrist"] > 5 * change[other], change


@pytest.mark.parametrize("probe", ["raise SystemExit(1)", "import os; os.abort()"])
def test_rendering_trouble_becomes_an_instruction(probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_PROBE", probe)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    advice = rendering.check_rendering.__wrapped__()
    assert "apt-get install libegl1" in advice and "libosmesa6" in advice and "\n" not in advice
    assert "MUJOCO_GL" not in os.environ


def test_first_working_backend_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_PROBE", "import os; assert os.environ['MUJOCO_GL'] == 'osmesa'")
    monkeypatch.setenv("MUJOCO_GL", "")
    assert rendering.check_rendering.__wrapped__() is None
    assert os.environ["MUJOCO_GL"] == "osmesa"


WITHOUT_DRIVER = """
from data_pipelines.simulation.env import AlohaSim
sim = AlohaSim("transfer_cube")
sim.step(sim.state())
try:
    sim.images()
except RuntimeError as problem:
    print(problem)
"""


def test_physics_needs_no_drawing() -> None:
    environment = {**os.environ, "MUJOCO_GL": "nonsense"}
    command = [sys.executable, "-c", WITHOUT_DRIVER]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith("MuJoCo cannot draw with MUJOCO_GL=nonsense: `apt-get install"), result.stderr


def test_parallel_equals_serial(drawing: None) -> None:
    seeds, sizes = [4, 7, 9], {"cam_high": (32, 32)}
    sims = [AlohaSim("transfer_cube", sizes) for _ in seeds]
    for sim, seed in zip(sims, seeds, strict=True):
        sim.reset(seed)
    actions = np.stack([plan(sim) for sim in sims])
    with ParallelSims("transfer_cube", seeds, processes=2, image_sizes=sizes, film=[2]) as parallel:
        workers = [process for process, _ in parallel._workers]
        assert len(workers) == 2
        for step, last in ((0, 148), (148, 155)):
            states, images = parallel.observe()
            assert states.dtype == np.float32
            np.testing.assert_array_equal(states, np.stack([sim.state() for sim in sims]))
            np.testing.assert_array_equal(images["cam_high"], np.stack([sim.images()["cam_high"] for sim in sims]))
            actions[1, :, 13] = 1  # a hand that stays open fails
            parallel.run(actions[:, step:last], record_every=5)
            for sim, rows in zip(sims, actions, strict=True):
                for action in rows[step:last]:
                    sim.step(action)
        assert parallel.success.tolist() == parallel.held.tolist() == [True, False, True]
        film = parallel.films[2]
        assert list(parallel.films) == [2] and len(film) == 31 and film[0].shape == (240, 480, 3)
        np.testing.assert_array_equal(film[-1], sims[2].film())
        with pytest.raises(ValueError, match=r"expected \[3, steps, 14\]"):
            parallel.run(actions[:2])
        with pytest.raises(RuntimeError, match="14 finite numbers"):
            parallel.run(actions[:, :1] * np.nan)
    assert all(process.poll() is not None for process in workers)


@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_that_was_killed_is_an_error(drawing: None, busy: bool) -> None:
    with ParallelSims("transfer_cube", [0, 1], 2, {"cam_high": (32, 32)}) as parallel:
        first, second = (process for process, _ in parallel._workers)
        second.send_signal(signal.SIGSTOP if busy else signal.SIGKILL)  # a request waits unread for who is stopped
        killer = threading.Timer(0.2, second.kill)
        if busy:
            killer.start()
        else:
            second.wait()
        with pytest.raises(WorkerError, match="A worker process of the simulation was killed by SIGKILL.*Start again"):
            parallel.run(np.zeros((2, 1, 14)))
        assert first.poll() is not None and second.poll() == -signal.SIGKILL


WORKERS_OUTLIVED = """
import os, signal
from data_pipelines.simulation.parallel import ParallelSims
sims = ParallelSims("transfer_cube", [0], 1)
print("started", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_killed_parent(drawing: None) -> None:
    parent = subprocess.Popen([sys.executable, "-c", WORKERS_OUTLIVED], stdout=subprocess.PIPE, text=True)
    # The worker has inherited the pipe: its end is reached only once the worker is gone as well.
    output, _ = parent.communicate(timeout=30)
    assert parent.returncode == -signal.SIGKILL and output == "started\n"


def test_nothing_here_imports_jax() -> None:
    modules = "data_pipelines.simulation.parallel, data_pipelines.simulation.expert, data_pipelines.recording.record"
    check = f"import sys, {modules}; sys.exit('jax' in sys.modules or 'gym_aloha' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0


def test_dots_show_the_cube_where_the_camera_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for machines without OpenGL, against MuJoCo's own projection of the cube's centre."""
    monkeypatch.setenv("MUJOCO_GL", "points")
    assert rendering.check_rendering.__wrapped__() is None
    sim = AlohaSim("transfer_cube")
    renderer = rendering.PointRenderer(sim.model)
    for seed in range(3):
        sim.reset(seed)
        image = renderer.draw(sim.data, "top", (128, 256))
        red = (image[..., 0] > 2 * image[..., 1].astype(int)) & (image[..., 0] > 100)
        row, column = np.argwhere(red).mean(0)
        offset = sim.objects()[0, :3] - sim.data.camera("top").xpos
        right, up, back = sim.data.camera("top").xmat.reshape(3, 3).T @ offset
        focal = 64 / np.tan(np.radians(sim.model.camera("top").fovy[0]) / 2)
        expected = 64 - focal * up / -back, 128 + focal * right / -back
        assert np.hypot(row - expected[0], column - expected[1]) < 2  # pixels; the cube is about 8 wide
