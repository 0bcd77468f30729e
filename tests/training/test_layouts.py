"""The same training on any layout: processes, devices of each, a mesh over them. Real processes, joined by gloo."""

import json
import shutil
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.data_pipelines import tiny_dataset
from tests.training.jobs import run_training

pytestmark = pytest.mark.slow
STEPS = 20


class Layout(NamedTuple):
    """A job: processes, devices of each, and what of the mesh is not 1."""

    processes: int
    devices: int
    mesh: dict[str, int]


LAYOUTS = {
    "alone": Layout(1, 1, {}),
    "1x4": Layout(1, 4, dict(fsdp=4)),
    "2x2": Layout(2, 2, dict(fsdp=2, tensor=2)),  # fsdp crosses processes
    "2x2 data": Layout(2, 2, dict(data=2, fsdp=2)),
    "2x1": Layout(2, 1, dict(tensor=2)),  # both processes load all rows
    "4x1": Layout(4, 1, dict(fsdp=2, tensor=2)),  # both axes cross
    "1x8": Layout(1, 8, dict(fsdp=8)),
}
MOVED = ("alone", "1x4", "2x2", "4x1")
CONTINUED = (("alone", "1x4"), ("1x4", "2x2"), ("4x1", "alone"))


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], list[dict]]:
    """Function of a layout and a workdir: trains there to the end and returns a row of numbers for every step."""
    data = tiny_dataset.write_dataset(tmp_path_factory.mktemp("dataset"))
    cache = tmp_path_factory.mktemp("cache")

    def run(name: str, workdir: Path) -> list[dict]:
        processes, devices, mesh = LAYOUTS[name]
        sizes = dict(data=1, fsdp=1, tensor=1) | mesh
        run_training(
            processes, devices, workdir, *(f"--config.mesh.{axis}={size}" for axis, size in sizes.items()),
            f"--config.data.path={data}", f"--config.data.cache={cache}", "--config.data.validation_episodes=0",
            f"--config.train.steps={STEPS}", f"--config.train.checkpoint_every={STEPS // 2}",
        )  # fmt: skip
        return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.fixture(scope="module")
def trained(train: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[dict]]]:
    """Function of a layout: workdir and rows of a run that nothing interrupted."""
    known: dict[str, tuple[Path, list[dict]]] = {}

    def run(name: str) -> tuple[Path, list[dict]]:
        if name not in known:
            workdir = tmp_path_factory.mktemp("run")
            known[name] = workdir, train(name, workdir)
        return known[name]

    return run


def half_of(workdir: Path, copy: Path) -> Path:
    """A copy of a run that was stopped after half of its steps."""
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / f"checkpoints/{STEPS}")
    return copy


def assert_same_losses(rows: list[dict], expected: list[dict]) -> None:
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for name in ("loss", "loss_video", "loss_action"):
        # 1e-5 of losses near 1 are 80 roundings; 20 updates carry on what sums in another order differ by.
        np.testing.assert_allclose([r[name] for r in rows], [r[name] for r in expected], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "alone"])
def test_losses_are_those_of_one_process(trained: Callable, name: str) -> None:
    assert_same_losses(trained(name)[1], trained("alone")[1])


@pytest.mark.parametrize("before, after", CONTINUED)
def test_a_run_goes_on_in_another_layout(
    trained: Callable, train: Callable, tmp_path: Path, before: str, after: str
) -> None:
    rows = train(after, half_of(trained(before)[0], tmp_path / "run"))
    assert_same_losses(rows, trained("alone")[1])


@pytest.mark.parametrize("before, after", sorted({*permutations(MOVED, 2)} - {*CONTINUED}))
def test_checkpoints_are_read_in_any_layout(
    trained: Callable, train: Callable, tmp_path: Path, before: str, after: str
) -> None:
    """A finished run, asked for again: every array is read and its sum compared."""
    workdir, rows = trained(before)
    assert train(after, shutil.copytree(workdir, tmp_path / "run")) == rows


@pytest.mark.parametrize("name", ["alone", "1x8"])
def test_a_resumed_run_is_the_same_bit_for_bit(trained: Callable, train: Callable, tmp_path: Path, name: str) -> None:
    workdir, rows = trained(name)
    assert train(name, half_of(workdir, tmp_path / "run")) == rows
