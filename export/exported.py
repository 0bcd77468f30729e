"""Opens what `ahawam to-torch` wrote: the modules of the twin, and all that a policy needs around them."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict

from ahawam_jax.models.config import PATCH, SPATIAL_STRIDE, ModelConfig
from ahawam_jax.towers.building import STAND_INS, TextTower, build_text_tower
from ahawam_jax.towers.latents import make_canvas
from ahawam_jax.towers.vae import VaeConfig
from ahawam_jax.weights.files import open_weights
from data_pipelines.embodiment import Embodiment
from data_pipelines.files import read_json
from data_pipelines.statistics import FILE as STATISTICS
from data_pipelines.statistics import Statistics, load_statistics
from export.manifest import CONFIG, EMBODIMENT, MODEL, TEXT, VAE, ExportError, read_manifest, require
from export.twin.layers import DTYPES
from export.twin.model import Executor, PlannerRefresh, Router, from_release
from export.twin.vae import BlockTransformEncoder, VaeEncoder


@dataclasses.dataclass(frozen=True)
class Export:
    """An opened export. Its modules lie on one device and are ready to run."""

    folder: Path
    manifest: dict[str, Any]
    config: ConfigDict  # of the run
    model: ModelConfig
    statistics: Statistics
    embodiment: Embodiment
    text_tower: TextTower
    vae: VaeEncoder | BlockTransformEncoder
    planner: PlannerRefresh
    router: Router
    executor: Executor

    @property
    def max_delay(self) -> int:
        """Most committed actions that the run's chunks were trained to go on from."""
        return self.config.objective.get("max_delay", 0)


def load_export(
    folder: str | Path, dtype: str | None = None, device: str | torch.device = "cpu", steps: int | None = None,
    hashes: bool = False,
) -> Export:  # fmt: skip
    """Opens an export.

    dtype: "float32" or "bfloat16"; None for the one it was written in. steps: of the executor's loop, None for
    config.policy.steps. hashes: compare the content of every file with the manifest, not only its size. Raises
    ExportError for a folder that is not whole, WeightsError (both ValueErrors) for weights that do not fit its config.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, hashes)
    require(manifest, folder, (MODEL, CONFIG, STATISTICS, *([VAE] if manifest["vae"] else [])))
    kind = torch_dtype(manifest["dtype"] if dtype is None else dtype)
    config = ConfigDict(read_json(folder / CONFIG, ExportError, "copy the export again"))
    model = ModelConfig.create(config.model)
    statistics = load_statistics(folder / STATISTICS)
    check_widths(statistics, model, str(folder / STATISTICS))
    embodiment = Embodiment.as_recorded(model.state_dim, model.action_dim)
    if EMBODIMENT in manifest["files"]:
        embodiment = Embodiment.from_json(read_json(folder / EMBODIMENT, ExportError, "copy the export again"))
    weights = open_weights(folder / MODEL).tensors
    twin = from_release(
        weights, model, latent_grid(config), steps or config.policy.steps, config.objective.shift, kind, device,
        embodiment.action.present, config.objective.get("max_delay", 0) > 0,
    )  # fmt: skip
    towers = ConfigDict(config.towers)
    towers.text_cache = str(folder / TEXT)
    return Export(
        folder, manifest, config, model, statistics, embodiment, build_text_tower(towers, model),
        load_video(folder, towers.video, manifest["vae"], kind, device), twin.planner, twin.router, twin.executor,
    )  # fmt: skip


def load_video(
    folder: Path, name: str, sizes: dict[str, Any] | None, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> VaeEncoder | BlockTransformEncoder:
    """The video tower of an export, by its name in config.towers; sizes: of its VAE, None for one without weights."""
    if sizes is None:
        return BlockTransformEncoder(STAND_INS[name].places).to(device)
    sizes = {name: tuple(x) if isinstance(x, list) else x for name, x in sizes.items()}
    return VaeEncoder.from_wan(open_weights(folder / VAE).tensors, VaeConfig(**sizes), dtype, device)


def torch_dtype(name: str) -> torch.dtype:
    """float32 or bfloat16; another one is an ExportError."""
    if name not in DTYPES:
        raise ExportError(
            f"An export in {name} does not exist: products are {' or '.join(DTYPES)}, since the planner's residual "
            "stream overflows float16; ask for one of these."
        )
    return DTYPES[name]


def latent_grid(config: ConfigDict) -> tuple[int, int]:
    """Height and width of the latents of one canvas."""
    height, width = make_canvas(config).size
    token = SPATIAL_STRIDE * PATCH
    if height % token or width % token:
        raise ExportError(
            f"config.data.head_size {tuple(config.data.head_size)} makes a canvas of {height}x{width}; expected "
            f"multiples of {token}, the side of a planner token."
        )
    return height // SPATIAL_STRIDE, width // SPATIAL_STRIDE


def check_widths(statistics: Statistics, model: ModelConfig, source: str) -> None:
    """Raises ExportError for statistics of another robot's states or actions."""
    for kind, width in (("state", model.state_dim), ("action", model.action_dim)):
        found = len(statistics[kind]["mean"])
        if found != width:
            raise ExportError(
                f"{source} describes {kind}s of {found} numbers, config.model.{kind}_dim is {width}; take the "
                "statistics that belong to this checkpoint."
            )
