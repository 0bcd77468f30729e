"""The ONNX files: the twin's values under onnxruntime, and nothing that a deployment cannot use or need not know."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from ahawam_jax.models.config import ModelConfig
from export.checks.subject import OnnxFile
from export.engines import onnx_graphs
from export.engines.onnx_graphs import GRAPHS, Graph, Sizes, make_graph, make_graphs, write_onnx
from export.exported import load_export
from export.manifest import ExportError
from export.to_tensorrt import onnx_file
from export.twin.model import Executor
from tests.tiny_model import assert_close

# Float32 on both sides, in the same order of operations but for sums: 1e2 roundings of 6e-8 a block, two steps.
TOLERANCE = 2e-5
PRECISE = {"LayerNormalization", "Softmax", "ReduceMean", "Pow", "Sqrt"}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def random_inputs(graph: Graph, seed: int = 0) -> dict[str, torch.Tensor]:
    """Normal numbers, random pixels, and masks that hide some of what they mask, but not the first."""
    rng, inputs = np.random.default_rng(seed), {}
    for name, x in graph.inputs.items():
        if x.dtype == torch.bool:
            mask = rng.integers(0, 2, x.shape).astype(bool)
            mask[:, 0] = True
            inputs[name] = torch.from_numpy(mask)
        elif x.dtype == torch.uint8:
            inputs[name] = torch.from_numpy(rng.integers(0, 256, x.shape, np.uint8))
        else:
            inputs[name] = torch.from_numpy(rng.standard_normal(x.shape, np.float32)).to(x.dtype)
    return inputs


def check(graph: Graph, path: Path) -> None:
    run = OnnxFile(path)
    for seed in range(2):
        inputs = random_inputs(graph, seed)
        got, want = run(**inputs), graph(**inputs)
        assert list(got) == list(want)
        assert_close(*({name: x.numpy() for name, x in part.items()} for part in (got, want)), TOLERANCE)


@pytest.mark.parametrize("name", GRAPHS)
def test_files_compute_what_the_twin_computes(name: str, robotwin_export: Path, float32_engines: Path) -> None:
    check(make_graphs(load_export(robotwin_export, "float32"))[name], float32_engines / onnx_file(name))


def test_tower_without_weights(plain_export: Path, tmp_path: Path) -> None:
    graph = make_graphs(load_export(plain_export))["vae"]
    write_onnx(graph, tmp_path / "vae.onnx")
    check(graph, tmp_path / "vae.onnx")


def nodes(path: Path) -> Iterator[tuple[onnx.NodeProto, dict[str, int]]]:
    """Nodes of a file, and the types of all values."""
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    types = {x.name: x.type.tensor_type.elem_type for x in values}
    types |= {x.name: x.data_type for x in model.graph.initializer}
    for node in model.graph.node:
        yield node, types


def test_files_are_static_and_precise_where_it_matters(bfloat16_engines: Path) -> None:
    """No control flow, no complex numbers; norms and softmax in float32, the large products in bfloat16."""
    narrow = set()
    for name in GRAPHS:
        model = onnx.load(str(bfloat16_engines / onnx_file(name)))
        dims = [d for x in (*model.graph.input, *model.graph.output) for d in x.type.tensor_type.shape.dim]
        assert all(d.dim_value > 0 for d in dims) and not model.functions
        for node, types in nodes(bfloat16_engines / onnx_file(name)):
            kinds = {types[x] for x in (*node.input, *node.output) if x}
            assert node.op_type not in ("If", "Loop", "Scan") and not kinds & {TensorProto.COMPLEX64}
            if node.op_type in PRECISE - ({"ReduceMean"} if name == "vae" else set()):  # which pools, beside its norms
                assert kinds - {TensorProto.INT64} == {TensorProto.FLOAT}, (name, node.name)
            if node.op_type in ("MatMul", "Conv") and kinds == {TensorProto.BFLOAT16}:
                narrow.add((name, node.op_type))
    assert narrow >= {("vae", "Conv"), ("planner", "MatMul"), ("router", "MatMul"), ("executor", "MatMul")}


def test_files_know_nothing_of_the_machine(float32_engines: Path) -> None:
    for name in GRAPHS:
        content = (float32_engines / onnx_file(name)).read_bytes()
        assert b".py" not in content and str(Path(onnx_graphs.__file__).parents[1]).encode() not in content


def test_weights_are_written_once(tmp_path: Path) -> None:
    """Three steps of two blocks share their weights; only the tables of the times grow with the steps."""
    model = ModelConfig(
        num_layers=2, num_heads=4, head_dim=24, executor_dim=256, executor_ffn_dim=1024, text_dim=64, chunk=4,
        horizon=8, num_queries=2, latent_channels=3, memory_frames=2,
    )  # fmt: skip
    executor = Executor(model, 3, 5.0)
    for x in (*executor.parameters(), *executor.buffers()):
        x.normal_()
    graph = make_graph("executor", executor, Sizes(model, (4, 4), 5, torch.float32))
    write_onnx(graph, tmp_path / "executor.onnx")
    weights = sum(x.nbytes for x in (*graph.module.parameters(), *graph.module.buffers()))
    nodes = 2**18  # bytes of about 700 nodes with their names
    assert weights < (tmp_path / "executor.onnx").stat().st_size < weights + nodes < 1.1 * weights


def test_large_weights_lie_beside_the_file(
    plain_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    graph = make_graphs(load_export(plain_export))["router"]
    monkeypatch.setattr(onnx_graphs, "LARGEST_FILE", 1000)
    path = tmp_path / "router.onnx"
    write_onnx(graph, path)
    stored = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert set(stored) == {"router.onnx", "router.onnx.data"}
    assert stored["router.onnx.data"] >= 0.9 * sum(x.nbytes for x in graph.module.parameters())
    check(graph, path)
    with contextlib.suppress(onnx.checker.ValidationError):
        (tmp_path / "router.onnx.data").unlink()
        onnx.checker.check_model(str(path))
        pytest.fail("the check by path must see that the data is missing")


def test_what_onnx_cannot_express_is_a_sentence(plain_export: Path, tmp_path: Path) -> None:
    class Unknown(torch.nn.Module):
        def forward(self, latents: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.linalg.eigvals(latents[0, 0, :2, :2]).real, k

    graph = dataclasses.replace(make_graphs(load_export(plain_export))["router"], module=Unknown())
    with pytest.raises(ExportError, match="The router cannot be written as ONNX: "):
        write_onnx(graph, tmp_path / "router.onnx")
