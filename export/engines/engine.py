"""Reads a folder of engines that `ahawam to-tensorrt` wrote, and runs one of them on a GPU.

An engine runs on the kind of GPU and with the library version that it was built for, and is right for one checkpoint:
its folder's manifest says which, and `open_engines` refuses everything else before a byte reaches the GPU.
"""

import dataclasses
import importlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from data_pipelines.files import read_json, unfetched
from export.engines.onnx_graphs import GRAPHS
from export.manifest import FILE, ExportError, sha256

FORMAT = 1  # of manifest.write_manifest
LIBRARIES = ("tensorrt_rtx", "tensorrt")  # nearly the same Python interface; the first is tried first


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What an engine is built for."""

    name: str
    capability: str  # compute capability, "12.0"


def current_gpu() -> Gpu | None:
    """The first GPU of this process, None where there is none."""
    if not torch.cuda.is_available():
        return None
    return Gpu(torch.cuda.get_device_name(0), "{}.{}".format(*torch.cuda.get_device_capability(0)))


def load_library(name: str | None = None) -> ModuleType:
    """TensorRT-RTX or TensorRT, by name, or the first of them that is installed. Raises ExportError."""
    for candidate in LIBRARIES if name is None else (name,):
        try:
            return importlib.import_module(candidate)
        except ImportError:
            continue
    raise ExportError(
        f"{name or ' and '.join(LIBRARIES)} cannot be imported; install one with pip install tensorrt-rtx (RTX GPUs, "
        "builds without one) or pip install tensorrt."
    )


@dataclasses.dataclass(frozen=True)
class Engines:
    """A whole folder of engines that fits this checkpoint, this GPU and the installed library."""

    folder: Path
    manifest: dict[str, Any]
    trt: ModuleType  # TensorRT-RTX or TensorRT

    def plan(self, graph: str) -> mmap.mmap:
        """The serialised engine of a graph, mapped: at full size the planner's is 8 GiB, which nobody need hold."""
        with (self.folder / engine_file(graph)).open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def engine_file(graph: str) -> str:
    """Name of a graph's engine in the folder."""
    return f"{graph}.engine"


def open_engines(folder: str | Path, source: str, gpu: Gpu, hashes: bool = True) -> Engines:
    """Opens a folder of engines to run them on `gpu`.

    source: manifest["source"]["sha256"] of the export they must belong to, of weights, VAE and config.
    hashes: compare the content of every file with the manifest, not only its size. Raises ExportError, with what to
    do, for a folder that is not whole and for engines of another checkpoint, library version or GPU.
    """
    folder = Path(folder)
    record = read_engine_manifest(folder, hashes)
    check_source(folder, record, source)
    again = rebuild(folder, record)
    built = record["library"]
    library = load_library(built["name"])
    if library.__version__ != built["version"]:
        raise ExportError(
            f"{folder} was built with {built['name']} {built['version']}, installed is {library.__version__}, and an "
            f"engine runs with its own version only; install that one, or {again}"
        )
    # TensorRT-RTX compiles for an architecture; TensorRT times its kernels on one model of GPU.
    same = record["compute_capability"] == gpu.capability and record["gpu"] in (None, gpu.name)
    if not same:
        made_for = record["gpu"] or record["target"]
        raise ExportError(
            f"{folder} was built for {made_for} (compute capability {record['compute_capability']}), this is "
            f"{gpu.name} ({gpu.capability}); {again}"
        )
    return Engines(folder, record, library)


def check_source(folder: Path, record: Mapping[str, Any], source: str) -> None:
    """Raises ExportError for engines of another checkpoint, VAE or config than `source` is the sha256 of."""
    built = record["source"]["sha256"]
    if built != source:
        raise ExportError(
            f"{folder} was built from another checkpoint, VAE or config ({built[:12]}, the export has {source[:12]}); "
            f"{rebuild(folder, record)}"
        )


def rebuild(folder: Path, record: Mapping[str, Any]) -> str:
    """The end of every refusal."""
    command = f"ahawam to-tensorrt {folder.parent} --target {record.get('target', 'TARGET')}"
    return f"remove {folder} and build again with {command}."


