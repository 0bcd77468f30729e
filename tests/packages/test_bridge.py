"""From chunks to commands: every step of a policy once and in order, whatever the latency; limits; what stops it."""

import argparse
import ast
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ahawam_client import latency
from ahawam_client.bridge import Bridge, Command, Observation
from ahawam_client.client import PolicyClient
from ahawam_client.driving import drive
from ahawam_client.guard import Guard, GuardError
from ahawam_jax.inference.continuing import Continued
from ahawam_jax.inference.handover import HAND_OVERS
from data_pipelines.embodiment import Embodiment
from data_pipelines.readers.opening import open_episodes
from tests.packages.test_client import PACKAGE, imported
from tests.serving.stub import Stub, StubState, running

LABELS = [f"#{n}" for n in range(14)]
CHUNK, EXECUTE = 16, 8


def says(**changes: Any) -> dict[str, Any]:
    found = {"state": LABELS, "actions": LABELS, "held": [], "execute": EXECUTE, "chunk": CHUNK}
    return found | {"hand_over": "skip", "max_delay": CHUNK - EXECUTE} | changes


def wide(**changes: Any) -> Guard:
    return Guard(**{"labels": LABELS, "lower": -1e4, "upper": 1e4, "step": 1e4, "jump": 1e4} | changes)


def seen(number: float = 0.0, now: float = 0.0) -> Observation:
    return Observation({}, np.full(14, number), now)


class Clockwork:
    """A policy that counts the steps of its own clock, as a server does, and answers so many steps late."""

    def __init__(self, bridge: Bridge, delays: Iterator[int], chunk: int = CHUNK, execute: int = EXECUTE) -> None:
        self._bridge, self._delays, self._chunk, self._execute = bridge, delays, chunk, execute
        self._elapsed, self._due, self.calls = 0, -1, 0

    def step(self, number: int) -> Command | None:
        """One control step, as `drive` does it."""
        self._bridge.observe(seen(now=float(number)))
        if number == self._due:
            rows = self._elapsed + np.arange(self._chunk)
            self._bridge.answer(np.repeat(rows[:, None], 14, 1))
            self._elapsed += self._execute
        if self._bridge.ask() is not None:
            self._due = number + 1 + next(self._delays)
            self.calls += 1
        return self._bridge.tick(float(number))


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_every_action_is_run_once_and_in_order(wait: bool, seed: int) -> None:
    """Of a policy whose action at step t is t: the commands are 0, 1, 2, ..., however late the chunks come."""
    rng = np.random.default_rng(seed)
    chunk, execute = (CHUNK, EXECUTE) if seed % 2 else (16, 16)
    bridge = Bridge(says(execute=execute), wide(), wait=wait)
    clockwork = Clockwork(bridge, iter(rng.integers(0, 30, 1000).tolist()), chunk, execute)
    commands = [clockwork.step(number) for number in range(400)]
    moved = [command.positions[0] for command in commands if command is not None and not command.held]
    assert len(moved) > 50 and moved == list(range(len(moved))) and not bridge.stopped
    assert clockwork.calls - 1 <= len(moved) / execute <= clockwork.calls + 1
    first = next(number for number, command in enumerate(commands) if command is not None)
    assert all(command is not None for command in commands[first:]), "what is driven is told where to be in every step"


def test_overlap_hides_what_a_chunk_has_left() -> None:
    """Up to chunk - execute steps of latency nothing is held; waiting, it is after every chunk."""
    for late, wait, holds in ((CHUNK - EXECUTE - 1, False, 0), (CHUNK - EXECUTE, False, 1), (3, True, 4)):
        clockwork = Clockwork(Bridge(says(), wide(), wait=wait), iter([late] * 99))
        commands = [command for number in range(300) if (command := clockwork.step(number)) is not None]
        held = sum(command.held for command in commands)
        assert abs(held - holds * (clockwork.calls - 1)) <= holds, (late, wait)


