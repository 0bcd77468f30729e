"""What is checked: the graphs of an export, run by engines, by onnxruntime or by PyTorch, behind one interface."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from export.checks.reference import Call
from export.engines.engine import Engine, check_source, current_gpu, open_engines, read_engine_manifest
from export.engines.onnx_graphs import GRAPHS, Graph, make_graphs
from export.exported import Export, load_export
from export.manifest import ExportError
from export.to_tensorrt import onnx_file
from export.twin.model import empty_memory, remember

Run = Callable[..., dict[str, Tensor]]  # tensors by the names of Graph.inputs -> by those of Graph.outputs


class OnnxFile:
    """An ONNX file under onnxruntime, on the CPU."""

    def __init__(self, path: Path):
        self.path = path
        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._outputs = [x.name for x in self._session.get_outputs()]

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        made = self._session.run(self._outputs, {name: x.numpy() for name, x in inputs.items()})
        return {name: torch.from_numpy(x) for name, x in zip(self._outputs, made, strict=True)}


@dataclasses.dataclass(frozen=True)
class Subject:
    """All graphs of one export, ready to run, and what runs them."""

    export: Export
    graphs: dict[str, Graph]
    runs: dict[str, Run]
    by: str  # one line
    dtype: str
    folder: Path  # where the verdict belongs

    def call(
        self, graph: str, inputs: Mapping[str, np.ndarray | Tensor], text: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Runs one graph on inputs of any float dtype; text: from `words`."""
        wanted = self.graphs[graph].inputs
        given = {name: torch.as_tensor(np.array(x) if isinstance(x, np.ndarray) else x) for name, x in inputs.items()}
        given |= {name: x for name, x in text.items() if name in wanted}
        return self.runs[graph](**{name: given[name].to(x.dtype).contiguous() for name, x in wanted.items()})

    def words(self, graph: str, text: np.ndarray) -> dict[str, Tensor]:
        """Keys and values of the text [K, X] for planner or executor; at deployment, too, PyTorch makes them."""
        if graph not in ("planner", "executor"):
            return {}
        k, v = getattr(self.export, graph).text(torch.from_numpy(text[None]))
        return {"text_k": k, "text_v": v}

    def episode(self, calls: list[Call], text: np.ndarray) -> list[dict[str, Tensor]]:
        """The outputs of all calls, each graph fed with what the ones before it made; the planner's memory, too."""
        tokens = self.graphs["router"].inputs["k"].shape[2]
        dtype = self.graphs["router"].inputs["k"].dtype
        memory = empty_memory(self.export.model, 1, tokens, dtype)
        known, outputs, refreshes = {}, [], 0
        for call in calls:
            inputs = call.inputs | {name: known[name] for name in call.inputs if name in known}
            if call.graph == "planner":
                inputs |= dict(zip(("memory_k", "memory_v", "valid"), memory, strict=True))
            made = {name: x.cpu() for name, x in self.call(call.graph, inputs, self.words(call.graph, text)).items()}
            if call.graph == "planner":
                remember(*memory, made["k"], made["v"], refreshes, self.export.model.memory_anchor)
                refreshes += 1
            known |= made
            outputs.append(made)
        return outputs


def open_subject(folder: Path, engines: Path | None = None) -> Subject:
    """The graphs of an export as they run on this machine.

    engines: folder that ahawam to-tensorrt wrote; None for the only one inside the export, or, where there is none,
    the export itself. On a GPU its engines run. Without one, its ONNX files do, in float32; onnxruntime has no
    bfloat16 arithmetic on a CPU, so then it is PyTorch, in bfloat16. Raises ExportError.
    """
    if engines is None:
        found = sorted(folder.glob("engines-*"))
        if len(found) > 1:
            raise ExportError(f"{folder} has {len(found)} folders of engines; choose with --engines {found[0]}.")
        engines = found[0] if found else None
    if engines is None:
        export = load_export(folder, hashes=True)
        graphs, dtype = make_graphs(export), export.manifest["dtype"]
        return Subject(export, graphs, dict(graphs), f"PyTorch, {dtype}, on the CPU", dtype, folder)
    record = read_engine_manifest(engines, hashes=True)
    dtype = record["dtype"]
    export = load_export(folder, dtype, steps=record["steps"], hashes=True)
    source, gpu = export.manifest["source"]["sha256"], current_gpu()
    check_source(engines, record, source)
    graphs = make_graphs(export)
    if gpu is not None:
        opened = open_engines(engines, source, gpu, hashes=False)
        runs = {name: Engine(opened.trt, opened.plan(name), name) for name in GRAPHS}
        by = f"engines of {record['library']['name']} {record['library']['version']}, {dtype}, on {gpu.name}"
    elif dtype == "float32":
        runs = {name: OnnxFile(engines / onnx_file(name)) for name in GRAPHS}
        by = f"ONNX files under onnxruntime {onnxruntime.__version__}, {dtype}, on the CPU"
    else:
        runs = dict(graphs)
        by = f"PyTorch, {dtype}, on the CPU (no GPU for the engines, and onnxruntime has no {dtype} on a CPU)"
    return Subject(export, graphs, runs, by, dtype, engines)
