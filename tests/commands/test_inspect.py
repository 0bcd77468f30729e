"""The parameter table of the command line, and what it says of a run's robots."""

import subprocess
import sys
from pathlib import Path

import pytest

from ahawam_jax.commands.inspect import inspect_path
from tests.conftest import REPOSITORY
from tests.inference.test_embodiment import save_run


def test_table_of_the_full_size_model() -> None:
    command = [sys.executable, "-m", "ahawam_jax", "inspect", "--config=configs/robotwin_offset.py"]
    out = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for count in ("4,999,787,712", "1,020,900,366", "1,227,632,670", "84,062,208", "16,982,112", "61,440",
                  "7,349,428,556"):  # fmt: skip
        assert count in out
    assert "5 chunks of 16" in out


def test_robots_of_a_run_with_their_own_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_path(save_run(tmp_path), None, values=False) == 0
    lines = capsys.readouterr().out.splitlines()
    of_a = next(number for number, line in enumerate(lines) if line.startswith("    a: "))
    assert [line.strip() for line in lines[of_a + 1 : of_a + 3]] == [
        f"its own state has 15 numbers, its action 15; held: waist; in: {name}" for name in ("cups", "cloth")
    ]
    assert lines[of_a + 3].startswith("    b: ")