def test_the_policy_is_told_what_will_be_run() -> None:
    """The rows that are left, as the guard lets them pass, and as many of them as the slowest of ten chunks took."""
    bridge = Bridge(says(max_delay=6), wide(upper=3.0), wait=False)
    rows, lates, told = np.repeat(np.arange(1.0, CHUNK + 1)[:, None], 14, 1), [2, 5, 7, *[1] * 11], []
    for late in lates:
        bridge.observe(seen())
        request = bridge.ask()
        told.append(request.delay)
        if len(told) == 1:
            assert request.rest is None
        else:  # 8 rows are left of 16, 9 to 16, of which the guard makes 3
            assert request.rest.shape == (8, 14) and (request.rest == 3).all()
        for _ in range(late):
            bridge.tick(0.0)
        bridge.answer(rows)
        while bridge._moved - bridge._asked.moved < EXECUTE:
            bridge.tick(0.0)
    assert told == [0, 2, 5, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 1]
    assert "13 chunks were handed over in motion, 2 of them later than announced" in bridge.report()


def test_who_waits_tells_nothing() -> None:
    """By its own choice or by the server's: it holds between chunks, and runs all of each."""
    for wait, hand_over in ((True, "trained"), (False, "wait")):
        bridge = Bridge(says(hand_over=hand_over), wide(), wait=wait)
        for _ in range(3):
            bridge.observe(seen())
            request = bridge.ask()
            assert request.rest is None and request.delay == 0
            bridge.tick(0.0)
            bridge.answer(np.repeat(np.arange(1.0, CHUNK + 1)[:, None], 14, 1))
            ran = [bridge.tick(0.0) for _ in range(EXECUTE)]
            assert [command.positions[0] for command in ran] == list(range(1, EXECUTE + 1))
            assert bridge.tick(0.0).held
        assert "handed over" not in " ".join(bridge.report())


def test_what_stops_it() -> None:
    def stopped(*observations: Observation, action: float = 0.0, now: float = 0.0, guard: Guard | None = None) -> str:
        bridge = Bridge(says(), guard or wide())
        for observation in observations:
            bridge.observe(observation)
            bridge.ask()
        bridge.answer(np.full((CHUNK, 14), action))
        assert bridge.tick(now) is None and bridge.ask() is None and bridge.tick(now) is None
        bridge.stop("another reason")
        return bridge.stopped

    assert "observation is 0.50 s old; cameras or joints are silent" in stopped(seen(), now=0.5)
    assert "the robot's state is not finite" in stopped(seen(np.nan))
    assert "a command has no number for #0, #1" in stopped(seen(), action=np.nan)
    far = stopped(seen(0.1), action=0.5, guard=wide(jump=0.3))
    assert "the first command is too far from where the robot is: #0 is at 0.100, to go to 0.500, #1" in far


def test_nothing_is_sent_before_there_is_anything() -> None:
    bridge = Bridge(says(), wide())
    assert bridge.ask() is None and bridge.tick(0.0) is None
    bridge.observe(seen())
    assert bridge.tick(0.0) is None and not bridge.stopped
    request = bridge.ask()
    assert request is not None and bridge.ask() is None, "one question at a time"


def test_the_guard() -> None:
    """Limits first, then a step; what it changed is named."""
    guard = Guard(["a", "b"], [-1, 0], [1, 0.5], [0.1, 0.2], [9, 9])
    command, changed = guard.limit(np.array([0.05, 0.1]), np.zeros(2))
    assert command.tolist() == [0.05, 0.1] and not changed
    command, changed = guard.limit(np.array([3.0, 0.1]), np.zeros(2))
    assert command.tolist() == [0.1, 0.1] and changed == ("a",)
    command, changed = guard.limit(np.array([1.5, -0.3]), np.array([0.95, 0.0]))
    assert command.tolist() == [1.0, 0.0] and changed == ("a", "b")
    with pytest.raises(GuardError, match="a command has no number for b"):
        guard.limit(np.array([0, np.inf]), np.zeros(2))
    for changes, said in (
        ({"step": [0.1, 0]}, "step is .*more than 0"), ({"upper": [-2, 1]}, "lower limit of a is not below"),
        ({"lower": [np.nan, 0]}, "lower is .* 2 finite numbers"),
    ):  # fmt: skip
        with pytest.raises(GuardError, match=said):
            Guard(**{"labels": ["a", "b"], "lower": [-1, 0], "upper": [1, 1], "step": 1, "jump": 1} | changes)


