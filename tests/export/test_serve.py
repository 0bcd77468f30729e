"""`ahawam serve`, for a run and for an export: what its clients get is what the policy computes, until SIGTERM."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from ahawam_jax.inference.policy import Policy
from ahawam_jax.inference.streaming import StreamedPolicy, StreamSettings
from ahawam_jax.serving.server import Limits
from data_pipelines.canvas import CAMERAS
from export import serve
from export.loading import load_policy
from export.runtime import DeployedPolicy
from tests.conftest import REPOSITORY
from tests.serving.stub import Asking, expected, running

CALLS = 3  # a refresh, a chunk of the same plan, another refresh


def observations(seed: int, prompt: str = "open the drawer") -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {"images": {camera: rng.integers(0, 256, (40, 48, 3), np.uint8) for camera in CAMERAS},
         "state": rng.normal(size=5).astype(np.float32), "prompt": prompt}
        for _ in range(CALLS)
    ]  # fmt: skip


@contextmanager
def served(*arguments: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address that the command listens at, and its process."""
    command = [sys.executable, "-m", "ahawam_jax", "serve", "--port=0", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes) as process:
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("serving at "):
                    break
            assert lines and lines[-1].startswith("serving at "), "".join(lines)
            assert any(line.startswith("ready after") for line in lines[:-1])  # it warms up before it accepts
            yield lines[-1].split()[-1], process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("kind", "arguments"), [("run", []), ("export", []), ("export", ["--streaming", "--max-age=4"])]
)
def test_the_command(plain_export: Path, kind: str, arguments: list[str]) -> None:
    """Bit for bit what the policy of this process computes, and an orderly end."""
    folder = plain_export if kind == "export" else plain_export.parent / "run"
    policy = DeployedPolicy.load(folder, device="cpu") if kind == "export" else Policy.load(folder)
    with served(f"--checkpoint={folder}", *arguments) as (url, process), Asking(url) as client:
        for shown in (observations(0), observations(1, "close the drawer")):
            found = [client.ask(message)["actions"] for message in shown]
            np.testing.assert_array_equal(found, expected(policy, shown))
        assert client.metadata["execute"] == policy.config.execute and client.metadata["chunk"] == len(found[0])
        assert (client.metadata["hand_over"], client.metadata["max_delay"]) == ("skip", 0)
        if kind == "export":
            with pytest.raises(InvalidStatus, match="503"):
                Asking(url)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed) as closed:
            client.receive()
        assert closed.value.rcvd.code == 1001
        assert process.wait(20) == 0


def test_episodes_of_several_clients_in_one_model(plain_export: Path) -> None:
    """Three, call by call in turn, one policy: bit for bit as if each were alone."""
    policy = Policy.load(plain_export.parent / "run")
    shown = [observations(seed) for seed in range(3)]
    with running(policy, Limits(clients=3)) as server:
        assert server.server.warm_up() > 0
        clients = [server.client() for _ in shown]
        found = [[client.ask(shown[number][call])["actions"] for number, client in enumerate(clients)]
                 for call in range(CALLS)]  # fmt: skip
        for client in clients:
            client.__exit__()
    for number in range(3):
        np.testing.assert_array_equal([chunks[number] for chunks in found], expected(policy, shown[number]))


@pytest.mark.parametrize("kind", ["run", "export"])
def test_two_streams(plain_export: Path, kind: str) -> None:
    """Where max_age asks for the synchronous schedule, bit for bit that; and the plan's age is told and counted."""
    policy = load_policy(plain_export if kind == "export" else plain_export.parent / kind)
    shown = observations(0), observations(1, "close the drawer")
    wanted = [expected(policy, messages) for messages in shown]
    streams = StreamedPolicy(policy, StreamSettings(max_age=policy.config.execute), several=kind == "run")
    with running(streams) as server, server.client() as client:
        assert server.server.warm_up() > 0
        for messages, want in zip(shown, wanted, strict=True):
            answers = [client.ask(message) for message in messages]
            np.testing.assert_array_equal([answer["actions"] for answer in answers], want)
        assert [answer["plan_age"] for answer in answers] == [0, 4, 0]
        assert [answer["refreshed"] for answer in answers] == [True, False, True]
        assert [(answer["held"], answer["planner_error"]) for answer in answers] == [(False, None)] * CALLS
        assert answers[0]["plan_age_ms"] == answers[2]["plan_age_ms"] == 0 < answers[1]["plan_age_ms"]
        assert server.metric("ahawam_plan_age_seconds_count") == 6 and server.metric("ahawam_refreshes_total") == 4


