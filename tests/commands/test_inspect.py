"""The parameter table of the command line."""

import subprocess
import sys

from tests.conftest import REPOSITORY


def test_table_of_the_full_size_model() -> None:
    command = [sys.executable, "-m", "ahawam_jax", "inspect", "--config=configs/robotwin_offset.py"]
    out = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for count in ("4,999,787,712", "1,020,900,366", "1,227,632,670", "84,062,208", "16,982,112", "61,440",
                  "7,349,428,556"):  # fmt: skip
        assert count in out
    assert "5 chunks of 16" in out
