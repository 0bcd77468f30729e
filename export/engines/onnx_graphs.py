"""The four graphs of a deployment, their inputs and outputs by name, and their ONNX files.

    vae       canvas -> latents                                                 at every chunk and every refresh
    planner   latents, cos, sin, text_k, text_v, text_mask, memory_k, memory_v, valid -> k, v       at every refresh
    router    latents, k, v -> routed_k, routed_v                                                   at every chunk
    executor  noise, cos, sin, text_k, text_v, text_mask, state, routed_k, routed_v -> actions      at every chunk

The executor's graph is the whole loop, all steps unrolled, with the projection of the robot's state in front: one
launch a chunk; of a checkpoint with config.objective.max_delay it also reads committed actions and which of the chunk
they are, first. Keys and values of the instruction are inputs, and so is the memory, which no graph writes:
`planner.text` and `executor.text` run once an episode, and the ring once a refresh (`torch_model.remember`), both in
PyTorch.
"""

import dataclasses
import logging
import warnings
from pathlib import Path

import onnx
import onnx_ir
import torch
from onnxscript.optimizer import fold_constants, remove_unused_nodes
from torch import Tensor, nn

from ahawam_jax.models.config import PATCH, SPATIAL_STRIDE, ModelConfig
from ahawam_jax.towers.vae import COLOURS
from export.exported import Export, latent_grid
from export.manifest import ExportError
from export.twin.model import Executor

GRAPHS = ("vae", "planner", "router", "executor")
OPSET = 20  # the first with Gelu; TensorRT-RTX 1.7 parses all that the graphs need of it
# Beyond these bytes, weights lie in a file of their own: in a protobuf message, which ends at 2 GiB, they are copied
# while it is written, to seven times their size in memory.
LARGEST_FILE = 2**26
SCOPES = "pkg.torch.onnx.name_scopes"  # which module made a node: how a block is found again in a file


@dataclasses.dataclass(frozen=True)
class Graph:
    """One graph: a module whose forward takes `inputs`, in order, and returns one tensor or as many as `outputs`."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]  # zeros of the shapes and dtypes, batch 1
    outputs: tuple[str, ...]

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Runs the module, in PyTorch."""
        made = self.module(*(inputs[name] for name in self.inputs))
        return dict(zip(self.outputs, (made,) if isinstance(made, Tensor) else made, strict=True))


class ExecutorChunk(nn.Module):
    """The executor's loop behind the projection of the robot's state, which is the same in all of its steps."""

    def __init__(self, executor: Executor):
        super().__init__()
        self.executor = executor

    def forward(
        self, noise: Tensor, cos: Tensor, sin: Tensor, text_k: Tensor, text_v: Tensor, text_mask: Tensor,
        state: Tensor, routed_k: Tensor, routed_v: Tensor, *committed: Tensor,
    ) -> Tensor:  # fmt: skip
        """noise [B, T, d] and normalised state [B, p] float32, the rest as `Executor.forward` -> actions [B, T, d]."""
        cross = self.executor.state(state)
        return self.executor(noise, cos, sin, text_k, text_v, text_mask, *cross, routed_k, routed_v, *committed)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the shapes of all inputs follow from."""

    model: ModelConfig
    grid: tuple[int, int]  # height and width of the latents
    words: int  # K, length of the text
    dtype: torch.dtype


def make_graphs(export: Export) -> dict[str, Graph]:
    """The graphs of an opened export by name, in its dtype, at batch 1 and the text length of its config."""
    dtype = export.planner.patch_embedding.weight.dtype
    sizes = Sizes(export.model, latent_grid(export.config), export.config.towers.text_length, dtype)
    return {name: make_graph(name, getattr(export, name), sizes) for name in GRAPHS}


def make_graph(name: str, module: nn.Module, sizes: Sizes) -> Graph:
    """One graph around its module of the twin, by name."""
    model, grid = sizes.model, sizes.grid
    layers, tokens = model.num_layers, grid[0] * grid[1] // PATCH**2
    latents = {"latents": torch.zeros(1, model.latent_channels, *grid)}

    def pair(prefix: str, *shape: int) -> dict[str, Tensor]:
        shape = (*shape, model.num_heads, model.head_dim)
        return {f"{prefix}{part}": torch.zeros(shape, dtype=sizes.dtype) for part in "kv"}

    def shared(turn: tuple[Tensor, Tensor], count: int) -> dict[str, Tensor]:
        text = {**pair("text_", count, 1, sizes.words), "text_mask": torch.ones(1, sizes.words, dtype=torch.bool)}
        return dict(zip(("cos", "sin"), turn, strict=True)) | text

    if name == "vae":
        canvas = torch.zeros(1, *(SPATIAL_STRIDE * side for side in grid), COLOURS, dtype=torch.uint8)
        return Graph(name, module, {"canvas": canvas}, ("latents",))
    if name == "planner":
        memory = pair("memory_", layers, 1, model.memory_frames, tokens)
        valid = {"valid": torch.zeros(1, model.memory_frames, dtype=torch.bool)}
        return Graph(name, module, latents | shared(module.rotary([0]), layers - 1) | memory | valid, ("k", "v"))
    if name == "router":
        return Graph(name, module, latents | pair("", layers, 1, tokens), ("routed_k", "routed_v"))
    inputs = {
        "noise": torch.zeros(1, model.chunk, model.action_dim), **shared(module.rotary(0), layers),
        "state": torch.zeros(1, model.state_dim), **pair("routed_", layers, 1, tokens),
    }  # fmt: skip
    if module.clean_rows is not None:
        inputs["committed"] = torch.zeros_like(inputs["noise"])
        inputs["first"] = torch.zeros(1, model.chunk, dtype=torch.bool)
    return Graph(name, ExecutorChunk(module), inputs, ("actions",))


def write_onnx(graph: Graph, path: Path) -> None:
    """Writes a graph as `path`, and its weights as `path`.data where they do not fit into one file; checks it.

    Raises ExportError for a graph that ONNX cannot express. Nothing of this machine goes into the file.
    """
    module, quiet = graph.module.eval(), logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it reports the absence of torchvision for every graph
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, tuple(graph.inputs.values()), input_names=list(graph.inputs), output_names=list(graph.outputs),
                dynamo=True, opset_version=OPSET, verbose=False, optimize=False,
            )  # fmt: skip
            # The exporter's own optimiser also tries hundreds of patterns on every node, which takes minutes for an
            # unrolled loop; engines and onnxruntime fuse by themselves.
            fold_constants(program.model)
            remove_unused_nodes(program.model)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"The {graph.name} cannot be written as ONNX: {str(error).splitlines()[0]}") from error
    finally:
        quiet.setLevel(level)
    _forget(program.model)
    size = sum(x.const_value.nbytes for x in program.model.graph.initializers.values())
    program.save(str(path), external_data=size > LARGEST_FILE)
    onnx.checker.check_model(str(path))  # by path: beside a message above 2 GB there is no other way


def _forget(model: onnx_ir.Model) -> None:
    """Drops what the exporter notes of source lines and folders; of nodes, the names of their modules stay."""
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get(SCOPES)
        node.metadata_props.clear()
        if scopes is not None:
            node.metadata_props[SCOPES] = scopes
        for value in node.outputs:
            value.metadata_props.clear()
