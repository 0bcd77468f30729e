"""What tracing and compiling leave in a process, which lives on for hours with it."""

import ctypes
import gc

import jax


def give_back() -> None:
    """Forgets what JAX keeps of functions that have been called, and gives free memory back to the system.

    What is compiled ahead of time goes on; a jitted function that is called again is traced and compiled anew.
    """
    jax.clear_caches()
    gc.collect()
    trim()


def trim() -> None:
    """Gives free memory back to the system, of which glibc keeps nearly all to itself; without glibc does nothing."""
    call = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if call is not None:
        call(0)