def test_a_policy_of_another_robot_is_refused() -> None:
    for changes, said in (
        ({"state": LABELS[:7]}, "the policy's state are #0, .*; this robot has"),
        ({"actions": LABELS[::-1]}, "the policy's actions are #13"),
        ({"held": ["#3"]}, "the policy does not drive #3"),
    ):
        with pytest.raises(GuardError, match=said):
            Bridge(says(**changes), wide())
    old = {name: value for name, value in says().items() if name != "hand_over"}
    with pytest.raises(GuardError, match="does not say how chunks are handed over; it needs a newer ahawam serve"):
        Bridge(old, wide())


def test_the_report_names_what_makes_motion_jerky() -> None:
    """Unsteady steps, jumps where chunks meet, late feedback, and what the guard cut, each as it was made here."""
    bridge = Bridge(says(), wide(step=0.5), wait=False)
    sent: list[np.ndarray] = [np.zeros(14)]
    for number in range(200):
        bridge.observe(Observation({}, sent[max(0, len(sent) - 5)], number / 25))  # of the fifth step before
        if bridge.ask() is not None:
            rows = 0.2 * np.sin(0.3 * (bridge._moved + np.arange(CHUNK))) + 0.05 * (bridge._moved // EXECUTE % 2)
            rows = np.repeat(rows[:, None], 14, 1)
            rows[5, 2] = 3.0  # a spike
            bridge.answer(rows)
        command = bridge.tick(number / 25 + (0.012 if number == 70 else 0))
        sent.append(command.positions)
    said = bridge.report()
    assert said[0].startswith("200 control steps, 40 (median) to 52 ms apart; 0 of them")
    joins = float(said[1].split("begins: ")[1].split(" (median)")[0])
    assert 0.03 < joins < 0.12
    assert said[2] == "24 chunks were handed over in motion, 0 of them later than announced"
    assert "cut by the guard: #2 " in said[3] and "#3" not in said[3]
    assert said[4] == "the state follows the commands 5 control steps late"
    assert Bridge(says(), wide()).report() == ["no control step was run"]


def test_the_state_may_be_that_of_the_commands() -> None:
    for own, shown in ((False, 5.0), (True, 7.0)):
        bridge = Bridge(says(execute=1), wide(), state_of_commands=own)
        bridge.observe(seen(4.0))
        assert bridge.ask().state[0] == 4.0
        bridge.answer(np.full((CHUNK, 14), 7.0))
        bridge.tick(0.0)
        bridge.observe(seen(5.0))
        assert bridge.ask().state[0] == shown


# ------------------------------------------------------------------------------------------- over a real websocket
class Rising(Stub):
    """14 numbers; every joint is to rise by a hundredth a step from where it is."""

    sizes = SimpleNamespace(chunk=CHUNK)
    config = SimpleNamespace(execute=EXECUTE, refresh_every=2)
    embodiment = Embodiment.as_recorded(14, 14)
    rows = 0.01 * np.arange(1, CHUNK + 1, dtype=np.float32)[:, None]

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Continued] = []

    def __call__(
        self, images: Any, robot_state: np.ndarray, state: StubState, continued: Any = None
    ) -> tuple[np.ndarray, StubState]:
        super().__call__(images, robot_state, state, continued)
        if continued is not None:
            self.told.append(continued)
        planned_at = state.planned_at if state.calls % 2 else state.elapsed
        after = StubState(state.seen, state.calls + 1, state.elapsed + EXECUTE, planned_at)
        return (robot_state[0] + self.rows)[None], after


class Obedient:
    """Is where it was told to be."""

    def __init__(self, cameras: Sequence[str]) -> None:
        self._images = {camera: np.zeros((16, 16, 3), np.uint8) for camera in cameras}
        self.state, self.written = np.full(14, 0.5, np.float32), []

    def read(self) -> Observation:
        return Observation(self._images, self.state, time.monotonic())

    def write(self, positions: np.ndarray) -> None:
        self.written.append(np.array(positions))
        self.state = np.float32(positions)


