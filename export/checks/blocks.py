"""Where an error begins: the state behind every block of a graph, against a twin in float32."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from export.checks.parity import deviation
from export.checks.subject import OnnxFile
from export.engines.onnx_graphs import SCOPES, Graph

JUMP = 4.0  # times the error in front of a block: more than rounding adds in one block, less than a wrong weight does
# Error of a state before any block, below which nothing counts as one: a few roundings.
FLOOR = {"float32": 1e-6, "bfloat16": 2.0**-7}


@dataclasses.dataclass(frozen=True)
class Found:
    """The block whose output is the first to be off, and the errors in front of it and behind."""

    block: str
    before: float
    behind: float
    jumped: bool  # False: no block stands out, this one adds most

    def __str__(self) -> str:
        if self.jumped:
            return f"{self.block} is the first to deviate: {self.before:.1e} in front of it, {self.behind:.1e} behind"
        return f"no block stands out; most is added by {self.block}, from {self.before:.1e} to {self.behind:.1e}"


def parts(graph: Graph) -> dict[str, str]:
    """Blocks of a graph: their module's name and how they are called here."""
    modules = dict(graph.module.named_modules())
    names = [name for name in modules if name.removeprefix("executor.").rsplit(".", 1)[0] in ("blocks", "stages")]
    names += [name for name in ("middle",) if name in modules]
    return {name: f"{graph.name} {name.removeprefix('executor.').replace('s.', ' ')}" for name in names}


def torch_states(graph: Graph, inputs: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """(module, state behind it) in the order in which the blocks of a module run."""
    states: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            states.append((name, output[0] if isinstance(output, tuple) else output))

        return hook

    with contextlib.ExitStack() as stack:
        for name in parts(graph):
            stack.callback(graph.module.get_submodule(name).register_forward_hook(note(name)).remove)
        outputs = graph(**inputs)
    return states + _last(graph, outputs)


def onnx_states(graph: Graph, path: Path, inputs: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The same, of an ONNX file, whose nodes remember the module they come from."""
    model = onnx.load(str(path), load_external_data=False)  # the probe lies beside it and finds its data
    known, seen = parts(graph), []
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), "")
        block = next((name for name in known if f"'{name}'" in scopes), None)
        if block is None:
            continue
        if seen and seen[-1][0] == block:
            seen[-1] = (block, node.output[0])
        else:
            seen.append((block, node.output[0]))
    states = {output: block for block, output in seen}
    model.graph.output.extend(onnx.ValueInfoProto(name=output) for output in states)
    probe = path.with_suffix(".probe.onnx")
    try:
        onnx.save(model, str(probe))
        outputs = OnnxFile(probe)(**inputs)
    finally:
        probe.unlink(missing_ok=True)
    return [(states[name], outputs[name]) for name in states] + _last(graph, outputs)


def _last(graph: Graph, outputs: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """What comes behind the last block; of the router, whose layers stand side by side, every layer."""
    if graph.name == "router":
        pairs = zip(*(outputs[name] for name in graph.outputs), strict=True)
        return [(f"layer {i}", torch.stack(pair)) for i, pair in enumerate(pairs)]
    if graph.name == "planner":  # the keys and values of its last block
        return [("last", torch.stack([outputs[name][-1] for name in graph.outputs]))]
    return [("end", outputs[graph.outputs[0]])]


def locate(graph: Graph, got: list[tuple[str, Tensor]], want: list[tuple[str, Tensor]], dtype: str) -> Found:
    """The block at which the states of a graph part from the reference's."""
    names = parts(graph)
    last = graph.module.config.num_layers - 1 if graph.name == "planner" else 0
    names |= {"last": f"planner block {last}", "end": f"what follows the last block of the {graph.name}"}
    count: dict[str, int] = {}
    before, found = FLOOR[dtype], []
    for (name, a), (_, b) in zip(got, want, strict=True):
        count[name] = step = count.get(name, -1) + 1
        label = names.get(name, f"{graph.name} {name}")
        if graph.name == "executor" and name in parts(graph):
            label += f" at step {step}"
        error = deviation(a.float().cpu().numpy(), b.float().numpy())
        found.append(Found(label, before, error, error > JUMP * before))
        if graph.name != "router":
            before = max(before, error)
    jumped = [x for x in found if x.jumped]
    return jumped[0] if jumped else max(found, key=lambda x: np.nan_to_num(x.behind / x.before, nan=np.inf))
