"""The benchmark of the scan: its datasets are sound but for one, the scan names that one, and memory is counted."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import robocoin_scan as benchmark
from data_pipelines.episodes import DatasetError
from data_pipelines.readers.lerobot import open_lerobot
from data_pipelines.readers.subset import load_subset


def test_one_dataset_is_broken_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "ROWS", 70)
    folder, out = tmp_path / "datasets", tmp_path / "subset.toml"
    broken = benchmark.write_tree(folder, 7, 3)
    roots = sorted(folder.iterdir())
    assert len(roots) == 7 and broken in {root.name for root in roots}
    for root in roots:
        dataset = open_lerobot(root)
        names, opened = benchmark.ROBOTS[dataset.robot]
        assert dataset.state_names == dataset.action_names == tuple(names) and dataset.lengths.tolist() == [70] * 3
        for episode in range(3):
            if (root.name, episode) == (broken, 1):
                with pytest.raises(DatasetError, match="cannot be read as parquet"):
                    dataset.states(episode)
                continue
            states = dataset.states(episode)
            np.testing.assert_array_equal(dataset.actions(episode)[:-1], states[1:])
            grippers = states[:, [place for place, name in enumerate(names) if "gripper" in name]]
            assert not grippers.size or (grippers.min(), grippers.max()) == (0, opened)
    seconds, cpu, peaks, said = benchmark.scan(folder, out)
    assert {entry.path.name for entry in load_subset(out) if entry.exclude} == {broken} and broken in said
    assert seconds > 0 and cpu > 0 and len(peaks) == 3 and 0 < peaks[0] <= peaks[1] <= peaks[2]


def test_memory_is_that_of_a_process_and_all_it_starts() -> None:
    """50 MiB and 100 MiB, touched, on top of two interpreters of 30 MiB at most each."""
    hold = "import subprocess, sys; kept = b'x' * ({} << 20); {}; sys.stdin.read()"
    child = hold.format(100, "pass")
    parent = hold.format(50, f"subprocess.Popen([sys.executable, '-c', {child!r}])")
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE)
    memory, deadline = benchmark.Memory(process), time.monotonic() + 60
    while memory.peak < 150 << 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.communicate()
    assert 150 << 20 < memory.peak < 210 << 20
