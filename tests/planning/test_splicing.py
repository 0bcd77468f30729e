"""Steps with several policies of remat, put together from steps with one: as if they were traced."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from ahawam_jax.planning.program import Program, read
from ahawam_jax.planning.search import COUNT, REMATS, ROWS, Programs, varied
from ahawam_jax.planning.splicing import spliced
from ahawam_jax.planning.subject import abstract_mesh, make_subject, trace
from tests.planning.steps import get_config
from tests.planning.test_program import brief

PARTS = ("planner", "router", "executor")


def step(full: set[str], scale: Callable[[jax.Array], jax.Array] = jnp.sin) -> Program:
    """Three stacks of layers in microbatches; of those in `full` the backward pass computes all layers again.

    What depends on no layer, a gate, is computed before a loop that keeps it for the backward pass.
    """

    def stack(name: str, x: jax.Array, w: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.tanh(x @ w) * (1 + jnp.tanh(w[0, 0])) * jnp.cos(gate), x.sum(0)

        gate = scale(x[0] * w[0, 0])
        with jax.named_scope(name):
            x, sums = jax.lax.scan(jax.checkpoint(layer) if name in full else layer, x, w)
        return x + sums.mean(0)

    def loss(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        for name in PARTS:
            x = scale(stack(name, x, weights[name]))
        return (x**2).sum()

    def function(weights: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
        zeros = jax.tree.map(jnp.zeros_like, weights)
        total, _ = jax.lax.scan(
            lambda total, x: (jax.tree.map(jnp.add, total, jax.grad(loss)(weights, x)), None), zeros, x
        )
        return jax.tree.map(jnp.subtract, weights, total)

    weights = {name: jax.ShapeDtypeStruct((5, 8, 8), jnp.float32) for name in PARTS}
    return read(jax.make_jaxpr(function)(weights, jax.ShapeDtypeStruct((3, 4, 8), jnp.float32)))


@pytest.mark.parametrize("full", [{"planner"}, {"planner", "router"}, {"planner", "executor"}, {"router"}])
def test_as_if_it_were_traced(full: set[str]) -> None:
    most, none = step({*PARTS}), step(set())
    expected = brief(step(full))
    assert expected not in (brief(most), brief(none))
    before = brief(most), brief(none)
    program: Program | None = most
    for part in PARTS:
        if part not in full:
            program = program and spliced(program, none, part)
    assert program is not None and brief(program) == expected
    assert (brief(most), brief(none)) == before  # both stay as they were
    for op in program.ops:
        assert all(value.producer is op for value in op.outputs)


def test_steps_that_differ_in_more_are_not_put_together() -> None:
    assert spliced(step({*PARTS}), step(set(), jnp.exp), "executor") is None


def test_a_search_traces_what_cannot_be_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from ahawam_jax.planning import search

    traced = []
    monkeypatch.setattr(search, "varied", lambda subject, remat, batch, count: traced.append(remat))
    monkeypatch.setattr(search, "trace", lambda subject: None)
    monkeypatch.setattr(search, "read", lambda jaxpr: step(set()))
    for result, expected in ((step(set()), ["full", "none"]), (None, ["full", "none", "full, executor=none"])):
        monkeypatch.setattr(search, "spliced", lambda program, other, part, result=result: result)
        traced.clear()
        assert Programs(None)["full, executor=none"] is not None
        assert traced == expected


@pytest.mark.slow
def test_the_training_step_as_if_it_were_traced() -> None:
    """Operation by operation, of every remat that a search puts together."""
    programs = Programs(make_subject(get_config(), abstract_mesh((1, 1, 1))))
    for remat in REMATS:
        if "," in remat:
            alone = read(trace(varied(programs.subject, remat, ROWS * COUNT, COUNT)))
            assert brief(programs[remat]) == brief(alone), remat