@pytest.mark.parametrize("wait", [True, False])
def test_a_robot_is_driven(wait: bool) -> None:
    """Moving on, it says with every observation but the first what it will run."""
    with running(Rising(), hand_over=HAND_OVERS["jacobian-free"]) as server, PolicyClient(server.url) as policy:
        robot, bridge = Obedient(policy.metadata["cameras"]), Bridge(policy.metadata, wide(), wait=wait)
        drive(robot, policy, bridge, 200.0, "rise", over=lambda: len(robot.written) >= 60)
    path = np.stack(robot.written)[:, 0]
    assert not bridge.stopped and len(path) == 60
    np.testing.assert_allclose(np.diff(path)[np.diff(path) != 0], 0.01, atol=1e-4)
    assert path[-1] > 0.5 + 0.01 * 20
    assert bool(server.policy.told) != wait
    for continued in server.policy.told:
        begun = np.flatnonzero(np.isclose(path, continued.actions[0, 0, 0], atol=1e-6))
        assert len(begun), "what is told is run"


def test_a_server_that_ends_stops_the_robot() -> None:
    policy = Rising()
    with running(policy) as server:
        client = PolicyClient(server.url)
        robot, bridge = Obedient(client.metadata["cameras"]), Bridge(client.metadata, wide())
        threading.Timer(0.3, server.end).start()
        drive(robot, client, bridge, 200.0, "rise", seconds=20)
        client.close()
    assert bridge.stopped.startswith("the policy is gone: ")


def test_latency_says_what_a_chunk_takes_in_control_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with running(Rising()) as server:
        call = [server.url, "--rate", "1000", "--calls", "20", "--size", "16", "16", "--instruction", "rise"]
        assert latency.main(call) == 0
        said = capsys.readouterr().out
        assert "L_chunk, round trip of 20 calls" in said and "with a planner refresh" in said
        assert "a chunk has 16 actions, of which 8 are run" in said and "that hides 8 step(s)" in said
        assert "the server's hand-over, skip, is for chunks that come up to 8 step(s) late: " in said
        assert latency.main([*call, "--calls", "1"]) == 1 and "at least 2 --calls" in capsys.readouterr().err
        assert latency.main([server.url, "--rate", "25"]) == 1 and "lacks prompt" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- the examples
@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.syspath_prepend(PACKAGE / "examples")
    import dry_run
    import piper
    import piper_ros2

    yield SimpleNamespace(dry_run=dry_run, piper=piper, ros=piper_ros2)
    for name in ("dry_run", "piper", "piper_ros2"):
        del sys.modules[name]


def test_pipers_numbers(examples: SimpleNamespace) -> None:
    """To the driver and back; limits in the policy's unit; joint 2 moves to one side only."""
    piper = examples.piper
    left, right = [0.1, 0.2, -0.3, 0.4, 0.5, 0.6, 0.035], [1.1, 1.2, -1.3, 1.4, 0.9, 1.6, 0.07]
    for unit, half, whole in (("scale", 0.5, 1.0), ("metres", 0.035, 0.07)):
        state = piper.from_driver(left, right, unit)
        assert state[[6, 13]].tolist() == pytest.approx([half, whole])
        back = piper.to_driver(state, unit)
        np.testing.assert_allclose(back, [left, right], rtol=1e-6)
        assert all(type(x) is float for part in back for x in part)
        guard = piper.guard(LABELS, 25, 0.5, unit)
        assert guard.upper[[6, 13]].tolist() == [whole, whole]
        assert guard.lower[1] == 0 and guard.upper[2] == 0 and guard.step[0] == pytest.approx(0.02)
    wrong = (({"speed": 4}, "at most 3"), ({"rate": 0}, "--rate is 0"), ({"labels": LABELS[:7]}, "has 7 numbers"))
    for changes, said in wrong:
        with pytest.raises(GuardError, match=said):
            piper.guard(**{"labels": LABELS, "rate": 25, "speed": 0.5, "gripper": "scale"} | changes)


