"""Estimates beside what the compiler says of GPUs that are not here. Needs XLA's CUDA plug-in, and no GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ahawam_jax.planning.compiling import _folder

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(_folder("jax_cuda12_plugin") is None, reason="the CUDA plug-in for JAX is not installed")
@pytest.mark.parametrize(("mesh", "batch"), [("1x8x1", 64), ("1x64x1", 512)])
def test_memory_and_collectives_at_full_size(mesh: str, batch: int) -> None:
    """Memory within 15%, as promised; bytes of what is gathered and scattered within 3%."""
    flags = ["--config=configs/robocoin.py", f"--mesh={mesh}", f"--config.data.batch_size={batch}", "--compile",
             "--config.data.latents=cached", "--config.data.latent_clips"]  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-m", "ahawam_jax", "plan", *flags], cwd=REPOSITORY, capture_output=True, text=True,
        env=os.environ | {"XLA_FLAGS": ""},  # the tests' own flags are for quick compiling on CPUs
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    table = run.stdout.partition("\nCompiled for")[2]
    ratios = {name: float(ratio) for name, ratio in re.findall(r"^  ([a-z-]+) .* ([\d.]+)$", table, re.M)}
    assert ratios["arguments"] == pytest.approx(1, abs=0.01)
    assert ratios["peak"] == pytest.approx(1, abs=0.15)
    assert ratios["all-gather"] == pytest.approx(1, abs=0.03)
    assert ratios["reduce-scatter"] == pytest.approx(1, abs=0.03)
