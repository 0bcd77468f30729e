"""A jaxpr as operations to walk: calls inlined, what nobody reads removed, loops with a body of their own."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.extend import core

Spec = tuple[tuple[str, ...], ...]  # of every dimension the mesh axes over which it is split


@dataclasses.dataclass(eq=False)
class Value:
    """An array between two operations.

    spec: how it is laid out, None until that is known (anything would do).  wanted: the layout that its readers end
    in, where it has one.  weight: it holds parameters, or state made like them, and nothing else.
    """

    shape: tuple[int, ...]
    dtype: Any
    producer: "Op | None" = None
    spec: Spec | None = None
    wanted: Spec | None = None
    weight: bool = False

    @property
    def size(self) -> int:
        """Entries of the whole array."""
        return int(np.prod(self.shape))

    @property
    def itemsize(self) -> int:
        """Bytes of an entry; keys of random numbers are two words."""
        return 8 if jax.dtypes.issubdtype(self.dtype, jax.dtypes.prng_key) else np.dtype(self.dtype).itemsize


@dataclasses.dataclass(eq=False)
class Op:
    """One equation.

    scope: the names of the modules and transformations it stands in.  body: of a scan, whose inputs are the scan's:
    constants, carry, one slice of each scanned array.  split: among how many devices its work is divided.
    """

    name: str
    params: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    scope: str
    body: "Program | None" = None
    split: int = 1

    @property
    def times(self) -> int:
        """How often the body runs."""
        return self.params["length"]

    @property
    def constants(self) -> int:
        """Of a scan's inputs, how many come before the carry."""
        return self.params["num_consts"]

    @property
    def carries(self) -> int:
        """How many values a scan carries from one pass to the next."""
        return self.params["num_carry"]


@dataclasses.dataclass(eq=False)
class Program:
    """Operations in order."""

    inputs: list[Value]
    outputs: list[Value]
    ops: list[Op]


def read(closed: core.ClosedJaxpr) -> Program:
    """The program of a jaxpr, without what does not contribute to its results."""
    program = _program(closed, "")
    _prune(program)
    return program


def _value(atom: Any) -> Value:
    return Value(tuple(atom.aval.shape), atom.aval.dtype)


def _program(closed: core.ClosedJaxpr, scope: str) -> Program:
    inputs = [_value(var) for var in closed.jaxpr.invars]
    program = Program(inputs, [], [])
    program.outputs = _inline(closed, inputs, scope, program.ops)
    return program


def _inline(closed: core.ClosedJaxpr, inputs: list[Value], scope: str, ops: list[Op]) -> list[Value]:
    """Appends a jaxpr's equations; returns its results."""
    jaxpr = getattr(closed, "jaxpr", closed)
    known = dict(zip(jaxpr.invars, inputs, strict=True)) | {var: _value(var) for var in jaxpr.constvars}

    def get(atom: Any) -> Value:
        return _value(atom) if isinstance(atom, core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        name, here = eqn.primitive.name, f"{scope}/{eqn.source_info.name_stack}"
        given, inner = [get(atom) for atom in eqn.invars], _called(name, eqn.params)
        if inner is not None and name != "scan":
            if name == "cond":
                given = given[1:]  # without the number of the branch
            results = _inline(inner, given, here, ops)
        else:
            results = [_value(var) for var in eqn.outvars]
            body = _program(inner, here) if name == "scan" else None
            op = Op(name, eqn.params | _scanned(eqn.params) if body else dict(eqn.params), given, results, here, body)
            for value in results:
                value.producer = op
            ops.append(op)
        known |= zip(eqn.outvars, results, strict=True)
    return [get(atom) for atom in jaxpr.outvars]


def _scanned(params: dict[str, Any]) -> dict[str, int]:
    """How many constants and carried values a scan has; from JAX 0.11 on it says so by trees."""
    if "ft_in" not in params:
        return {}
    constants, carry, _ = (len(list(tree)) for tree in params["ft_in"].unpack())
    return {"num_consts": constants, "num_carry": carry}


def _called(name: str, params: dict[str, Any]) -> Any:
    """The jaxpr that an equation stands for, of a conditional its longest branch; None for a plain operation."""
    if name == "cond":
        return max(params["branches"], key=lambda branch: len(branch.jaxpr.eqns))
    if name in ("while", "pallas_call"):  # trip count and arithmetic are not in sight
        return None
    return next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)


def _prune(program: Program) -> None:
    """Removes operations, and of loops also results and carried values, that nobody reads."""
    live, kept = {*program.outputs}, []
    for op in reversed(program.ops):
        if live.isdisjoint(op.outputs):
            continue
        if op.body is not None:
            _prune_loop(op, op.body, live)
        live.update(op.inputs)
        kept.append(op)
    program.ops = kept[::-1]


def _prune_loop(op: Op, body: Program, live: set[Value]) -> None:
    first, count = op.constants, op.carries
    read = [value in live for value in op.outputs]
    results = body.outputs
    while True:
        body.outputs = [value for value, needed in zip(results, read, strict=True) if needed]
        needed = _reached(body)
        carried = [read[i] or body.inputs[first + i] in needed for i in range(count)]
        if carried == read[:count]:
            break
        read[:count] = carried
    _prune(body)
    keep = [value in needed for value in body.inputs]
    keep[first : first + count] = read[:count]
    op.outputs = [value for value, needed in zip(op.outputs, read, strict=True) if needed]
    op.inputs = [value for value, needed in zip(op.inputs, keep, strict=True) if needed]
    body.inputs = [value for value, needed in zip(body.inputs, keep, strict=True) if needed]
    op.params |= {"num_consts": sum(keep[:first]), "num_carry": sum(read[:count])}


def _reached(program: Program) -> set[Value]:
    """What the results depend on."""
    live = {*program.outputs}
    for op in reversed(program.ops):
        if not live.isdisjoint(op.outputs):
            live.update(op.inputs)
    return live
