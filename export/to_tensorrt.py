"""From an export to engines for one kind of GPU, by way of ONNX.

    ahawam to-tensorrt exports/robotwin --target rtx5090d

Writes exports/robotwin/engines-rtx5090d: four ONNX files, four engines and, last, manifest.json. The folder appears
whole or not at all. TensorRT-RTX builds for the target without having it; TensorRT times its kernels on the GPU that
it builds for, and so has to run on the target itself, where it keeps what it measured in timing.cache (TensorRT-RTX
measures nothing when it builds: it compiles the last part on the robot, at the first run).
"""

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from absl import logging

from data_pipelines.paths import local_path
from data_pipelines.progress import Progress, say
from export.engines.engine import LIBRARIES, current_gpu, engine_file, load_library
from export.engines.onnx_graphs import GRAPHS, Graph, make_graphs, write_onnx
from export.exported import load_export
from export.manifest import ExportError, new_folder, require_new, write_manifest
from export.twin.layers import DTYPES

TIMING_CACHE = "timing.cache"


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to build for."""

    name: str
    capability: str


TARGETS = {"rtx5090d": Target("GeForce RTX 5090 D", "12.0")}


def onnx_file(graph: str) -> str:
    """Name of a graph's ONNX file in the folder."""
    return f"{graph}.onnx"


def build(
    folder: str | Path, target: str, out: str | Path | None = None, library: str | None = None,
    dtype: str | None = None, steps: int | None = None,
) -> Path:  # fmt: skip
    """Builds the engines of an export and returns their folder, by default FOLDER/engines-TARGET.

    library: "tensorrt_rtx" or "tensorrt", None for the one that is installed. dtype, steps: None for those of the
    export. Raises ExportError, or another ValueError of what it reads, in sentences; nothing is left then.
    """
    folder = local_path(folder)
    out = folder / f"engines-{target}" if out is None else local_path(out)
    require_new(out)
    if steps is not None and steps < 1:
        raise ExportError(f"{steps} Euler steps were asked for; expected at least one.")
    trt = load_library(library)
    gpu = check_target(trt, target)
    export = load_export(folder, dtype, steps=steps, hashes=True)
    facts = {
        "target": target, "compute_capability": TARGETS[target].capability, "gpu": gpu,
        "library": {"name": trt.__name__, "version": trt.__version__}, "source": export.manifest["source"],
        "dtype": dtype or export.manifest["dtype"], "steps": len(export.executor.schedule),
    }  # fmt: skip
    with new_folder(out) as partial:
        graphs = make_graphs(export)
        facts["shapes"] = {name: shapes(graph) for name, graph in graphs.items()}
        seconds: dict[str, float] = {}
        progress = Progress(2 * len(GRAPHS), "files")
        for name in GRAPHS:
            with timed(f"{name}.onnx", partial / onnx_file(name), seconds, progress):
                write_onnx(graphs[name], partial / onnx_file(name))
        del graphs, export  # an engine is built from its file; the weights are not needed twice
        gc.collect()
        cache = partial / TIMING_CACHE if trt.__name__ == "tensorrt" else None
        for name in GRAPHS:
            with timed(f"{name}.engine", partial / engine_file(name), seconds, progress):
                files = partial / onnx_file(name), partial / engine_file(name)
                build_engine(trt, name, *files, TARGETS[target], facts["dtype"], cache)
        write_manifest(partial, facts | {"seconds": seconds})
    return out


def check_target(trt: ModuleType, target: str) -> str | None:
    """Name of the GPU that the engines are bound to; None where any of the architecture will do."""
    wanted = TARGETS[target]
    if trt.__name__ == "tensorrt_rtx":
        return None
    gpu = current_gpu()
    if gpu is None or gpu.capability != wanted.capability:
        here = "no GPU" if gpu is None else f"{gpu.name} ({gpu.capability})"
        raise ExportError(
            f"tensorrt builds on the GPU that the engines are for, {wanted.name} (compute capability "
            f"{wanted.capability}), and this machine has {here}; run it there, or use --package tensorrt_rtx."
        )
    return gpu.name


