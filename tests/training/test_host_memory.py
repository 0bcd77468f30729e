"""What a process keeps and gives back once its functions are compiled."""

import ctypes
import os
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ahawam_jax.training.host_memory import give_back


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_is_compiled_ahead_goes_on_and_the_rest_is_traced_anew() -> None:
    traced = []

    def double(x: jax.Array) -> jax.Array:
        traced.append(x)
        return 2 * x

    jitted, x = jax.jit(double), jnp.arange(3.0)
    compiled = jax.jit(double).lower(x).compile()
    jitted(x)
    traced.clear()
    give_back()
    assert compiled(x).tolist() == [0, 2, 4] and not traced
    assert jitted(x).tolist() == [0, 2, 4] and len(traced) == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are not asked")
def test_freed_memory_goes_back_to_the_system() -> None:
    """Pieces of 64 KiB are cut from the heap, and one that is still held keeps what lies before it."""
    libc, piece, count = ctypes.CDLL(None), 1 << 16, 3000
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    before = resident()
    pieces = [libc.malloc(ctypes.c_size_t(piece)) for _ in range(count)]
    for address in pieces:
        ctypes.memset(address, 1, piece)
    last = pieces.pop()
    for address in pieces:
        libc.free(address)
    kept = resident() - before
    assert kept > 0.9 * piece * count
    give_back()
    assert resident() - before < 0.2 * piece * count
    libc.free(last)
