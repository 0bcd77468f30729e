"""What is alive at once, in programs whose peak is known."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from ahawam_jax.planning.devices import make_cluster
from ahawam_jax.planning.estimate import estimate
from ahawam_jax.planning.layout import lay_out
from ahawam_jax.planning.memory import lives, temporaries
from ahawam_jax.planning.program import read
from tests.planning.steps import get_config

SQUARE = jax.ShapeDtypeStruct((10, 10), jnp.float32)
ONE = 10 * 10 * 4
SIZES = {"data": 1, "fsdp": 2, "tensor": 1}


def peak(function: Callable, *arguments: jax.ShapeDtypeStruct, donated: int = 0, split: bool = False) -> int:
    program = read(jax.make_jaxpr(function)(*arguments))
    rows = ("fsdp",) if split else ()
    inputs = [(rows, *[()] * (len(x.shape) - 1)) for x in arguments]
    found = lay_out(program, inputs, [None] * len(program.outputs), SIZES, [False] * len(arguments))
    return temporaries(lives(program, donated), found, SIZES).bytes


def test_products_live_until_they_are_read() -> None:
    def chain(x: jax.Array) -> jax.Array:
        for _ in range(5):
            x = x @ x
        return x

    assert peak(chain, SQUARE) == 2 * ONE  # one that is read, one that is written
    assert peak(chain, SQUARE, donated=1) == 2 * ONE  # inside; the last is written where the argument lies
    assert peak(lambda x: x @ x, SQUARE, donated=1) == 0


def test_elementwise_operations_take_no_memory_but_keep_what_they_read() -> None:
    def waves(x: jax.Array) -> jax.Array:
        a = x @ x
        b, c, d = jnp.tanh(a), jnp.exp(a), jnp.sin(a)
        return (b * c + d) @ x

    def late(x: jax.Array) -> jax.Array:
        a = x @ x
        b = jnp.tanh(a)
        return ((x @ x.T) @ x) * b

    assert peak(waves, SQUARE) == 2 * ONE  # a and what the product reads, then that and the result
    assert peak(late, SQUARE) == 3 * ONE  # a, as b is computed at the end, and two products


def test_loops_hold_what_they_stack_from_the_beginning() -> None:
    def layers(x: jax.Array) -> jax.Array:
        for _ in range(2):
            x, stacked = jax.lax.scan(lambda x, _: (x @ x, x), x @ x, None, length=7)
            x = stacked.sum(0) @ x
        return x

    assert peak(layers, SQUARE) == pytest.approx(2 * 7 * ONE + 2 * ONE, abs=ONE)


def test_a_device_holds_its_own_rows() -> None:
    tall = jax.ShapeDtypeStruct((1000, 10), jnp.float32)

    def twice(x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ x.T[:, :10]) @ x.T[:, :10]

    whole, half = (peak(twice, tall, split=split) for split in (False, True))
    assert half == pytest.approx(whole / 2, rel=0.05)


def test_less_remat_takes_more_memory_and_microbatches_less() -> None:
    found = {}
    for remat, accumulate in (("full", 1), ("none", 1), ("full", 4)):
        config = get_config()
        config.data.batch_size = 64
        config.model.remat, config.optimizer.accumulate = remat, accumulate
        found[remat, accumulate] = estimate(config, make_cluster("h100", "1x1x1", 1)).temporary
    assert found["none", 1] > found["full", 1] > found["full", 4]
