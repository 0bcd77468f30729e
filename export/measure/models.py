"""What `ahawam benchmark` runs: an export, or random weights of any size, as the twin and as the released way.

Both have the same weights. In the dtype of the products they are one copy: the released way's tensors are views into
the twin's fused and stacked ones. Random weights are drawn where they lie, tensor by tensor, in their own dtype.

Axis letters: B batch, S tokens of one frame, K text tokens, L layers, N heads, H head width, W memory frames.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from ahawam_jax import flow_matching
from ahawam_jax.models.config import PATCH, ModelConfig
from ahawam_jax.towers.vae import VaeConfig
from ahawam_jax.weights.files import open_weights
from ahawam_jax.weights.release import release_shapes
from configs import robotwin
from export.exported import latent_grid, load_export
from export.manifest import MODEL, VAE
from export.released.vae import ReleasedVae
from export.released.way import Cache, ReleasedWay
from export.twin.layers import as_torch, modulation
from export.twin.model import ACTION, VIDEO, Executor, PlannerRefresh, Router, Twin
from export.twin.vae import VaeEncoder

TINY = dict(
    num_layers=2, num_heads=2, head_dim=24, planner_dim=48, planner_ffn_dim=96, executor_dim=32, executor_ffn_dim=64,
    text_dim=40, freq_dim=16, num_queries=4, chunk=4, horizon=16, memory_frames=3,
)  # fmt: skip
TINY_VAE = dict(dim=4, dec_dim=4, dim_mult=(1, 1, 2, 2), num_res_blocks=1)
BATCH = 1  # one robot


@dataclasses.dataclass(frozen=True)
class Models:
    """Modules on one device, and what one episode gives all of them."""

    run: ConfigDict
    config: ModelConfig
    vae_config: VaeConfig | None  # None for the tower without weights
    dtype: torch.dtype
    device: torch.device
    planner: PlannerRefresh
    router: Router
    executors: dict[int, Executor]  # by number of steps; they share all weights but their modulation rows
    vae: nn.Module
    released: ReleasedWay
    released_vae: nn.Module
    text: Tensor  # [B, K, X]
    text_mask: Tensor  # [B, K] bool
    memory_k: Tensor  # [L, B, W, S, N, H], full
    memory_v: Tensor
    k: Tensor  # [L, B, S, N, H], a plan
    v: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return latent_grid(self.run)

    @property
    def cache(self) -> Cache:
        """The plan as the released way holds it."""
        return as_cache(self.k, self.v)

    def levels(self, steps: int) -> list[float]:
        """Noise levels of the Euler loop."""
        return flow_matching.noise_levels(steps, self.run.objective.shift).tolist()


def as_cache(k: Tensor, v: Tensor) -> Cache:
    """k, v [L, B, S, N, H] -> [B, S, N*H] of every layer."""
    return [(a.flatten(-2), b.flatten(-2)) for a, b in zip(k, v, strict=True)]


def draw(name: str, x: Tensor) -> Tensor:
    """Fills a weight in place: gains 1, the rest random of a size that keeps activations near 1."""
    if name.endswith(("weight", "gamma")) and x.numel() == len(x):
        return x.fill_(1)
    return x.normal_(std=(x.numel() / len(x)) ** -0.5 if x.ndim > 1 else 0.02)


def random_models(steps: Sequence[int], device: torch.device, tiny: bool) -> Models:
    """RoboTwin's configuration in bfloat16, or one for a CPU in float32."""
    run, vae_config, dtype = robotwin.get_config(), VaeConfig(), torch.bfloat16
    if tiny:
        run.model.update(**TINY)
        run.data.head_size, run.towers.text_length = (64, 64), 8
        vae_config, dtype = VaeConfig(**TINY_VAE), torch.float32
    run.model.dtype = str(dtype).removeprefix("torch.")
    config, shift = ModelConfig.create(run.model), run.objective.shift
    shapes = release_shapes(config)

    def make(name: str) -> Tensor:
        return draw(name, torch.empty(shapes[name], dtype=dtype, device=device))

    with torch.device(device):
        planner, router = PlannerRefresh(config, latent_grid(run), dtype), Router(config, dtype)
        executor = Executor(config, max(steps), shift, dtype)
    for module in (planner, router, executor):
        for name, place in module.views():
            draw(name, place)
    with torch.device("meta"):
        wanted = ReleasedVae(vae_config).state_dict()
    tensors = {
        name: draw(name, torch.empty(x.shape, dtype=dtype, device=device)) for name, x in wanted.items()
    }
    vae = VaeEncoder.from_wan(tensors, vae_config, dtype, device)
    released_vae = ReleasedVae.load(tensors, vae_config)
    return assemble(run, Twin(planner, router, executor, {}), vae_config, vae, released_vae, make, steps, True)


