"""Fixtures for all tests, and what they and the processes that they start find in the environment."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
_PREPARED = "AHAWAM_TESTS_PREPARED"


def _prepare_environment() -> None:
    """Of the first process; those that it starts inherit it. Must be called before anything imports jax."""
    os.environ[_PREPARED] = "1"
    # A fifth of the compile time, for what then runs for milliseconds, and eight virtual devices, for the tests of
    # sharding. Flags of the caller stay.
    quick = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
    if version("jaxlib").startswith("0.10."):  # 0.12 ends a process at this flag, which it no longer knows
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Processes find the code wherever pytest was started.
    ours = (str(REPOSITORY), str(REPOSITORY / "packages" / "ahawam-client"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (*ours, os.environ.get("PYTHONPATH"))))
    # What one test has compiled no other test, worker or command compiles again. Compiled code is of one machine and
    # one jaxlib, so the folder begins empty and goes with the run.
    cache = tempfile.mkdtemp(prefix="ahawam-compiled-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # A job in the background inherits that Ctrl-C is ignored or blocked, and so would what a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


# Worker processes that import a test module come here too: pytest-xdist's, and those of a loader in a test.
if _PREPARED not in os.environ:
    _prepare_environment()

ONE_DEVICE = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"  # the later flag counts


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


@pytest.fixture(autouse=True, scope="module")
def ordinary_priority() -> Iterator[None]:
    """What a library did to this process's priority in one file would slow or stop the tests of all others."""
    yield
    if hasattr(os, "sched_getscheduler"):
        found = os.sched_getscheduler(0)
        assert found not in (os.SCHED_FIFO, os.SCHED_RR), "left with a priority of real time; see own_priority"


@pytest.fixture
def single_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training in the test's own process finds one device, for which it compiles in half the time."""
    import jax

    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that two processes end at the same time."""
    longest = (
        "training/test_loop.py", "training/test_sharding.py", "export/test_to_torch.py", "test_own_robot.py",
        "test_end_to_end.py", "export/test_runtime.py", "export/test_benchmark.py",
        "export/engines/test_onnx_graphs.py",
    )  # fmt: skip
    order = {REPOSITORY / "tests" / name: place for place, name in enumerate(longest)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