def read_engine_manifest(folder: Path, hashes: bool) -> dict[str, Any]:
    """The record of a folder whose files are all there. Raises ExportError for one that is not whole."""
    path = folder / FILE
    if not path.is_file():
        raise ExportError(
            f"{folder} holds no finished engines, it has no {FILE}; build them with ahawam to-tensorrt "
            f"{folder.parent} --target TARGET."
        )
    record = read_json(path, ExportError, rebuild(folder, {}).removesuffix("."))
    try:
        found, files = record["format"], {name: (x["size"], x["sha256"]) for name, x in record["files"].items()}
        facts = [record[key] for key in ("source", "library", "compute_capability", "gpu", "target", "dtype", "steps")]
        complete = found == FORMAT and facts and all(engine_file(graph) in files for graph in GRAPHS)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{path} is not readable ({error!r}); {rebuild(folder, {})}") from error
    if not complete:
        raise ExportError(f"{path} (format {found}) is not that of four engines of format {FORMAT}; "
                          f"{rebuild(folder, record)}")  # fmt: skip
    for name, (size, digest) in files.items():
        file = folder / name
        if found := unfetched(file):
            raise ExportError(f"{file} {found}.")
        there = file.stat().st_size if file.is_file() else 0
        if there != size:
            raise ExportError(
                f"{file} has {there:,} bytes, {FILE} says {size:,}: it is cut off or missing; "
                f"{rebuild(folder, record)}"
            )
        if hashes and sha256(file) != digest:
            raise ExportError(
                f"{file} is not the file that was built (its sha256 differs from {FILE}); {rebuild(folder, record)}"
            )
    return record


class Engine:
    """One engine on the GPU, reading and writing device tensors at fixed addresses, so that a CUDA graph holds it."""

    def __init__(self, library: ModuleType, plan: bytes | mmap.mmap, name: str):
        """Raises ExportError where the library cannot load the engine on this GPU."""
        self.name = name
        self._logger = library.Logger(library.Logger.ERROR)
        self._runtime = library.Runtime(self._logger)  # must outlive the engine
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ExportError(
                f"{library.__name__} {library.__version__} cannot load the engine of the {name} on this machine; its "
                "messages above say why. Check the GPU's driver, or build the engine again with ahawam to-tensorrt."
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise ExportError(f"The GPU has too little free memory to run the engine of the {name}; free some.")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self.shapes = {x: tuple(self._engine.get_tensor_shape(x)) for x in names}
        self.dtypes = {x: _torch_dtype(self._engine.get_tensor_dtype(x)) for x in names}
        is_input = {x: self._engine.get_tensor_mode(x) == library.TensorIOMode.INPUT for x in names}
        self.inputs, self.outputs = ([x for x in names if is_input[x] == wanted] for wanted in (True, False))
        self.buffers: dict[str, Tensor] = {}

    def bind(self, **buffers: Tensor) -> None:
        """Reads or writes these tensors from now on. Raises ExportError for another shape, dtype, device or layout."""
        for name, x in buffers.items():
            wanted = (self.shapes[name], self.dtypes[name])
            if (tuple(x.shape), x.dtype) != wanted or not x.is_cuda or not x.is_contiguous():
                raise ExportError(
                    f"{name} of the {self.name} is {x.dtype} {list(x.shape)} on {x.device}; expected {wanted[1]} "
                    f"{list(wanted[0])}, contiguous on a GPU."
                )
            self._context.set_tensor_address(name, x.data_ptr())
            self.buffers[name] = x

    def allocate(self) -> None:
        """Binds a new buffer to everything that is not bound."""
        missing = [name for name in self.shapes if name not in self.buffers]
        self.bind(**{name: torch.zeros(self.shapes[name], dtype=self.dtypes[name], device="cuda") for name in missing})

    def launch(self, stream: "torch.cuda.Stream | None" = None) -> None:
        """Starts one run on a stream, by default the current one; all tensors must be bound."""
        stream = stream or torch.cuda.current_stream()
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise ExportError(f"The engine of the {self.name} did not start; the library's messages above say why.")

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Copies inputs into the buffers, runs, waits, and returns copies of the outputs; for checks."""
        self.allocate()
        for name, x in inputs.items():
            self.buffers[name].copy_(x)
        self.launch()
        torch.cuda.synchronize()
        return {name: self.buffers[name].clone() for name in self.outputs}


def _torch_dtype(dtype: Any) -> torch.dtype:
    """Of the library's type."""
    names = {"FLOAT": "float32", "BF16": "bfloat16", "UINT8": "uint8", "BOOL": "bool"}  # all that the graphs use
    return getattr(torch, names[dtype.name])
