"""Which folder may import which, read off the source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = ("ahawam_jax", "configs", "data_pipelines", "export", "tests")
TORCH_SIDE = {"torch", "tensorflow", "onnx", "tensorrt", "export", "tests"}
MODEL_SIDE = {"jax", "jaxlib", "flax", "optax", "orbax", "ahawam_jax"}

# A room of ahawam_jax and the rooms it may use. Rooms that are not named are on top and may use all of these.
ROOMS = {
    "models": {"models"},
    "flow_matching": set(),
    "weights": {"models", "weights"},
    "text_cache": {"models", "weights"},
    "towers": {"models", "weights", "text_cache"},
    "latents": {"models", "weights", "text_cache", "towers"},
    "inference.sampling": {"models", "flow_matching"},
    "inference": {"models", "flow_matching", "weights", "towers", "latents", "training", "inference"},
    "training": {"models", "flow_matching", "weights", "towers", "latents", "training", "inference.sampling"},
}


def sources(folder: str) -> list[Path]:
    return sorted((REPOSITORY / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, also inside functions: "a.b.c" for `from a.b import c`."""
    package = path.parent.relative_to(REPOSITORY).parts
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def offences(folder: str, forbidden: set[str]) -> list[str]:
    """Imports in a folder whose top-level package is forbidden."""
    return [
        f"{module_name(path)} imports {name}"
        for path in sources(folder)
        for name in imports(path)
        if name.partition(".")[0] in forbidden
    ]


def inside(name: str, room: str) -> bool:
    return name == f"ahawam_jax.{room}" or name.startswith(f"ahawam_jax.{room}.")


def test_there_is_something_to_check() -> None:
    assert all(sources(folder) for folder in ("ahawam_jax", "configs", "data_pipelines"))
    assert "ahawam_jax.models.config.ModelConfig" in set(imports(REPOSITORY / "ahawam_jax/models/planner.py"))


def test_configs_import_only_ml_collections_and_each_other() -> None:
    allowed = {"ml_collections", "configs", *sys.stdlib_module_names}
    names = {(path, name) for path in sources("configs") for name in imports(path)}
    assert not [f"{path.name} imports {name}" for path, name in names if name.partition(".")[0] not in allowed]


def test_data_pipelines_know_no_model() -> None:
    assert not offences("data_pipelines", TORCH_SIDE | MODEL_SIDE)


def test_ahawam_jax_needs_no_torch() -> None:
    assert not offences("ahawam_jax", TORCH_SIDE)


@pytest.mark.parametrize("folder", OURS[:-1])
def test_nothing_imports_tests(folder: str) -> None:
    assert not offences(folder, {"tests"})


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_use_only_what_lies_below(room: str) -> None:
    found = []
    for path in sources("ahawam_jax"):
        owner = module_name(path)
        narrower = [other for other in ROOMS if other.startswith(f"{room}.") and inside(owner, other)]
        if not inside(owner, room) or narrower:
            continue
        for name in imports(path):
            ours = name.startswith("ahawam_jax.") and not any(inside(name, allowed) for allowed in ROOMS[room])
            if ours and name != "ahawam_jax":
                found.append(f"{owner} imports {name}")
    assert not found