def shapes(graph: Graph) -> dict[str, Any]:
    """Shape and dtype of every input of a graph."""
    return {name: [str(x.dtype).removeprefix("torch."), list(x.shape)] for name, x in graph.inputs.items()}


@contextmanager
def timed(name: str, path: Path, seconds: dict[str, float], progress: Progress) -> Iterator[None]:
    """Notes and prints how long a file took to make."""
    began = time.monotonic()
    progress.add(name, 0)
    yield
    seconds[name] = round(time.monotonic() - began, 2)
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    progress.add("", 1)
    say(f"  {name}: {seconds[name]:.1f} s, {size / 2**20:,.1f} MiB")


def build_engine(
    trt: ModuleType, name: str, path: Path, out: Path, target: Target, dtype: str, cache: Path | None = None
) -> None:
    """Builds the engine of an ONNX file for a target and writes it as `out`, piece by piece, so that it is never whole
    in memory.

    The network is strongly typed: the dtypes are those of the file, so what is float32 in the twin stays so.
    cache: TensorRT's timing cache, read where it exists and written again. Raises ExportError that names the graph
    and, where the parser refuses it, the node and its operator, and OSError where `out` cannot be written.
    """
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        error = parser.get_error(0)
        raise ExportError(
            f"{trt.__name__} {trt.__version__} does not take the {name}: node {error.node_name()!r} with operator "
            f"{error.node_operator()!r} is refused ({error.desc().strip()}); report it, and run the {name} in PyTorch."
        )
    config = builder.create_builder_config()
    if dtype == "float32":
        # TF32 would round factors to 11 bits. In bfloat16 graphs the factors of float32 products were rounded to 8
        # already, but for the softmax and the VAE's last layer, so there it costs nothing.
        config.clear_flag(trt.BuilderFlag.TF32)
    if trt.__name__ == "tensorrt_rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{target.capability.replace('.', '')}"), 0)
    if cache is not None:
        known = config.create_timing_cache(cache.read_bytes() if cache.exists() else b"")
        config.set_timing_cache(known, False)
    with out.open("wb") as file:
        writer = _writer(trt, file)
        built = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        raise writer.error
    if not built:
        raise ExportError(f"{trt.__name__} {trt.__version__} cannot build the {name}: {logger.last}")
    if cache is not None:
        cache.write_bytes(config.get_timing_cache().serialize())


def _writer(trt: ModuleType, file: BinaryIO) -> Any:
    """Where the builder puts the pieces of an engine; keeps the error that the library would lose."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            super().__init__()
            self.error: OSError | None = None

        def write(self, data: Any) -> int:
            try:
                return file.write(data)
            except OSError as error:
                self.error = error
                return 0

    return Writer()


def _logger(trt: ModuleType) -> Any:
    """Keeps errors, which come back as sentences, and prints nothing."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.last = "it gave no reason"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last = message

    return Logger()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ahawam to-tensorrt", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    logging.set_verbosity(logging.ERROR)
    parser.add_argument("folder", type=local_path, help="what ahawam to-torch wrote")
    parser.add_argument("--target", choices=tuple(TARGETS), required=True, help="GPU of the robot")
    parser.add_argument("--out", type=local_path, help="folder to write (default: FOLDER/engines-TARGET)")
    parser.add_argument("--package", choices=LIBRARIES, help="default: the first that is installed")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (default: the export's)")
    parser.add_argument("--steps", type=int, help="Euler steps of the executor (default: config.policy.steps)")
    options = parser.parse_args(argv)
    try:
        out = build(options.folder, options.target, options.out, options.package, options.dtype, options.steps)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{out}: four engines for {TARGETS[options.target].name}; check them with ahawam validate "
          f"{options.folder}")  # fmt: skip
    return 0
