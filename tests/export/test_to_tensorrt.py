"""Engines for SM120, built without a GPU, and everything that must keep a wrong one from running."""

import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

from data_pipelines.disk import DiskError
from export import to_tensorrt
from export.engines.engine import Engine, Gpu, engine_file, load_library, open_engines, read_engine_manifest
from export.engines.onnx_graphs import GRAPHS, make_graphs, write_onnx
from export.exported import load_export
from export.manifest import FILE, ExportError, read_manifest
from export.to_tensorrt import TARGETS, build, build_engine, onnx_file
from tests.conftest import REPOSITORY

GPU = Gpu("NVIDIA GeForce RTX 5090 D", "12.0")
REBUILD = r"remove .* and build again with ahawam to-tensorrt .* --target rtx5090d\.$"


def source_of(export: Path) -> str:
    return read_manifest(export)["source"]["sha256"]


# ------------------------------------------------------------------------------------------------------------ building
def test_all_engines_are_built(built: Path, robotwin_export: Path) -> None:
    """Four engines in float32 and in bfloat16, and a record of what they are."""
    record = read_engine_manifest(built, hashes=True)
    assert set(record["files"]) == {make(name) for name in GRAPHS for make in (engine_file, onnx_file)}
    assert record["compute_capability"] == "12.0" and record["gpu"] is None and record["steps"] == 2
    assert record["library"] == {"name": "tensorrt_rtx", "version": load_library("tensorrt_rtx").__version__}
    assert record["dtype"] == built.name.removeprefix("engines-")
    assert record["shapes"]["planner"]["memory_k"] == [record["dtype"], [3, 1, 2, 6, 2, 12]]
    assert set(record["seconds"]) == set(record["files"])
    assert not list(built.parent.glob(".*"))
    opened = open_engines(built, source_of(robotwin_export), GPU)
    assert all(len(opened.plan(name)) == record["files"][engine_file(name)]["size"] > 10_000 for name in GRAPHS)


def test_engine_of_the_tower_without_weights(plain_export: Path, tmp_path: Path) -> None:
    write_onnx(make_graphs(load_export(plain_export))["vae"], tmp_path / "vae.onnx")
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.engine"
        build_engine(load_library(), "vae", tmp_path / "vae.onnx", out, TARGETS["rtx5090d"], dtype)
        assert out.stat().st_size > 10_000
    with pytest.raises(OSError) as caught:
        full = Path("/dev/full")
        build_engine(load_library(), "vae", tmp_path / "vae.onnx", full, TARGETS["rtx5090d"], "float32")
    assert caught.value.errno == errno.ENOSPC


def spoil(path: Path) -> str:
    """Puts an operator that TensorRT does not have into an ONNX file; the name of its node."""
    model = onnx.load(str(path))
    node = next(node for node in model.graph.node if node.op_type == "Gelu")
    node.op_type = "Det"
    del node.attribute[:]
    onnx.save(model, str(path))
    return node.name


