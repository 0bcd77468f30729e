"""Which folder may import which, read off the source, and that no files import each other in a circle."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = ("ahawam_jax", "configs", "data_pipelines", "export", "benchmarks", "tests")
TORCH_SIDE = {"torch", "tensorflow", "onnx", "tensorrt", "export", "benchmarks", "tests"}
MODEL_SIDE = {"jax", "jaxlib", "flax", "optax", "orbax", "ahawam_jax"}

# The floors of each house from the bottom up, and what a floor may use beside itself. `episodes` is the interface that
# everything in data_pipelines builds on; `progress` says how far a job is, `disk` writes files whole,
# `processes` starts workers.
AHAWAM = {
    "compilation_cache": set(),
    "hlo": set(),
    "models": set(),
    "flow_matching": set(),
    "sampling": {"models", "flow_matching"},
    "weights": {"models"},
    "towers": {"models", "weights"},
    "checkpoint_files": set(),
    "checkpoint_keep": set(),
    "checkpoint_sums": set(),
    "checkpoints": {"weights", "checkpoint_files", "checkpoint_keep", "checkpoint_sums"},
    "inference": {"models", "flow_matching", "sampling", "weights", "towers", "checkpoints"},
    "training": {
        "hlo", "models", "flow_matching", "sampling", "weights", "towers", "checkpoint_files", "checkpoint_keep",
        "checkpoints", "compilation_cache",
    },
    "planning": {"hlo", "models", "towers", "inference", "training"},
    "verification": {"models", "flow_matching", "sampling", "weights", "towers", "training"},
    "analysis": {"models", "towers", "inference"},
    "evaluation": {"inference", "analysis"},
    "serving": {"inference"},
    "experiments": {"evaluation", "inference"},
    "commands": {
        "models", "sampling", "weights", "towers", "checkpoints", "inference", "training", "planning", "verification",
        "evaluation", "experiments", "serving",
    },
    "__main__": {"compilation_cache"},
}  # fmt: skip
DATA = {
    "paths": set(),
    "episodes": set(),
    "progress": set(),
    "disk": set(),
    "ownership": {"disk"},
    "processes": set(),
    "keeper": set(),
    "json_lines": {"disk"},
    "files": set(),
    "normalization": {"episodes"},
    "canvas": set(),
    "embodiment": {"episodes"},
    "readers": {"episodes", "embodiment", "canvas", "tfds", "disk", "paths", "files"},
    "caches": {"episodes", "canvas", "progress", "disk", "ownership", "processes", "paths", "files"},
    "statistics": {"episodes", "normalization", "readers", "disk", "paths", "files"},
    "fingerprint": {"episodes", "readers"},
    "windows": {"episodes", "caches", "normalization", "statistics"},
    "augmentation": {"canvas"},
    "loader": {"episodes", "caches", "statistics", "windows", "processes"},
    "simulation": {"progress", "processes"},
    "recording": {"simulation", "progress", "episodes", "disk", "ownership", "processes", "paths"},
    "inspection": {
        "episodes", "embodiment", "readers", "normalization", "statistics", "canvas", "windows", "loader", "recording",
        "progress", "processes", "disk", "tfds",
    },
    "tfds": {
        "episodes", "embodiment", "readers", "caches", "progress", "disk", "processes", "ownership", "paths", "files",
    },
}
EXPORT = {
    "manifest": set(),
    "twin": {"manifest"},
    "released": set(),
    "exported": {"manifest", "twin"},
    "engines": {"manifest", "twin", "exported"},
    "checks": {"manifest", "twin", "exported", "engines", "to_tensorrt"},
    "measure": {"manifest", "twin", "exported", "released"},
    "runtime": {"manifest", "twin", "exported", "engines"},
    "to_torch": {"manifest", "twin", "exported", "checks"},
    "to_tensorrt": {"manifest", "twin", "exported", "engines"},
    "validate": {"manifest", "twin", "exported", "engines", "checks"},
    "evaluate": {"runtime"},
    "loading": {"manifest", "runtime"},
    "serve": {"loading"},
    "xpolicylab": {"loading"},
    "benchmark": {"measure", "twin"},
}
HOUSES = {"ahawam_jax": AHAWAM, "data_pipelines": DATA, "export": EXPORT}


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


@cache
def edges() -> dict[str, set[str]]:
    """Which of our files imports which: module -> modules."""
    known = {module_name(path) for folder in OURS for path in sources(folder)}

    def module_of(name: str) -> str:
        return name if name in known else name.rpartition(".")[0]

    return {
        module_name(path): {module_of(name) for name in imports(path)} & known
        for folder in OURS
        for path in sources(folder)
    }


def offences(folder: str, forbidden: set[str]) -> list[str]:
    """Imports in a folder whose top-level package is forbidden."""
    return [
        f"{module_name(path)} imports {name}"
        for path in sources(folder)
        for name in imports(path)
        if name.partition(".")[0] in forbidden
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, or nothing."""
    done: set[str] = set()

    def walk(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for after in sorted(graph.get(node, ())):
            if found := walk(after, [*trail, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def test_there_is_something_to_check() -> None:
    assert all(sources(folder) for folder in OURS)
    assert "ahawam_jax.models.config.ModelConfig" in set(imports(REPOSITORY / "ahawam_jax/models/planner.py"))
    assert "ahawam_jax.models.config" in edges()["ahawam_jax.models.planner"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}})


def test_no_files_import_each_other_in_a_circle() -> None:
    assert not circle(edges())


def test_configs_import_only_ml_collections_and_each_other() -> None:
    allowed = {"ml_collections", "configs", *sys.stdlib_module_names}
    names = {(path, name) for path in sources("configs") for name in imports(path)}
    assert not [f"{path.name} imports {name}" for path, name in names if name.partition(".")[0] not in allowed]


def test_data_pipelines_know_no_model() -> None:
    assert not offences("data_pipelines", TORCH_SIDE | MODEL_SIDE)


def test_the_interface_to_episodes_imports_nothing_of_ours() -> None:
    assert not edges()["data_pipelines.episodes"]


def test_ahawam_jax_needs_no_torch() -> None:
    assert not offences("ahawam_jax", TORCH_SIDE)


def test_a_training_does_not_load_torch_by_way_of_others() -> None:
    """As a library may that uses it where it is installed: 180 MiB in every process of a training."""
    code = "import sys, ahawam_jax.commands.train, ahawam_jax.training.loop; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize("folder", OURS[:-1])
def test_nothing_imports_tests_or_benchmarks(folder: str) -> None:
    assert not offences(folder, {"tests", "benchmarks"} - {folder})


@pytest.mark.parametrize("house", HOUSES)
def test_floors_use_only_what_lies_below(house: str) -> None:
    floors, found = HOUSES[house], []

    def floor_of(module: str) -> str:
        return module.split(".")[1] if "." in module else ""

    rooms = {floor_of(module) for module in edges() if module.startswith(f"{house}.")}
    assert rooms == floors.keys(), "the test must know every room"
    for module, targets in edges().items():
        if module.partition(".")[0] != house or module == house:
            continue
        allowed = floors[floor_of(module)] | {floor_of(module), ""}
        found += [
            f"{module} imports {target}"
            for target in sorted(targets)
            if target.partition(".")[0] == house and floor_of(target) not in allowed
        ]
    assert not found


@pytest.mark.parametrize("house", HOUSES)
def test_every_folder_says_what_lives_there(house: str) -> None:
    for path in (path for path in sources(house) if path.name == "__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no sentence"
