"""Exports of checkpoints trained with committed actions: the same chunks as in JAX, in PyTorch and in ONNX."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from ahawam_jax.inference.continuing import Continued, Guidance
from ahawam_jax.inference.handover import HAND_OVERS
from ahawam_jax.inference.policy import Policy
from ahawam_jax.inference.streaming import StreamedPolicy, StreamSettings
from data_pipelines.normalization import recoverable
from export.checks.reference import Reference
from export.checks.samples import random_samples
from export.engines.onnx_graphs import make_graphs, write_onnx
from export.exported import load_export
from export.loading import load_policy
from export.runtime import DeployedPolicy
from export.to_torch import convert
from tests import tiny_config
from tests.export.engines.test_onnx_graphs import check
from tests.export.test_runtime import TOLERANCE, WORDS, observations, same_noise  # noqa: F401
from tests.export.test_to_torch import import_random
from tests.serving.stub import expected, running
from tests.tiny_model import assert_close

MAX_DELAY, BATCH = 2, 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config.get_config()
    config.objective.max_delay = MAX_DELAY
    config.policy.execute = 2
    return import_random(config, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "tiny"
    convert(run, out)
    return out


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def drive(policy: Policy | DeployedPolicy) -> np.ndarray:
    """Chunks that go on from 0, 1 and 2 committed actions of the one before, cut as in training; each has its plan."""
    state, chunks = policy.start(WORDS[:BATCH]), []
    rest = np.zeros((BATCH, 0, 3), np.float32)
    for delay, (images, joints) in enumerate(observations(BATCH, 3)):
        seen = policy.encode(images, joints, BATCH)
        chunk, state = policy.act(seen, policy.refresh(seen, state), Continued(rest, delay) if delay else None)
        cut = recoverable(rest[:, :delay], policy.statistics["action"])
        np.testing.assert_allclose(chunk[:, :delay], cut, rtol=1e-5)
        chunks.append(chunk)
        rest = chunk[:, 2:]
    return np.stack(chunks)


def test_acts_as_jax_does(run: Path, exported: Path, same_noise: None) -> None:  # noqa: F811
    with jax.default_matmul_precision("highest"):
        expected = drive(Policy.load(run))
    policy = DeployedPolicy.load(exported, device="cpu")
    assert_close(drive(policy), expected, TOLERANCE)
    for name in ("trained", "skip", "wait"):
        HAND_OVERS[name].check(policy, MAX_DELAY)
    with pytest.raises(ValueError, match="guided changes the Euler steps"):
        HAND_OVERS["guided"].check(policy, 1)
    state, (images, joints) = policy.start(WORDS[:1]), observations(1, 1)[0]
    seen = policy.encode(images, joints, 1)
    state = policy.refresh(seen, state)
    with pytest.raises(ValueError, match="3 committed actions was asked for, .* at most 2"):
        policy.act(seen, state, Continued(np.zeros((1, 4, 3), np.float32), 3))
    with pytest.raises(ValueError, match="which an export has fixed"):
        policy.act(seen, state, Continued(np.zeros((1, 4, 3), np.float32), 1, Guidance()))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["run", "export"])
def test_served_it_goes_on_from_what_a_client_will_run(
    run: Path, exported: Path, kind: str, streaming: bool
) -> None:
    """Bit for bit what the policy does here, in the schedule that is the same with two streams and without."""
    policy = load_policy(exported if kind == "export" else run)
    shown = [{"images": {camera: view[0] for camera, view in images.items()}, "state": joints[0], "prompt": WORDS[0]}
             for images, joints in observations(1, 4)]  # fmt: skip
    rests = [np.random.default_rng(n).normal(size=(2, 3)).astype(np.float32) for n in range(4)]
    told = [message | {"rest": rests[n], "delay": n % 3} for n, message in enumerate(shown)]
    wanted, plain = expected(policy, told, HAND_OVERS["trained"]), expected(policy, shown)
    assert np.array_equal(wanted[0], plain[0]) and not np.array_equal(wanted[1], plain[1])
    age = StreamSettings(max_age=(policy.config.refresh_every - 1) * policy.config.execute)
    served = StreamedPolicy(policy, age, several=kind == "run") if streaming else policy
    with running(served) as server:
        server.server.warm_up()
        for messages, want in ((told, wanted), (shown, plain)):
            with server.client() as client:
                answers = [client.ask(message) for message in messages]
            np.testing.assert_array_equal([answer["actions"] for answer in answers], want)
        with server.client() as client:
            assert (client.metadata["hand_over"], client.metadata["max_delay"]) == ("trained", MAX_DELAY)
            client.send(told[0] | {"rest": np.zeros((4, 3)), "delay": 3})
            assert "comes 3 rows late cannot be handed over in motion" in client.refused()


def test_its_graph_computes_what_jax_does_and_so_does_its_file(exported: Path, tmp_path: Path) -> None:
    export = load_export(exported)
    graph = make_graphs(export)["executor"]
    assert list(graph.inputs)[-2:] == ["committed", "first"]
    counts, reference = [], Reference(export)
    for sample in random_samples(export, 3):
        counts.append(sample.count)
        call = reference(sample)[-1]
        k, v = export.executor.text(torch.from_numpy(sample.text[None]))
        inputs = {name: torch.from_numpy(x.copy()) for name, x in call.inputs.items()} | {"text_k": k, "text_v": v}
        assert_close(graph(**inputs)["actions"].numpy(), call.outputs["actions"], TOLERANCE)
        np.testing.assert_array_equal(call.outputs["actions"][0, : sample.count], sample.committed[: sample.count])
    assert counts == [1, 2, 0]
    write_onnx(graph, tmp_path / "executor.onnx")
    check(graph, tmp_path / "executor.onnx")
