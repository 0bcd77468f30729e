"""Logical axis names: on parameters when they are made, on activations at layer boundaries.

What a name means on a mesh is decided by `training/sharding.py`; without it, constraints do nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import flax.linen as nn
import jax

Axes = tuple[str | None, ...]
Constraint = Callable[[jax.Array, Axes], jax.Array]

# Not flax's with_logical_constraint: that one needs a global mesh, under which DenseGeneral's initialiser fails.
_constraint: ContextVar[Constraint | None] = ContextVar("constraint", default=None)


def partitioned(init: Callable, axes: Axes) -> Callable:
    """An initialiser whose parameter carries logical axis names."""
    return nn.with_logical_partitioning(init, axes)


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """Asks for x to be laid out by its logical axes, where a mesh is in use."""
    apply = _constraint.get()
    return x if apply is None else apply(x, axes)


@contextlib.contextmanager
def constraints(apply: Constraint) -> Iterator[None]:
    """Inside, `constrain` calls `apply`."""
    token = _constraint.set(apply)
    try:
        yield
    finally:
        _constraint.reset(token)
