"""What every benchmark prints and divides by: the machine, and the floors it sets."""

import platform
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def describe() -> str:
    """Device, versions and commit, one line."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = jax.devices()[0]
    return (
        f"{device.device_kind} ({device.platform}), jax {jax.__version__}, Python {platform.python_version()}, "
        f"commit {commit}"
    )


def median_ms(run: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of a call whose result is waited for, after two calls to warm up."""
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times[2:]))


def copy_gb_per_s(gib: float, repeats: int = 10) -> float:
    """Bytes read and written per second by a copy of an array of this size, in GB/s."""
    x = jnp.zeros(int(gib * 2**28), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / 1e6 / median_ms(lambda: copy(x), repeats)


def matmul_tflops(size: int, repeats: int = 10) -> float:
    """TFLOP/s of a bfloat16 product of two random square matrices."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    return 2 * size**3 / 1e9 / median_ms(lambda: product(a, b), repeats)
