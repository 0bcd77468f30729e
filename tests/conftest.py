"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest

# Eight virtual devices, for the tests of sharding, and half the compile time, for what then runs for milliseconds.
# Must be set before anything imports jax.
QUICK_COMPILE = "--xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK_COMPILE}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with `reference/` and `datasets/`: the parent of AHAWAM_REFERENCE, default ../shared.

    Tests that need it are skipped where it is absent, and fail there when AHAWAM_REQUIRE_REFERENCE=1.
    """
    reference = Path(os.environ.get("AHAWAM_REFERENCE", REPOSITORY.parent / "shared" / "reference"))
    if not reference.is_dir():
        message = f"{reference} does not exist; set AHAWAM_REFERENCE to the folder with the reference fixtures."
        if os.environ.get("AHAWAM_REQUIRE_REFERENCE") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return reference.parent
