"""A step that is traced once, for every batch and number of microbatches."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from ahawam_jax.planning.flops import walk
from ahawam_jax.planning.layout import lay_out
from ahawam_jax.planning.memory import lives, temporaries
from ahawam_jax.planning.program import Program, read, resized
from ahawam_jax.planning.search import COUNT, ROWS

SIZES = {"data": 1, "fsdp": 2, "tensor": 1}


def step(batch: int, count: int) -> Program:
    """As `make_train_step` accumulates: a loop over microbatches that adds to zeros, none for a single one."""

    def gradient(w: jax.Array, x: jax.Array) -> jax.Array:
        def loss(w: jax.Array) -> jax.Array:
            h, hidden = jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), h), x, None, length=5)
            return (h.reshape(-1, 2, 4) ** 2).sum() + hidden.mean()

        return jax.grad(loss)(w)

    def function(w: jax.Array, x: jax.Array) -> jax.Array:
        if count == 1:
            return w - gradient(w, x)
        micro = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
        total, _ = jax.lax.scan(lambda total, x: (total + gradient(w, x), None), jnp.zeros_like(w), micro)
        return w - total / count

    return read(jax.make_jaxpr(function)(jnp.zeros((8, 8)), jax.ShapeDtypeStruct((batch, 8), jnp.float32)))


def brief(program: Program) -> list:
    return [
        (op.name, [x.shape for x in op.inputs], [x.shape for x in op.outputs],
         op.body and (op.times, op.constants, op.carries, brief(op.body)))
        for op in program.ops
    ]  # fmt: skip


def costs(program: Program) -> tuple:
    inputs = [(("fsdp",), ())] * 2
    found = lay_out(program, inputs, [inputs[0]], SIZES, [True, False])
    return [(x.kind, x.axes, x.bytes, x.times) for x in found], temporaries(lives(program, 1), found, SIZES).bytes


@pytest.mark.parametrize(("batch", "count"), [(24, 1), (24, 2), (24, 3), (8, 4)])
def test_other_sizes_are_those_of_a_trace_of_their_own(batch: int, count: int) -> None:
    traced = step(ROWS * COUNT, COUNT)
    one, alone = resized(traced, {ROWS: batch // count, COUNT: count}), step(batch, count)
    if count > 1:
        assert brief(one) == brief(alone)
    assert costs(one) == costs(alone)
    assert brief(traced) == brief(step(ROWS * COUNT, COUNT))  # it stays as it was


def test_a_single_microbatch_is_not_added_to_zeros() -> None:
    """The loop adds to zeros, a step without microbatches adds nothing."""
    one, alone = resized(step(ROWS * COUNT, COUNT), {ROWS: 24, COUNT: 1}), step(24, 1)
    additions, expected = (Counter(op.name for op, _ in walk(program))["add"] for program in (one, alone))
    assert additions == expected
    several = resized(step(ROWS * COUNT, COUNT), {ROWS: 12, COUNT: 2})
    assert Counter(op.name for op, _ in walk(several))["add"] == expected + 1
