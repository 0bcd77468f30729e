"""A jaxpr as operations to walk: calls inlined, what nobody reads removed, loops with a body of their own."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core

Spec = tuple[tuple[str, ...], ...]  # of every dimension the mesh axes over which it is split


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """An array between two operations.

    size: entries of the whole array.  spec: how it is laid out, None until that is known (anything would do).
    wanted: the layout that its readers end in, where it has one.  weight: it holds parameters, or state made like
    them, and nothing else.
    """

    shape: tuple[int, ...]
    dtype: Any
    producer: "Op | None" = None
    spec: Spec | None = None
    wanted: Spec | None = None
    weight: bool = False
    size: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.size = math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an entry; keys of random numbers are two words."""
        return _itemsize(self.dtype)


@functools.cache
def _itemsize(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).itemsize


@dataclasses.dataclass(eq=False, slots=True)
class Op:
    """One equation.

    scope: the names of the modules and transformations it stands in.  body: of a scan, whose inputs are the scan's:
    constants, carry, one slice of each scanned array.  split: among how many devices its work is divided.  alike:
    operands of the first result's shape.
    """

    name: str
    params: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    scope: str
    body: "Program | None" = None
    split: int = 1
    alike: list[Value] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.alike = [value for value in self.inputs if value.shape == self.outputs[0].shape] if self.outputs else []

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

    @functools.cached_property
    def values(self) -> list[Value]:
        """All values, those of bodies too; asked when the program is as it will stay."""
        found = dict.fromkeys((*self.inputs, *self.outputs))
        for op in self.ops:
            found |= dict.fromkeys((*op.inputs, *op.outputs, *(op.body.values if op.body is not None else ())))
        return [*found]


def read(closed: core.ClosedJaxpr) -> Program:
    """The program of a jaxpr, without what does not contribute to its results."""
    program = _program(closed, "")
    prune(program)
    return program


def resized(program: Program, sizes: Mapping[int, int]) -> Program:
    """A copy where every dimension and length of a loop that is a multiple of a key is that multiple of its value.

    A loop that comes to run once is replaced by its body; it must be one that carries sums, beginning at zero.
    """
    inputs = [_resized(value, sizes) for value in program.inputs]
    copied = Program(inputs, [], [])
    copied.outputs = _copy(program, inputs, sizes, copied.ops)
    return copied


def _size(number: int, sizes: Mapping[int, int]) -> int:
    for old, new in sizes.items():
        if number % old == 0:
            number = number // old * new
    return number


def _resized(value: Value, sizes: Mapping[int, int]) -> Value:
    return Value(tuple(_size(number, sizes) for number in value.shape), value.dtype)


def _copy(program: Program, inputs: list[Value], sizes: Mapping[int, int], ops: list[Op],
          zeros: frozenset[Value] = frozenset()) -> list[Value]:  # fmt: skip
    """Appends a program's operations, of other sizes; returns its results. zeros: inputs that are 0."""
    known = dict(zip(program.inputs, inputs, strict=True))

    def get(value: Value) -> Value:
        if value not in known:  # a number in the text
            known[value] = _resized(value, sizes)
        return known[value]

    def add(name: str, params: dict[str, Any], given: list[Value], results: list[Value], scope: str) -> Op:
        op = Op(name, params, given, results, scope)
        for value in results:
            value.producer = op
        ops.append(op)
        return op

    for op in program.ops:
        given, results = [get(value) for value in op.inputs], [_resized(value, sizes) for value in op.outputs]
        if op.name == "add" and given[0] in zeros:
            results = given[1:]
        elif op.body is None:
            add(op.name, op.params, given, results, op.scope)
        elif (times := _size(op.times, sizes)) == 1 != op.times:
            held = op.constants + op.carries
            slices = [Value(value.shape[1:], value.dtype) for value in given[held:]]
            for stacked, one in zip(given[held:], slices, strict=True):
                add("reshape", {}, [stacked], [one], op.scope)
            left = _copy(op.body, given[:held] + slices, sizes, ops, frozenset(given[op.constants : held]))
            results[: op.carries] = left[: op.carries]
            for one, stacked in zip(left[op.carries :], results[op.carries :], strict=True):
                add("reshape", {}, [one], [stacked], op.scope)
        else:
            add(op.name, op.params | {"length": times}, given, results, op.scope).body = resized(op.body, sizes)
        known |= zip(op.outputs, results, strict=True)
    return [get(value) for value in program.outputs]


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


def prune(program: Program) -> None:
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
    prune(body)
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