def exported_models(
    folder: Path, steps: Sequence[int], device: torch.device, dtype: str | None = None
) -> Models:
    """Those of an export; dtype None is its own. Raises ExportError or WeightsError, ValueErrors in sentences."""
    export = load_export(folder, dtype, device, max(steps))
    source, dtype = open_weights(folder / MODEL).tensors, export.executor.action_encoder.weight.dtype
    vae_config, released_vae = None, export.vae
    if sizes := export.manifest["vae"]:
        vae_config = VaeConfig(**{name: tuple(x) if isinstance(x, list) else x for name, x in sizes.items()})
        stored = open_weights(folder / VAE).tensors
        with torch.device("meta"):
            names = list(ReleasedVae(vae_config).state_dict())
        released_vae = ReleasedVae.load({x: as_torch(stored[x]).to(device, dtype) for x in names}, vae_config)
    twin = Twin(export.planner, export.router, export.executor, source)
    return assemble(
        export.config, twin, vae_config, export.vae, released_vae,
        lambda name: as_torch(source[name]).to(device, dtype), steps, False,
    )  # fmt: skip


def assemble(
    run: ConfigDict, twin: Twin, vae_config: VaeConfig | None, vae: nn.Module, released_vae: nn.Module,
    make: Callable[[str], Tensor], steps: Sequence[int], drawn: bool,
) -> Models:  # fmt: skip
    """The released way around the twin's weights, and executors of all step counts.

    make: a tensor by release name, for what the twin does not hold. drawn: the planner's modulation rows are to be
    made of these too.
    """
    config, executor, held = twin.planner.config, twin.executor, dict(twin.views())
    weight = executor.action_encoder.weight
    dtype, device = weight.dtype, weight.device
    state: dict[str, Tensor] = {}
    for name in ReleasedWay.names(config).values():
        state[name] = held[name].to(dtype) if name in held else make(name)
    on_host = {name: x.cpu() for name, x in state.items() if "time_" in name or "modulation" in name}
    if drawn:
        twin.planner.rows.copy_(modulation(on_host, VIDEO, np.zeros(1, np.float32), config)[0])
    released = ReleasedWay.load(state, config)
    executors = {n: with_steps(executor, n, run.objective.shift, on_host) for n in steps}
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=kind, device=device)

    height, width = latent_grid(run)
    tokens, length = height * width // PATCH**2, run.towers.text_length
    plan = (config.num_layers, BATCH, tokens, config.num_heads, config.head_dim)
    memory = (*plan[:2], config.memory_frames, *plan[2:])
    return Models(
        run, config, vae_config, dtype, device, twin.planner, twin.router, executors, vae, released, released_vae,
        normal(BATCH, length, config.text_dim), torch.arange(length, device=device)[None] < (length + 3) // 4,
        normal(*memory), normal(*memory), normal(*plan), normal(*plan),
    )  # fmt: skip


def with_steps(executor: Executor, steps: int, shift: float, state: Mapping[str, Tensor]) -> Executor:
    """The same weights in a loop of another length; state: what modulation rows are made of, on the host."""
    with torch.device("meta"):
        other = Executor(executor.config, steps, shift, executor.branch.dtype)
    times = np.float32(flow_matching.NUM_TRAIN_TIMES) * np.float32([level for level, _ in other.schedule])
    rows = modulation(state, ACTION, times, executor.config).to(executor.rows.device)
    other.load_state_dict({**executor.state_dict(), "rows": rows}, assign=True)
    return other.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------ floors
def nbytes(module: nn.Module) -> int:
    """Bytes of all that a module holds."""
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


STAGES = ("VAE encode", "observation and router", "state token", "executor, one step", "planner refresh")


def stage_bytes(models: Models) -> dict[str, int]:
    """Bytes that a stage must at least move: its weights once, the keys and values that it reads and writes.

    Keys and values of the text are made once an episode and not counted, those of the state once a chunk.
    """
    planner, executor, config = models.planner, models.executors[1], models.config
    plan = models.k.nbytes + models.v.nbytes
    inner, length = config.num_heads * config.head_dim, models.text.shape[1]
    one_layer = 2 * BATCH * inner * models.k.element_size()  # keys and values of one text token
    state = nbytes(executor.text) + nbytes(executor.state_encoder)
    bytes_of = (
        nbytes(models.vae),
        nbytes(models.router) + 2 * plan,
        state,
        nbytes(executor) - state + plan + config.num_layers * (length + 1) * one_layer,
        nbytes(planner) - nbytes(planner.text) + models.memory_k.nbytes + models.memory_v.nbytes + plan
        + (config.num_layers - 1) * length * one_layer,
    )  # fmt: skip
    return dict(zip(STAGES, bytes_of, strict=True))


def chunk_bytes(stages: Mapping[str, int], steps: int) -> int:
    """Of encoding, routing, the state's keys and values, and all steps."""
    once = sum(stages[name] for name in STAGES[:3])
    return once + steps * stages["executor, one step"]


def cosine(a: Any, b: Any) -> float:
    """Of two outputs: tensors or nested sequences of them."""
    a, b = (torch.cat([x.detach().float().flatten().cpu() for x in tree_tensors(y)]) for y in (a, b))
    return float(a.double() @ b.double() / a.double().norm() / b.double().norm())


def tree_tensors(tree: Any) -> list[Tensor]:
    """Tensors of a tensor or of nested lists and tuples, in order."""
    return [tree] if isinstance(tree, Tensor) else [x for part in tree for x in tree_tensors(part)]