def test_a_dry_run_without_ros(examples: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["--start", *map(str, [0, 0.5, -0.5, 0, 0, 0, 0.5] * 2)]
    with running(Rising()) as server:
        call = [server.url, "--instruction", "rise", "--seconds", "0.5", "--rate", "100", *start]
        assert examples.dry_run.main(call) == 0
        said = capsys.readouterr().out
        assert "#1 of the policy is the left joint 2, 0 to 3.14" in said
        assert "dry run: nothing is sent to the arms" in said and "would send  left" in said
        withheld = int(said.rpartition(" commands were withheld")[0].rpartition("\n")[2])
        assert 1 <= withheld <= 51 and "control steps," in said
        for more, wrong in (
            (["--speed", "9"], "at most 3"), (["--record", "x"], "a dry run drives nothing"),
            (["--token-file", "nowhere"], "No such file"),
        ):  # fmt: skip
            assert examples.dry_run.main([*call, *more]) == 1 and wrong in capsys.readouterr().err
        nowhere = [str(x) for x in [0, 0.5, 2.0, 0, 0, 0, 0.5] * 2]
        assert examples.dry_run.main([*call[:-15], "--start", *nowhere]) == 1
        assert "the first command is too far from where the robot is: #2 is at 2.000" in capsys.readouterr().err
    for url in ("ws://127.0.0.1:1", "http://127.0.0.1:8000", "127.0.0.1:8000"):
        assert examples.dry_run.main([url]) == 1
        assert "does not take this client" in capsys.readouterr().err


class Ros:
    """What the node uses of rclpy: topics whose messages come at once, in the thread that spins."""

    def __init__(self) -> None:
        self.listeners: dict[str, Any] = {}
        self.published: dict[str, list[list[float]]] = {}
        self.silent: set[str] = set()
        self._over = threading.Event()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rclpy = SimpleNamespace(
            init=lambda: None, create_node=lambda name: self, spin=self._spin, ok=lambda: not self._over.is_set(),
            try_shutdown=self._over.set,
        )  # fmt: skip
        msg = SimpleNamespace(JointState=lambda **fields: SimpleNamespace(**fields), Image=SimpleNamespace)
        monkeypatch.setitem(sys.modules, "rclpy", rclpy)
        monkeypatch.setitem(sys.modules, "sensor_msgs", SimpleNamespace(msg=msg))
        monkeypatch.setitem(sys.modules, "sensor_msgs.msg", msg)

    def create_subscription(self, kind: Any, topic: str, callback: Any, depth: int) -> None:
        self.listeners[topic] = callback

    def create_publisher(self, kind: Any, topic: str, depth: int) -> Any:
        return SimpleNamespace(publish=lambda m: self.published.setdefault(topic, []).append(m.position))

    def _spin(self, node: Any) -> None:
        image = SimpleNamespace(encoding="bgr8", height=2, width=2, step=8, data=bytes(16))
        while not self._over.wait(0.005):
            for topic, callback in list(self.listeners.items()):
                if topic not in self.silent:
                    at_rest = [0.0, 0.5, -0.5, 0.0, 0.0, 0.0, 0.035]
                    callback(SimpleNamespace(position=at_rest) if "joint_states" in topic else image)


@pytest.mark.parametrize("dry", [True, False])
def test_the_node(examples: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, dry: bool) -> None:
    """Topics in, topics out; a dry run publishes nothing."""
    ros = Ros()
    ros.install(monkeypatch)
    monkeypatch.setattr(examples.piper, "Bridge", partial(Bridge, patience=30.0))  # this machine may be busy
    with running(Rising()) as server:
        call = [server.url, "--instruction", "rise", "--seconds", "0.4", "--rate", "100", "--left", "/l", "--overlap",
                "--camera", "cam_high=/top", *(["--dry-run"] if dry else [])]  # fmt: skip
        assert examples.ros.main(call) == 0
    assert set(ros.listeners) == {
        "/l/joint_states_single", "/right/joint_states_single", "/top", "/cam_left_wrist/color/image_raw",
        "/cam_right_wrist/color/image_raw",
    }  # fmt: skip
    if dry:
        assert not ros.published
        return
    assert set(ros.published) == {"/l/joint_ctrl_single", "/right/joint_ctrl_single"}
    sent = np.array(ros.published["/l/joint_ctrl_single"])
    assert sent.shape[1] == 7
    assert (np.diff(sent[:, 1]) <= 0.5 / 100 + 1e-6).all() and sent[0, 6] == pytest.approx(0.035 + 0.07 * 0.005)


def test_what_is_driven_is_kept(
    examples: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An episode that ends well, with the commands as actions; one that was stopped is not kept."""
    options = argparse.ArgumentParser()
    examples.piper.add_options(options)
    robots: list[Obedient] = []

    def make(cameras: Sequence[str]) -> Obedient:
        robots.append(Obedient(cameras))
        robots[-1].state[[2, 9]] = -0.5  # which joint 3 has to be
        return robots[-1]

    folder = tmp_path / "driven"
    with running(Rising()) as server:
        call = [server.url, "--rate", "50", "--record", str(folder)]
        assert examples.piper.run(make, options.parse_args(call), False) == 1
        assert "--record needs --instruction" in capsys.readouterr().err
        call += ["--instruction", "rise", "--seconds", "0.6"]
        assert examples.piper.run(make, options.parse_args(call), False) == 0
        assert f"kept as episode 0 of {folder}" in capsys.readouterr().out
        policy_fails = [*call[:-4], "--instruction", "fail", "--seconds", "9"]
        assert examples.piper.run(make, options.parse_args(policy_fails), False) == 1
    dataset = open_episodes(folder)
    assert len(dataset.lengths) == 1 and dataset.instruction(0) == "rise"
    np.testing.assert_allclose(dataset.actions(0), np.float32(robots[0].written), rtol=1e-6)
    np.testing.assert_array_equal(dataset.states(0)[1:], np.float32(robots[0].written)[:-1])


def test_a_silent_topic_is_named(
    examples: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ros = Ros()
    ros.install(monkeypatch)
    ros.silent = {"/right/joint_states_single"}
    real = time.monotonic
    with running(Rising()) as server:
        monkeypatch.setattr(examples.ros, "time", SimpleNamespace(monotonic=lambda: 100 * real(), sleep=time.sleep))
        assert examples.ros.main([server.url, "--instruction", "rise"]) == 1
        assert "nothing comes from /right/joint_states_single (ros2 topic hz TOPIC)" in capsys.readouterr().err
        assert examples.ros.main([server.url, "--instruction", "rise", "--camera", "cam_low=/x"]) == 1
        assert "--camera names cam_low; the policy looks at cam_high" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        examples.ros.main([server.url, "--camera", "/x"])
    assert "--camera is /x; expected NAME=TOPIC" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "rclpy", None)
    assert examples.ros.main([server.url]) == 1 and "source its setup.bash first" in capsys.readouterr().err


def test_pictures_of_ros(examples: SimpleNamespace) -> None:
    """Red first, without what a row is padded with."""
    row = bytes([1, 2, 3, 4, 5, 6, 99, 99])
    image = SimpleNamespace(encoding="bgr8", height=2, width=2, step=8, data=row * 2)
    assert examples.ros.picture_of(image).tolist() == [[[3, 2, 1], [6, 5, 4]]] * 2
    image.encoding = "rgb8"
    assert examples.ros.picture_of(image).tolist() == [[[1, 2, 3], [4, 5, 6]]] * 2
    with pytest.raises(ValueError, match="the right driver sends 6 numbers; expected six joints and the gripper"):
        examples.piper.from_driver([0.0] * 7, [0.0] * 6, "scale")
    image.encoding = "yuv422"
    with pytest.raises(ValueError, match="a camera sends yuv422; expected rgb8 or bgr8"):
        examples.ros.picture_of(image)


def test_the_examples_are_light() -> None:
    allowed = {*sys.stdlib_module_names, "ahawam_client", "numpy", "piper", "rclpy", "sensor_msgs"}
    for path in sorted((PACKAGE / "examples").glob("*.py")):
        assert {name.partition(".")[0] for name in imported(path)} <= allowed, path
        ast.parse(path.read_text(), feature_version=(3, 10))
