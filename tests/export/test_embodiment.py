"""An export for a robot that has other numbers than the model: mask, own vector and black views as in JAX."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from ahawam_jax.inference.policy import Policy
from ahawam_jax.towers.latents import make_canvas
from data_pipelines.episodes import DatasetError
from data_pipelines.normalization import normalize
from data_pipelines.readers.subset import embodiment_of, open_datasets
from export.checks.reference import Reference
from export.checks.samples import random_samples, recorded_samples
from export.checks.subject import OnnxFile
from export.engines.onnx_graphs import make_graphs, write_onnx
from export.exported import load_export
from export.manifest import EMBODIMENT, read_manifest
from export.runtime import DeployedPolicy
from export.to_torch import convert, main
from export.validate import validate
from tests.data_pipelines.synthetic_robocoin import UNSEEN, Synthetic
from tests.export.test_runtime import same_noise  # noqa: F401
from tests.inference.test_embodiment import KEEP, OWN_STATES, ROBOT, WAIST, WAISTS, drive, save_run
from tests.tiny_model import assert_close

# Float32 of two layers through two plans and two steps, in the robot's units.
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "a"
    assert main([str(run), "--out", str(out), "--robot", "a", "--dataset", "cups"]) == 0
    return out


def test_an_export_is_of_one_robot(run: Path, exported: Path, tmp_path: Path) -> None:
    opened = load_export(exported, hashes=True)
    assert opened.embodiment == ROBOT and opened.executor.present.tolist() == KEEP.tolist()
    with pytest.raises(DatasetError, match="'a' differ in its own vector or units"):
        convert(run, tmp_path / "out", robot="a")
    convert(run, tmp_path / "b", robot="b")
    plain = load_export(tmp_path / "b")
    assert EMBODIMENT not in plain.manifest["files"] and plain.executor.present is None and not plain.embodiment.held
    assert read_manifest(tmp_path / "b")["source"]["sha256"] != read_manifest(exported)["source"]["sha256"]


def test_acts_as_jax_does(run: Path, exported: Path, same_noise: None) -> None:  # noqa: F811
    """In the robot's own order and units, from its own state; what is not driven is held."""
    policy = DeployedPolicy.load(exported, device="cpu")
    with jax.default_matmul_precision("highest"):
        want = drive(Policy.load(run, "a", "cups"), OWN_STATES)
    got = drive(policy, OWN_STATES)
    assert_close(got, want, TOLERANCE)
    assert got.dtype == np.float32 and policy.embodiment.held == ("waist",)
    np.testing.assert_array_equal(got[..., WAIST], np.broadcast_to(np.stack(WAISTS), (3, 2, 4)))
    images = {"cam_high": np.zeros((1, 8, 8, 3), np.uint8)}
    with pytest.raises(ValueError, match=r"expected \(1, 15\) finite numbers \(right_0, "):
        policy(images, np.zeros((1, 16)), policy.start(["go"]))


def test_a_robot_of_one_camera_sees_black_beside_it(exported: Path) -> None:
    wrists = ("cam_left_wrist", "cam_right_wrist")
    export = load_export(exported)
    alone = dataclasses.replace(export, embodiment=dataclasses.replace(ROBOT, absent=wrists))
    settings = DeployedPolicy.load(exported, device="cpu").config
    policies = [DeployedPolicy(x, settings, torch.device("cpu")) for x in (alone, export)]
    views = {name: np.full((1, 8, 8, 3), 99, np.uint8) for name in ("cam_high", *wrists)}
    black = views | {name: np.zeros_like(views[name]) for name in wrists}
    given = {"cam_high": views["cam_high"]}, black
    state = OWN_STATES[0][:1]
    got, want = (policy(x, state, policy.start(["go"]))[0] for policy, x in zip(policies, given, strict=True))
    np.testing.assert_array_equal(got, want)


def test_loop_and_file_hold_the_mask(exported: Path, tmp_path: Path) -> None:
    """Twin and ONNX against the reference in JAX, from noise that is not 0 where a number is absent."""
    assert validate(exported, samples=1)["passed"]
    export = load_export(exported)
    graph = make_graphs(export)["executor"]
    write_onnx(graph, tmp_path / "executor.onnx")
    call = Reference(export)(random_samples(export, 1)[0])[-1]
    assert not call.outputs["actions"][..., ~KEEP].any() and call.inputs["noise"][..., ~KEEP].any()
    with torch.no_grad():
        text = torch.from_numpy(random_samples(export, 1)[0].text[None])
        words = dict(zip(("text_k", "text_v"), export.executor.text(text), strict=True))
        inputs = {name: torch.from_numpy(np.array(x)) for name, x in call.inputs.items()} | words
        inputs = {name: inputs[name] for name in graph.inputs}
        for made in (graph(**inputs), OnnxFile(tmp_path / "executor.onnx")(**inputs)):
            actions = made["actions"].numpy()
            assert not actions[..., ~KEEP].any()
            assert_close(actions, call.outputs["actions"])


def test_recorded_samples_are_of_the_robot(exported: Path, tmp_path: Path) -> None:
    """Out of a subset file with another robot before it: one right arm, no left camera."""
    for name in ("single_view", "one_arm"):
        Synthetic(UNSEEN[name], lengths=(60,)).write(tmp_path / name)
    entry = '[[dataset]]\nname = "{0}"\npath = "{0}"\nweight = 1\nrobot = "{0}"\nlayout = "two_arms"\n'
    subset = tmp_path / "subset.toml"
    subset.write_text("".join(map(entry.format, ("single_view", "one_arm"))))
    dataset = open_datasets(subset)[1].dataset
    export = dataclasses.replace(load_export(exported), embodiment=embodiment_of(dataset))
    export.config.data.history_stride = 4
    sample = recorded_samples(export, subset, 1)[0]
    np.testing.assert_array_equal(sample.state, normalize(dataset.states(0)[0], export.statistics["state"]))
    views = {name: dataset.frames(0, name, [0]) for name in make_canvas(export.config).cameras}
    np.testing.assert_array_equal(sample.frames[-1:], make_canvas(export.config).compose(views))
    with pytest.raises(ValueError, match="of the export's robot, whose own state and action have 15 and 15 numbers"):
        recorded_samples(load_export(exported), subset, 1)
