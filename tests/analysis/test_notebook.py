"""The notebook runs from top to bottom, and its figures are drawn."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from tests import tiny_config
from tests.conftest import REPOSITORY
from tests.data_pipelines.tiny_dataset import write_dataset
from tests.export.test_to_torch import import_random

NOTEBOOK = REPOSITORY / "notebooks" / "planner_context.ipynb"
LARGEST = 1_500_000  # bytes


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def run(source: str, names: dict[str, Any]) -> Any:
    """Runs a cell without its magic and returns what its last line shows, as Jupyter does."""
    tree = ast.parse("".join(line for line in source.splitlines(keepends=True) if not line.startswith("%")))
    shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if shown is None else eval(compile(ast.Expression(shown.value), "cell", "eval"), names)


def has_figure(cell: dict[str, Any]) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell["outputs"])


def test_it_is_committed_as_it_ran() -> None:
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert [has_figure(cell) for cell in cells] == [False] + [True] * 8
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert NOTEBOOK.stat().st_size < LARGEST


@pytest.mark.slow
def test_it_runs_on_a_tiny_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AHAWAM_RUN", str(import_random(tiny_config.get_config(), tmp_path)))
    monkeypatch.setenv("AHAWAM_DATASET", str(write_dataset(tmp_path / "dataset")))
    monkeypatch.setenv("AHAWAM_SEEDS", "0")  # the simulation's robot is another one
    names: dict[str, Any] = {}
    *shown, read_out = [run("".join(cell["source"]), names) for cell in code_cells()]
    assert [isinstance(x, Figure) for x in shown] == [False] + [True] * 7
    assert read_out == "AHAWAM_SEEDS is 0: no simulation."