def test_a_failing_planner_is_told_until_its_plan_is_too_old(plain_export: Path) -> None:
    policy = load_policy(plain_export.parent / "run", execute=2)
    streams = StreamedPolicy(policy, StreamSettings(), several=True)
    with running(streams) as server, server.client() as client:
        answers = [client.ask(observations(0)[0])]
        policy.refreshing = lambda observation, state: 1 / 0
        for _ in range(3):
            answers.append(client.ask(observations(0)[0]))
            streams._stream._background.wait()
        assert [answer["plan_age"] for answer in answers] == [0, 2, 4, 6]
        assert answers[1]["planner_error"] is None
        assert answers[3]["planner_error"] == "refresh 1 failed (ZeroDivisionError: division by zero)."
        client.send(observations(0)[0])
        sentence = client.refused(1011)
        assert "the policy failed (PlannerError: there is no plan to act from at control step 8" in sentence
        assert server.metric("ahawam_planner_failures_total") == 1
        del policy.refreshing
        with server.client() as other:
            assert other.ask(observations(0)[0])["planner_error"] is None


def test_a_first_call_needs_an_instruction_that_was_encoded(
    robotwin_export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main([f"--checkpoint={robotwin_export}", "--port=0"]) == 1
    said = capsys.readouterr().err
    assert "give one with --instruction" in said and "has no text tokens" in said


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("export", ["--clients=2"], "an export holds one episode at a time"),
        ("export", ["--robot=piper"], "an export is of one robot"),
        ("run", ["--target=rtx5090d"], "is no export; leave it out"),
        ("run", ["--clients=0"], "the limit of clients is 0; expected more than 0"),
        ("run", ["--max-rate=-1"], "the limit of rate is -1.0"),
        ("run", ["--token-file=/dev/null"], "/dev/null holds no token"),
        ("run", ["--max-age=4", "--late=hold"], "--max-age, --late goes with --streaming; add it"),
        ("run", ["--streaming", "--max-age=8"], "max_age is 8 control steps; expected 0 to 7"),
        ("run", ["--streaming", "--refresh-slices=3"], "refresh_slices is 3; expected 1 to 2"),
        ("export", ["--streaming", "--refresh-slices=2"], "an export has a stream for its planner"),
        ("run", ["--hand-over=trained", "--execute=2"], "this checkpoint was trained without any"),
        ("run", ["--hand-over=roll-forward", "--execute=2"], "5 numbers of a state, 3 of an action"),
        ("run", ["--hand-over=guided"], "with policy.execute 4 of 4 actions, delays go up to 0"),
        ("export", ["--hand-over=guided", "--execute=2"], "guided changes the Euler steps, which are fixed in what"),
        ("run", ["--port=65536"], "--port is 65536; expected 0 to 65535"),
        ("nothing", [], "nothing"),
    ],
)
def test_mistakes_are_sentences(
    plain_export: Path, capsys: pytest.CaptureFixture[str], kind: str, arguments: list[str], said: str
) -> None:
    folder = plain_export if kind == "export" else plain_export.parent / kind
    assert serve.main([f"--checkpoint={folder}", *arguments]) == 1
    found = capsys.readouterr().err
    assert found.startswith("error: ") and said in found

def test_a_taken_port_is_a_sentence(plain_export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running() as server:
        assert serve.main([f"--checkpoint={plain_export.parent / 'run'}", f"--port={server.port}"]) == 1
    assert "address already in use" in capsys.readouterr().err


def test_which_addresses_are_this_machines_own() -> None:
    assert all(map(serve.is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(serve.is_loopback, ("0.0.0.0", "::", "10.0.0.1", "robot", "")))