def test_an_operator_that_is_refused_is_named(
    robotwin_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    nodes = []

    def write(graph: Any, path: Path) -> None:
        ready = robotwin_export.parent / "engines-float32" / path.name
        shutil.copyfile(ready, path) if ready.exists() else write_onnx(graph, path)
        if graph.name == "router":
            nodes.append(spoil(path))

    monkeypatch.setattr(to_tensorrt, "write_onnx", write)
    out = tmp_path / "engines"
    command = [str(robotwin_export), "--target", "rtx5090d", "--out", str(out), "--dtype", "float32"]
    assert to_tensorrt.main(command) == 1
    error = capsys.readouterr().err
    assert "does not take the router: node" in error and "with operator 'Det' is refused" in error
    assert nodes[0] in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(float32_engines: Path, robotwin_export: Path) -> None:
    before = (float32_engines / FILE).read_bytes()
    with pytest.raises(ExportError, match="exists; remove it or give another --out, nothing is overwritten"):
        build(robotwin_export, "rtx5090d", float32_engines)
    assert (float32_engines / FILE).read_bytes() == before


def test_a_loop_without_steps_is_refused(robotwin_export: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="0 Euler steps were asked for; expected at least one"):
        build(robotwin_export, "rtx5090d", tmp_path / "engines", steps=0)


def test_tensorrt_needs_the_gpu_itself(robotwin_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(__name__="tensorrt", __version__="11.0")
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    for gpu, here in ((None, "no GPU"), (Gpu("NVIDIA H200", "9.0"), r"NVIDIA H200 \(9.0\)")):
        monkeypatch.setattr(to_tensorrt, "current_gpu", lambda gpu=gpu: gpu)
        with pytest.raises(ExportError, match=f"this machine has {here}; run it there, or use --package tensorrt_rtx"):
            build(robotwin_export, "rtx5090d", tmp_path / "engines", "tensorrt")
    monkeypatch.setattr(to_tensorrt, "current_gpu", lambda: GPU)
    assert to_tensorrt.check_target(library, "rtx5090d") == GPU.name
    assert not list(tmp_path.iterdir())


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ExportError, match="tensorrt cannot be imported; install one with pip install tensorrt-rtx"):
        load_library("tensorrt")


# -------------------------------------------------------------------------------------------------- interrupted builds
@pytest.fixture
def ready_files(float32_engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX files are copied, not made again."""
    monkeypatch.setattr(
        to_tensorrt, "write_onnx", lambda graph, path: shutil.copyfile(float32_engines / path.name, path)
    )


KILLED = """
import os, shutil, signal, sys
sys.path.insert(0, sys.argv[4])
from export import to_tensorrt
to_tensorrt.write_onnx = lambda graph, path: shutil.copyfile(f"{sys.argv[3]}/{path.name}", path)
to_tensorrt.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # all engines are there, no record
to_tensorrt.build(sys.argv[1], "rtx5090d", sys.argv[2], dtype="float32")
"""


def test_an_interrupted_build_leaves_nothing_that_opens(
    robotwin_export: Path, float32_engines: Path, tmp_path: Path, ready_files: None
) -> None:
    out = tmp_path / "engines"
    arguments = [str(x) for x in (robotwin_export, out, float32_engines, REPOSITORY)]
    run = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    partial = tmp_path / ".engines.partial"
    assert not out.exists() and (partial / engine_file("executor")).is_file()
    for folder in (out, partial):
        with pytest.raises(ExportError, match="holds no finished engines, it has no manifest.json; build them with"):
            open_engines(folder, source_of(robotwin_export), GPU)
    build(robotwin_export, "rtx5090d", out, dtype="float32")  # and is no obstacle
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def test_a_full_disk_and_a_failed_build_leave_nothing(
    robotwin_export: Path, tmp_path: Path, ready_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def fails(error: Exception) -> None:
        def stop(*_: Any) -> None:
            raise error

        monkeypatch.setattr(to_tensorrt, "build_engine", stop)

    fails(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(DiskError, match="engines cannot be written: its disk is full; .* Nothing of it is kept"):
        build(robotwin_export, "rtx5090d", tmp_path / "engines", dtype="float32")
    fails(ExportError("tensorrt_rtx cannot build the planner"))
    with pytest.raises(ExportError, match="cannot build the planner"):
        build(robotwin_export, "rtx5090d", tmp_path / "engines", dtype="float32")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.fixture
def copy(float32_engines: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(float32_engines, tmp_path / "engines"))


def refused(folder: Path, export: Path, message: str, gpu: Gpu = GPU) -> None:
    with pytest.raises(ExportError, match=message + ".*" + REBUILD):
        open_engines(folder, source_of(export), gpu)


@pytest.mark.parametrize("name", [engine_file("planner"), onnx_file("vae")])
def test_damaged_files_are_refused(copy: Path, robotwin_export: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    (copy / name).write_bytes(content[:-7])
    refused(copy, robotwin_export, f"{name} has {len(content) - 7:,} bytes, manifest.json says {len(content):,}")
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    refused(copy, robotwin_export, f"{name} is not the file that was built")
    open_engines(copy, source_of(robotwin_export), GPU, hashes=False)
    (copy / name).unlink()
    refused(copy, robotwin_export, f"{name} has 0 bytes")


def test_engines_for_something_else_are_refused(
    copy: Path, robotwin_export: Path, plain_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(copy, plain_export, "was built from another checkpoint, VAE or config")
    refused(copy, robotwin_export, r"was built for rtx5090d \(compute capability 12.0\), this is NVIDIA H200 \(9.0\);",
            Gpu("NVIDIA H200", "9.0"))  # fmt: skip
    open_engines(copy, source_of(robotwin_export), Gpu("NVIDIA GeForce RTX 5080", "12.0"))  # same architecture
    rewrite(copy, gpu=GPU.name)  # what TensorRT timed is for one GPU
    open_engines(copy, source_of(robotwin_export), GPU)
    refused(copy, robotwin_export, "was built for NVIDIA GeForce RTX 5090 D .*, this is NVIDIA GeForce RTX 5080",
            Gpu("NVIDIA GeForce RTX 5080", "12.0"))  # fmt: skip
    monkeypatch.setattr(load_library("tensorrt_rtx"), "__version__", "1.6.0")
    refused(copy, robotwin_export, r"was built with tensorrt_rtx 1\..*, installed is 1.6.0")


def rewrite(folder: Path, **changes: Any) -> None:
    """Other facts in the record of a folder."""
    record = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({k: v for k, v in (record | changes).items() if v is not ...}))


@pytest.mark.parametrize("changes, message", [
    ({"format": 2}, r"\(format 2\) is not that of four engines of format 1"), ({"source": ...}, "is not readable"),
    ({"files": {}}, "is not that of four engines"), ({"files": None}, "is not readable"),
])  # fmt: skip
def test_records_that_say_too_little_are_refused(
    copy: Path, robotwin_export: Path, changes: dict[str, Any], message: str
) -> None:  # fmt: skip
    rewrite(copy, **changes)
    with pytest.raises(ExportError, match=f"{message}.*; remove .* and build again with"):
        open_engines(copy, source_of(robotwin_export), GPU)


def test_an_export_is_no_folder_of_engines(robotwin_export: Path) -> None:
    with pytest.raises(ExportError, match="is not readable|is not that of four engines"):
        open_engines(robotwin_export, source_of(robotwin_export), GPU)


# ------------------------------------------------------------------------------------------------------------- running
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_loading_without_a_gpu_is_a_sentence(float32_engines: Path, robotwin_export: Path) -> None:
    """The library reads the engine as far as it can without a GPU; running one is for machines that have it."""
    engines = open_engines(float32_engines, source_of(robotwin_export), GPU)
    with pytest.raises(ExportError, match="cannot load the engine of the router on this machine"):
        Engine(engines.trt, engines.plan("router"), "router")


class FakeLibrary:
    """The part of TensorRT's interface that `Engine` uses: one input and one output of [2, 3] float32."""

    __name__, __version__ = "fake", "1"
    Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}

    def Runtime(self, logger: Any) -> Any:
        context = SimpleNamespace(set_tensor_address=self.addresses.__setitem__)
        engine = SimpleNamespace(
            num_io_tensors=2, get_tensor_name=["x", "y"].__getitem__, get_tensor_shape=lambda name: (2, 3),
            get_tensor_dtype=lambda name: SimpleNamespace(name="FLOAT"), create_execution_context=lambda: context,
            get_tensor_mode={"x": "in", "y": "out"}.__getitem__,
        )  # fmt: skip
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)


def test_buffers_that_do_not_fit_are_refused() -> None:
    library = FakeLibrary()
    engine = Engine(library, b"", "router")
    assert engine.inputs == ["x"] and engine.outputs == ["y"]
    assert engine.shapes["x"] == (2, 3) and engine.dtypes["y"] == torch.float32
    for x in (torch.zeros(3, 2), torch.zeros(2, 3).half(), torch.zeros(2, 3)):  # shape, dtype, device
        with pytest.raises(ExportError, match=r"x of the router is .*; expected torch.float32 \[2, 3\], contig"):
            engine.bind(x=x)
    assert not library.addresses
