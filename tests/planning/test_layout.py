"""Derived collectives: single products by what the textbook says, and whole steps against compiled programs."""

from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from ahawam_jax.planning.devices import make_cluster
from ahawam_jax.planning.estimate import estimate
from ahawam_jax.planning.layout import GATHER, REDUCE, SCATTER, Collective, lay_out
from ahawam_jax.planning.program import Spec, read
from ahawam_jax.planning.subject import make_subject
from ahawam_jax.training import sharding
from ahawam_jax.training.collectives import collectives
from tests.planning.steps import get_config

SIZES = {"data": 2, "fsdp": 4, "tensor": 2}
ROWS: Spec = (("data", "fsdp"), ())


def derive(
    function: Callable, shapes: list[tuple[int, ...]], inputs: list[Spec], output: Spec | None
) -> list[Collective]:
    """Collectives of a function whose arguments but the first are weights."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = read(jax.make_jaxpr(function)(*arguments))
    return lay_out(program, inputs, [output], SIZES, [i > 0 for i in range(len(shapes))])


def brief(found: list[Collective]) -> list[tuple[str, tuple[str, ...], int, int]]:
    return [(one.kind, one.axes, one.bytes, one.times) for one in found]


def test_a_split_weight_is_gathered_once() -> None:
    def twice(x: jax.Array, w: jax.Array) -> jax.Array:
        return (x @ w) @ w.T

    found = derive(twice, [(16, 8), (8, 8)], [ROWS, (("fsdp",), ())], None)
    assert brief(found) == [(GATHER, ("fsdp",), 8 * 8 * 4, 1)]


def test_what_is_cast_before_its_use_is_gathered_in_the_smaller_type() -> None:
    found = derive(lambda x, w: x @ w.astype(jnp.bfloat16), [(16, 8), (8, 6)], [ROWS, (("fsdp",), ("tensor",))], None)
    assert brief(found) == [(GATHER, ("fsdp",), 8 * 3 * 2, 1)]  # the columns of a device, in bfloat16


def test_a_product_over_a_split_dimension_is_reduced() -> None:
    weight: Spec = (("tensor",), ("fsdp",))
    found = derive(lambda x, w: x @ w, [(16, 6), (6, 8)], [(("data", "fsdp"), ("tensor",)), weight], None)
    assert brief(found) == [(GATHER, ("fsdp",), 3 * 8 * 4, 1), (REDUCE, ("tensor",), 2 * 8 * 4, 1)]


def test_sums_that_are_added_are_reduced_once() -> None:
    def two(x: jax.Array, v: jax.Array, w: jax.Array) -> jax.Array:
        return x @ v + x @ w

    weight: Spec = (("tensor",), ())
    found = derive(two, [(16, 6), (6, 8), (6, 8)], [(("data", "fsdp"), ("tensor",)), weight, weight], None)
    assert brief(found) == [(REDUCE, ("tensor",), 2 * 8 * 4, 1)]


def test_a_gradient_is_scattered_to_where_its_weight_lies() -> None:
    """Over fsdp; its pieces are then summed over the copies of the model. A weight in one piece is summed whole."""
    for wanted, expected in (
        ((("fsdp",), ()), [(SCATTER, ("fsdp",), 8 * 6 * 4, 1), (REDUCE, ("data",), 2 * 6 * 4, 1)]),
        (((), ()), [(REDUCE, ("data", "fsdp"), 8 * 6 * 4, 1)]),
    ):
        found = derive(lambda x, y: 0.5 * (x.T @ y), [(16, 8), (16, 6)], [ROWS, ROWS], wanted)
        assert brief(found) == expected


def test_a_loop_gathers_its_weights_in_every_pass() -> None:
    def layers(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    found = derive(layers, [(16, 8), (5, 8, 8)], [ROWS, ((), ("fsdp",), ())], None)
    assert brief(found) == [(GATHER, ("fsdp",), 8 * 8 * 4, 5)]


@pytest.mark.parametrize("mesh", ["2x4x1", "1x4x2"])
def test_as_much_as_the_compiled_step_sends(mesh: str) -> None:
    """Bytes by group of the tiny step, compiled for eight devices of this machine.

    XLA on CPUs sums everywhere what it could scatter, so sums are taken together. Without a tensor axis both agree to
    3%: what differs are arrays of some hundred bytes. With one, XLA shares a few layouts out differently.
    """
    config, cluster = get_config(), make_cluster("h100", mesh, 1)
    real = sharding.make_mesh(dict(zip(sharding.MESH_AXES, cluster.sizes, strict=True)))
    subject = make_subject(config, real)
    with sharding.activation_rules(real):
        step = jax.jit(subject.function, out_shardings=(subject.layout, sharding.replicated(real)))
        text = step.lower(*subject.arguments).compile().as_text()

    def kind_of(kind: str) -> str:
        return "sum" if kind in (REDUCE, SCATTER) else kind

    compiled, derived = Counter[str](), Counter[str]()
    for one in collectives(text):
        if len(one.groups[0]) > 1:
            compiled[kind_of(one.kind)] += one.bytes
    for row in estimate(config, cluster).traffic:
        derived[kind_of(row.kind)] += row.bytes
    for kind in ("sum", GATHER):
        assert derived[kind] == pytest.approx(compiled[kind], rel=0.15 if "x2" in mesh else 0.03)
    assert compiled["all-to-all"] + compiled["collective-permute"] < 0.01 * compiled["sum"]
