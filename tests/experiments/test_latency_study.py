"""The latency study: when a chunk is run, which plan it has, that a killed study goes on, and its page."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ahawam_jax.commands import latency_study as command
from ahawam_jax.experiments import latency_study as study
from ahawam_jax.experiments.latency_page import figure, table
from ahawam_jax.experiments.latency_study import FULL, QUICK, RESULTS, Cell, cells, drive, jerk
from ahawam_jax.inference import policy as policy_module
from ahawam_jax.inference.handover import HAND_OVERS
from data_pipelines import json_lines
from data_pipelines.simulation.env import EPISODE_STEPS
from data_pipelines.simulation.parallel import ParallelSims

CHUNK, EXECUTE, EVERY = 16, 8, 2


class State(SimpleNamespace):
    def replace(self, **changes: Any) -> "State":
        return State(**(vars(self) | changes))


class Told:
    """A policy whose commands say when they were asked for: 1000 * clock of the observation + row of the chunk.

    asked: of every call, by clock, what it was given.
    """

    max_delay, can_guide = CHUNK, True

    def __init__(self, routing: bool = True) -> None:
        self.config = SimpleNamespace(execute=EXECUTE, refresh_every=EVERY, routing=routing)
        self.sizes = SimpleNamespace(chunk=CHUNK)
        self.asked: list[tuple[int, Any, State]] = []

    def start(self, instructions: Sequence[str]) -> State:
        return State(context=None, planned_at=0, elapsed=0, calls=0, memory=0)

    def encode(self, images: Any, robot_state: np.ndarray, episodes: int) -> int:
        return images

    def refresh(self, clock: int, state: State) -> State:
        return state.replace(context=clock, planned_at=state.elapsed, memory=state.memory + 1)

    def act(self, clock: int, state: State, continued: Any) -> tuple[np.ndarray, State]:
        self.asked.append((clock, continued, state))
        rows = 1000.0 * clock + np.arange(CHUNK)
        return np.tile(rows[None, :, None], (2, 1, 14)), state


class Clocked:
    """A simulation whose image is the clock."""

    def __init__(self) -> None:
        self.clock, self.success = 0, np.array([True, False])

    def observe(self) -> tuple[np.ndarray, int]:
        return np.full((2, 14), -7.0), self.clock

    def run(self, rows: np.ndarray) -> tuple[np.ndarray, int]:
        self.clock += rows.shape[1]
        return self.observe()


def driven(**cell: Any) -> tuple[np.ndarray, Told]:
    """Commands of the first episode's first joint, by clock, and the policy."""
    policy = Told()
    rows = drive(policy, Clocked(), "transfer_cube", Cell("run", **cell))
    assert rows.shape == (2, EPISODE_STEPS + 1, 14) and (rows == rows[:1, :, :1]).all()
    assert rows[0, 0, 0] == -7
    return rows[0, 1:, 0], policy


@pytest.mark.parametrize("delay", [0, 1, 4, 8])
@pytest.mark.parametrize("name", HAND_OVERS)
def test_every_row_is_of_the_chunk_that_is_there(name: str, delay: int) -> None:
    """A chunk asked for at n is run from n + delay on; asked is every 8 rows, in motion, or every 8 + delay."""
    rows, policy = driven(hand_over=name, latency=40 * delay)
    period = EXECUTE + (0 if HAND_OVERS[name].moves else delay)
    assert [clock for clock, *_ in policy.asked] == list(range(0, EPISODE_STEPS, period))
    begins = delay if name in ("wait", "roll-forward") else 0  # row after the observation that its action 0 is for
    for clock, ran in enumerate(rows):
        asked = (clock - delay) // period * period
        if clock < delay:
            assert ran == -7  # it holds where it is
        elif name == "wait" and clock % period < delay:
            assert ran == rows[clock - clock % period - 1]
        else:
            assert ran == 1000 * asked + clock - asked - begins


def test_what_is_committed_is_what_is_run() -> None:
    rows, policy = driven(hand_over="trained", latency=160)
    for clock, continued, _ in policy.asked[:-1]:
        assert continued.committed == 4
        np.testing.assert_array_equal(continued.actions[0, :, 0], rows[clock : clock + 4])


