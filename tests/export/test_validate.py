"""Validation: passes what is right, names what is wrong and where, and says the same in all its forms."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from ahawam_jax.towers.latents import make_canvas
from data_pipelines.canvas import CAMERAS
from data_pipelines.embodiment import Embodiment
from data_pipelines.normalization import normalize
from data_pipelines.readers.opening import open_episodes
from export import validate
from export.checks import subject
from export.checks.blocks import FLOOR, locate
from export.checks.reference import Reference
from export.checks.samples import random_samples, recorded_samples
from export.engines.onnx_graphs import make_graphs
from export.exported import load_export
from export.manifest import FILE as MANIFEST
from export.manifest import ExportError, sha256
from export.to_tensorrt import onnx_file
from export.validate import CHUNK, REFRESH, Row, main, markdown
from tests.data_pipelines.tiny_dataset import write_dataset
from tests.export.conftest import INSTRUCTIONS
from tests.tiny_model import assert_close

ROWS = ["vae", "planner", "router", "executor", REFRESH, CHUNK]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "tiny")


# ------------------------------------------------------------------------------------------------------- what is right
def test_float32_files_pass(
    robotwin_export: Path, float32_engines: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """onnxruntime on the files beside the engines, random and recorded samples; table and JSON say the same."""
    engines = Path(shutil.copytree(float32_engines, tmp_path / "engines"))
    command = [str(robotwin_export), "--engines", str(engines), "--dataset", str(dataset), "--samples", "2"]
    assert main(command) == 0
    printed, report = capsys.readouterr().out, json.loads((engines / validate.FILE).read_text())
    assert "ONNX files under onnxruntime" in report["ran"] and report["ran"] in printed
    assert report["samples"] == {"random": 2, "recorded": 2} and "2 recorded" in printed
    assert report["passed"] and report["located"] == {} and report["steps"] == 2
    assert [row["graph"] for row in report["rows"]] == ROWS
    assert all(row["relative"] <= 2e-5 and row["cosine_min"] > 1 - 1e-9 for row in report["rows"])
    table = [re.split(r" *\| *", line.strip("| ")) for line in printed.splitlines() if line.startswith("| ")][1:]
    assert len(table) == len(report["rows"])
    for cells, row in zip(table, report["rows"], strict=True):
        numbers = [row[name] for name in ("cosine_mean", "cosine_min", "absolute", "relative", "nan", "inf")]
        np.testing.assert_allclose([float(x) for x in cells[1:7]], numbers, rtol=1e-2)
        assert cells[0] == row["graph"] and cells[7] == "passed"
    # Two random samples of memory + 2 refreshes; of two windows the first has no history, the last a whole one.
    assert [row["outputs"] for row in report["rows"]] == [16, 24, 8, 4, 24, 4]


def test_bfloat16_passes_its_own_gate(robotwin_export: Path, bfloat16_engines: Path, tmp_path: Path) -> None:
    engines = Path(shutil.copytree(bfloat16_engines, tmp_path / "engines"))
    report = validate.validate(robotwin_export, engines, samples=2, checkpoint=robotwin_export.parent / "run")
    assert report["ran"].startswith("PyTorch, bfloat16, on the CPU (no GPU for the engines, and onnxruntime")
    assert report["passed"] and report["gate"] == "cosine >= 0.9995" and report["reference"].endswith("run")
    assert all(0.9995 <= row["cosine_min"] < 1 - 1e-7 for row in report["rows"])
    assert "none recorded (no --dataset)" in markdown(report)


def test_an_export_without_engines_runs_in_pytorch(plain_export: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain_export, tmp_path / "export"))
    assert main([str(folder), "--samples", "1"]) == 0
    report = json.loads((folder / validate.FILE).read_text())
    assert report["ran"] == "PyTorch, float32, on the CPU" and report["gate"] == "relative <= 1e-04"


# ------------------------------------------------------------------------------------------------------- what is wrong
def change_weight(folder: Path, graph: str, weight: str | list[int], place: int) -> None:
    """Adds 5 to one number of a weight, given by name or shape, in an ONNX file whose record is then put right."""
    path = folder / onnx_file(graph)
    model = onnx.load(str(path))
    array = next(x for x in model.graph.initializer if weight in (x.name, list(x.dims)))
    values = onnx.numpy_helper.to_array(array).copy()
    values.flat[place] += 5
    array.CopyFrom(onnx.numpy_helper.from_array(values, array.name))
    onnx.save(model, str(path))
    record = json.loads((folder / MANIFEST).read_text())
    record["files"][path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (folder / MANIFEST).write_text(json.dumps(record))


def test_wrong_weights_are_found(
    robotwin_export: Path, float32_engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """A number in one block of every graph is off: the exit status is 1, and each block is named."""
    folder = Path(shutil.copytree(float32_engines, tmp_path / "engines"))
    change_weight(folder, "vae", "stages.1.blocks.0.first.conv.bias", 0)
    change_weight(folder, "planner", "blocks.1.ffn_in.bias", 0)
    change_weight(folder, "router", [3, 1, 48], 48)  # bias of the last projection, stacked over layers, of layer 1
    change_weight(folder, "executor", "executor.blocks.1.ffn_in.bias", 0)
    assert main([str(robotwin_export), "--engines", str(folder), "--samples", "1"]) == 1
    printed, report = capsys.readouterr().out, json.loads((folder / validate.FILE).read_text())
    assert not report["passed"] and [row["passed"] for row in report["rows"]] == [False] * 6
    assert printed.count("**missed**") == 6
    where = {
        "vae": "vae stage 1 is", "planner": "planner block 1 is", "router": "router layer 1 is",
        "executor": "executor block 1 at step 0 is",
    }  # fmt: skip
    for graph, text in where.items():
        assert report["located"][graph].startswith(f"{text} the first to deviate: "), report["located"]
        assert report["located"][graph] in printed
    assert not list(folder.glob("*.probe.onnx"))


def test_a_wrong_block_of_the_export_is_found(robotwin_export: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """PyTorch in bfloat16 against the checkpoint: behind the first wrong block everything is off, it is named."""
    spoilt = load_export(robotwin_export)
    spoilt.executor.blocks[2].o.bias.data[0] += 5
    spoilt.planner.blocks[0].cross_o.bias.data[0] += 5
    monkeypatch.setattr(subject, "load_export", lambda *_, **__: spoilt)
    report = validate.validate(robotwin_export, samples=1, checkpoint=robotwin_export.parent / "run")
    (robotwin_export / validate.FILE).unlink()
    passed = {row["graph"]: row["passed"] for row in report["rows"]}
    assert passed == dict(zip(ROWS, (True, False, True, False, False, False), strict=True))
    assert set(report["located"]) == {"planner", "executor"}
    assert report["located"]["executor"].startswith("executor block 2 at step 0 is the first to deviate")
    assert report["located"]["planner"].startswith("planner block 0 is the first to deviate")


def test_errors_without_a_jump_are_told_apart() -> None:
    graph = type("G", (), {"name": "router", "outputs": ("k", "v"), "module": torch.nn.Module()})
    want = [(f"layer {i}", torch.ones(3)) for i in range(3)]
    got = [(name, x + FLOOR["float32"] * (1 + i)) for i, (name, x) in enumerate(want)]
    assert str(locate(graph, got, want, "float32")).startswith("no block stands out; most is added by router layer 2")
    got[1] = ("layer 1", torch.tensor([1.0, np.nan, 1.0]))
    assert str(locate(graph, got, want, "float32")).startswith("router layer 1 is the first to deviate")


def test_numbers_that_are_not_finite_miss_the_gate() -> None:
    row = Row("router")
    row.add(np.float32([1, np.nan, np.inf, 2]), np.float32([1, 2, 3, 2]))
    row.add(np.float32([1, 2]), np.float32([1, 2]))
    record = row.record("bfloat16")
    assert record["nan"] == record["inf"] == 1 and not record["passed"] and record["cosine_min"] is None
    json.dumps(record, allow_nan=False)
    fine = Row("router", cosines=[0.99949], relative=1e-3)
    assert not fine.passed("bfloat16") and not fine.passed("float32")
    fine = Row("router", cosines=[0.9996], relative=1.01e-4)
    assert fine.passed("bfloat16") and not fine.passed("float32")


def test_engines_of_another_checkpoint_are_not_validated(plain_export: Path, float32_engines: Path) -> None:
    with pytest.raises(ExportError, match="was built from another checkpoint, VAE or config"):
        subject.open_subject(plain_export, float32_engines)


def test_a_checkpoint_of_other_sizes_is_refused(
    plain_export: Path, robotwin_export: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert main([str(plain_export), "--checkpoint", str(robotwin_export.parent / "run")]) == 1
    assert "is a model of other sizes than" in capsys.readouterr().err
    assert main([str(plain_export), "--samples", "0"]) == 1
    assert "0 samples were asked for; expected at least one" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- samples
def test_recorded_samples_are_what_the_policy_sees(robotwin_export: Path, dataset: Path) -> None:
    export = load_export(robotwin_export)
    model, episodes, size = export.model, open_episodes(dataset), tuple(export.config.data.head_size)
    samples = recorded_samples(export, dataset, 3)
    assert [len(x.frames) for x in samples] == [1, 2, 3]  # rows 0, 6 and 30 of their episodes, 4 rows between frames
    assert samples[2].positions.tolist() == [11, 13, 15]
    first = samples[0]
    views = {name: episodes.frames(0, name, [0]) for name in CAMERAS}
    np.testing.assert_array_equal(first.frames, make_canvas(export.config).compose(views))
    assert first.frames.shape[1:] == (size[0] + size[0] // 2, size[1], 3) and first.start == 0
    assert first.positions.tolist() == [0] and samples[1].start == model.chunk
    stats = export.statistics["state"]
    np.testing.assert_array_equal(first.state, normalize(episodes.states(0)[0], stats))
    text, mask = export.text_tower.tokens(INSTRUCTIONS[1])  # of the first episode
    np.testing.assert_array_equal(first.text, text)
    np.testing.assert_array_equal(first.mask, mask)


def test_random_samples_overflow_the_memory(robotwin_export: Path) -> None:
    export = load_export(robotwin_export)
    for sample in random_samples(export, 3):
        assert len(sample.frames) == len(sample.positions) == export.model.memory_frames + 2
        assert sample.mask[0] and (np.diff(sample.positions) > 0).all()
        graph = make_graphs(export)["vae"]
        assert sample.observation[None].shape == tuple(graph.inputs["canvas"].shape)


def test_the_first_frame_stays_in_a_sample(plain_export: Path) -> None:
    """Where the model keeps it, in the reference as in what is checked: four refreshes, memory of two."""
    export = load_export(plain_export)
    export = dataclasses.replace(export, model=dataclasses.replace(export.model, memory_anchor=True))
    graphs = make_graphs(export)
    sample = random_samples(export, 1)[0]
    calls = Reference(export)(sample)
    plans = [call for call in calls if call.graph == "planner"]
    np.testing.assert_array_equal(plans[3].inputs["memory_k"][:, :, 0], plans[0].outputs["k"])
    np.testing.assert_array_equal(plans[3].inputs["memory_k"][:, :, 1], plans[2].outputs["k"])
    checked = subject.Subject(export, graphs, dict(graphs), "PyTorch", "float32", plain_export)
    with torch.no_grad():
        for call, made in zip(calls, checked.episode(calls, sample.text), strict=True):
            assert_close({name: x.numpy() for name, x in made.items()}, call.outputs, validate.RELATIVE)


def test_a_dataset_of_another_robot_is_refused(plain_export: Path, dataset: Path) -> None:
    export = load_export(plain_export)
    other = Embodiment.as_recorded(9, 3)
    with pytest.raises(ValueError, match="own state and action have 9 and 3 numbers; found 5 and 3"):
        recorded_samples(dataclasses.replace(export, embodiment=other), dataset, 1)
