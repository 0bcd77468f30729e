"""From what a user has on disk, a file, a set of shards or a model folder, to its tensors by name, unread."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ahawam_jax.weights.safetensors_file import read_safetensors
from ahawam_jax.weights.tensors import Tensor, WeightsError
from ahawam_jax.weights.torch_file import read_torch
from data_pipelines.files import absent, read_json
from data_pipelines.paths import local_path

# Where a component lies inside a downloaded model: the diffusers layout first, then Wan's own and DiffSynth's.
LOCATIONS = {
    "planner": ("transformer", "diffusion_pytorch_model*.safetensors"),
    "vae": ("vae", "Wan2.2_VAE.safetensors", "Wan2.2_VAE.pth"),
    "text encoder": ("text_encoder", "models_t5_umt5-xxl-enc-bf16.safetensors", "models_t5_umt5-xxl-enc-bf16.pth"),
}
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
WRAPPERS = ("model_state", "state_dict", "module", "model")  # a single key around the tensors says nothing


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and what else the files say."""

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]  # numbers and strings beside the tensors
    config: dict[str, Any]  # config.json beside the tensors (diffusers, transformers), or empty


def open_weights(path: str | Path, component: str = "") -> Weights:
    """Opens a .safetensors or .pt/.pth file, a sharded set (its index, its folder or one shard) or a model folder.

    component ("planner", "vae", "text encoder") says which part of a whole model's folder is meant. Names inside
    nested dicts of a .pt file are joined with '/'. Raises WeightsError for what is missing, cut off or not weights.
    """
    path = locate(local_path(path), component)
    if path.is_dir() or path.name.endswith(".index.json") or SHARD.fullmatch(path.name):
        files = _shards(path)
    else:
        files = (path,)
    tensors, metadata = {}, {}
    for file in files:
        if file.suffix == ".safetensors":
            found, extra = read_safetensors(file)
        else:
            found, extra = _flatten(read_torch(file))
        tensors |= found
        metadata |= extra
    if not tensors:
        raise WeightsError(f"{path} holds no tensors; give the file or folder of a checkpoint.")
    lora = [name for name in tensors if re.search(r"\blora|lora_(A|B|up|down)\b", name)]
    if lora:
        raise WeightsError(
            f"{path} is a LoRA ({lora[0]} and {len(lora) - 1} more): a small change to a model, not a model. Merge it "
            "into its base model with the program that trained it and import the result."
        )
    config = files[0].parent / "config.json"
    about = read_json(config, WeightsError, "copy it again") if config.is_file() else {}
    return Weights(path, files, tensors, metadata, about)


def locate(path: Path, component: str = "") -> Path:
    """The component's file or folder inside a model's folder, or the path itself."""
    if not path.exists():
        raise WeightsError(f"{path} {absent(path)}; give the file or folder of a downloaded checkpoint.")
    if path.is_dir():
        for pattern in LOCATIONS.get(component, ()):
            found = sorted(path.glob(pattern))
            if found:
                return found[0] if len(found) == 1 else path
    return path


def _shards(path: Path) -> tuple[Path, ...]:
    folder = path if path.is_dir() else path.parent
    indexes = [path] if path.name.endswith(".index.json") else sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        try:
            names = sorted(set(read_json(indexes[0], WeightsError, "copy it again")["weight_map"].values()))
        except (KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"{indexes[0]} is not an index of shards ({error!r}); copy it again.") from error
    else:
        names = sorted(file.name for file in folder.glob("*.safetensors"))
        sets = {match.groups()[::2] for match in map(SHARD.fullmatch, names) if match}
        if len(sets) == 1:
            (stem, count), = sets  # fmt: skip
            names = [f"{stem}-{i + 1:05d}-of-{count}.safetensors" for i in range(int(count))]
        elif not names:
            names = sorted(file.name for file in folder.iterdir() if file.suffix in (".pt", ".pth"))
        if not names or (len(names) > 1 and not sets):
            raise WeightsError(
                f"{folder} holds {len(names)} files of weights ({', '.join(names[:4]) or 'none'}); expected one, or a "
                "set of shards with its index. Name the file."
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise WeightsError(
            f"{folder} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:4])}; download them again."
        )
    return tuple(folder / name for name in names)


def _flatten(tree: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    while isinstance(tree, Mapping) and len(tree) == 1 and next(iter(tree)) in WRAPPERS:
        tree = next(iter(tree.values()))
    leaves = dict(_leaves(tree, ""))
    tensors = {name: x for name, x in leaves.items() if isinstance(x, Tensor)}
    return tensors, {name: x for name, x in leaves.items() if isinstance(x, (str, int, float))}


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, (list, tuple)):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        yield name, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{name}/{key}" if name else str(key))