@pytest.mark.parametrize("takes", [0, 8, 16, 20, 32])
def test_a_plan_is_used_from_when_it_is_there(takes: int) -> None:
    """Chunks come every 8 rows, refreshes begin every 16 or, where they take longer, one after the other."""
    _, policy = driven(planner=40 * takes)
    period = max(16, -(-takes // EXECUTE) * EXECUTE)
    begun = {0: 0} | {at: at + takes for at in range(EVERY * EXECUTE, 2 * EPISODE_STEPS, period)}
    for clock, _, state in policy.asked:
        assert state.context == max(at for at, there in begun.items() if there <= clock)
        assert state.planned_at == state.context and state.elapsed == clock
        assert state.memory == sum(at <= clock for at in begun)


def test_rows_in_which_the_robot_stands_do_not_count_as_elapsed() -> None:
    _, policy = driven(latency=160)
    assert [state.elapsed for *_, state in policy.asked[:3]] == [0, 8, 16]
    assert [clock for clock, *_ in policy.asked[:3]] == [0, 12, 24]


def test_jerk_of_a_cubic_is_its_third_derivative() -> None:
    """2 t^3 rad has 12 rad/s^3 everywhere; grippers do not count."""
    t = np.arange(50) / 25
    rows = np.zeros((2, 50, 14))
    rows[0] = (2 * t**3)[:, None]
    rows[..., [6, 13]] = np.random.default_rng(0).normal(size=(2, 50, 2))
    np.testing.assert_allclose(jerk(rows), [12, 0], rtol=1e-5)


def test_cells_are_named_once() -> None:
    for size in (FULL, QUICK):
        named = [cell.key for cell in cells(["plain", "delayed"], size)]
        assert len(set(named)) == len(named)
        for run in ("plain", "delayed"):
            found = [cell for cell in cells(["plain", "delayed"], size) if cell.run == run]
            assert {cell.hand_over for cell in found} == set(HAND_OVERS)
            assert {(c.planner, c.routing) for c in found} >= {(p, r) for p in size.planner for r in (True, False)}


def test_cells_of_one_hand_over() -> None:
    found = list(cells(["plain"], QUICK, ["wait"]))
    assert {cell.hand_over for cell in found} == {"wait"} and set(found) < set(cells(["plain"], QUICK))
    assert {cell.latency for cell in found} == set(QUICK.latencies)
    assert {cell.planner for cell in found} == set(QUICK.planner)


# --------------------------------------------------------------------------------------------------------- the command
@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command without model and simulation; the cells that it measured."""
    measured: list[str] = []

    def measure(policy: Any, task: str, cell: Cell, episodes: int, processes: int) -> dict[str, Any]:
        measured.append(cell.key)
        line = {"key": cell.key, **vars(cell), "task": task, "execute": EXECUTE}
        success = [True] * (episodes - 1) + [cell.latency < 200]
        return line | {"success": success, "jerk": [5.0 + cell.latency] * episodes}

    class Loaded(Told):
        @classmethod
        def load(cls, path: Path, routing: bool) -> "Loaded":
            loaded = cls(routing)
            loaded.max_delay = 8 if "delay" in str(path) else 0
            loaded.embodiment = SimpleNamespace(state=VECTOR, action=VECTOR)
            return loaded

    monkeypatch.setattr(study, "measure", measure)
    monkeypatch.setattr(policy_module, "Policy", Loaded)
    return measured


VECTOR = SimpleNamespace(names=("",), places=(0,), present=np.array([True]))


def test_a_study_goes_on_where_it_was_killed(stubbed: list[str], tmp_path: Path, capsys: Any) -> None:
    argv = [str(tmp_path / "plain"), str(tmp_path / "delayed" / "run"), "--out", str(tmp_path / "out"), "--quick"]
    command.main(argv)
    everything = list(stubbed)
    assert len(set(everything)) == len(everything) and not [key for key in everything if "plain: trained" in key]
    said = capsys.readouterr().out
    assert "left out: plain: trained, chunk 160 ms, plan 0 ms. A chunk with 4 committed actions" in said
    assert "delayed: trained, chunk 320 ms" in said
    whole = (tmp_path / "out" / RESULTS).read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in (0, 3, len(lines[0]), len(lines[0]) + 3, len(whole) - 1):
        (tmp_path / "out" / RESULTS).write_bytes(whole[:cut])
        stubbed.clear()
        command.main(argv)
        assert stubbed == everything[whole[:cut].count(b"\n") :]
        assert (tmp_path / "out" / RESULTS).read_bytes() == whole
    assert table(json_lines.read(tmp_path / "out" / RESULTS)) in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(SystemExit, match="holds 50 episodes of transfer_cube a cell, asked for are 5"):
        command.main([*argv, "--episodes", "5"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a", "b/a/run"], "The runs are called a, a; give folders of different names"),
        (["a", "--task", "juggling"], "--task is 'juggling'; expected one of"),
        (["a", "--episodes", "0"], "--episodes is 0; expected at least 1"),
        (["a", "--hand-overs", "wait", "jump"], "--hand-overs names jump; expected some of wait, skip"),
    ],
)
def test_mistakes_are_sentences(stubbed: list[str], tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        command.main([*arguments, "--out", str(tmp_path / "out")])


def test_table_and_figure_say_what_was_measured() -> None:
    lines = [
        {"run": "a<b", "hand_over": name, "latency": ms, "planner": plan, "routing": routed, "success": [True, False],
         "jerk": [1.0, 3.0]}
        for name, ms, plan, routed in (("wait", 0, 0, True), ("skip", 160, 0, True), ("wait", 0, 640, True),
                                       ("wait", 0, 640, False))
    ]  # fmt: skip
    rows = table(lines).splitlines()
    assert len(rows) == 2 + len(lines) and len({len(row) for row in rows}) == 1
    assert [cell.strip() for cell in rows[3].split("|")][1:-1] == [
        "a<b", "skip", "160 ms", "0 ms", "1/2", "50%", "9% - 91%", "2",
    ]  # fmt: skip
    from xml.etree import ElementTree

    root = ElementTree.fromstring(figure(lines))
    texts = {x.text for x in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"a<b: skip", "a<b: plans, not routed", "latency of a plan, ms"} <= texts
    ElementTree.fromstring(figure(lines[:1]))


@pytest.mark.slow
def test_an_episode_in_the_simulation() -> None:
    """Commands that hold the first pose, handed over late: every row is that pose, nothing succeeds."""

    class Still(Told):
        pose = None

        def encode(self, images: Any, robot_state: np.ndarray, episodes: int) -> np.ndarray:
            self.pose = robot_state if self.pose is None else self.pose
            return self.pose

        def refresh(self, robot_state: np.ndarray, state: State) -> State:
            return state.replace(context=0)

        def act(self, robot_state: np.ndarray, state: State, continued: Any) -> tuple[np.ndarray, State]:
            return np.repeat(robot_state[:, None], CHUNK, 1), state

    with ParallelSims("transfer_cube", range(2), 1) as sims:
        rows = drive(Still(), sims, "transfer_cube", Cell("run", "skip", 160))
        assert rows.shape == (2, EPISODE_STEPS + 1, 14) and not sims.success.any()
    np.testing.assert_array_equal(rows, rows[:, :1].repeat(EPISODE_STEPS + 1, 1))
