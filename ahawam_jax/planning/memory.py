"""Memory of a program on one device: how much is alive at once, operation by operation.

What XLA does to a program is modelled by few rules. Elementwise operations, broadcasts and the like take no memory:
they are computed where they are read, so that what they are made of stays alive until then. Matrix products, sums,
loops and whatever a matrix product or a loop reads are arrays in memory. A gathered weight is there from its first to
its last reader. What depends on no loop is computed before the first, what depends on the first before the second, and
so on. What a loop stacks up is an array of zeros from the very beginning, as XLA fills it before all loops.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from ahawam_jax.planning.layout import GATHER, SCATTER, Collective, local_bytes
from ahawam_jax.planning.program import Op, Program, Value

# The same bytes under another shape.
VIEWS = {"reshape", "squeeze", "expand_dims", "copy", "stop_gradient", "optimization_barrier", "transpose",
         "sharding_constraint", "reshard", "bitcast_convert_type"}  # fmt: skip
# What reads and writes arrays; all other operations become part of whoever reads them.
IN_MEMORY = {"dot_general", "conv_general_dilated", "scan", "while", "pallas_call", "sort", "scatter", "scatter-add",
             "custom_call"}  # fmt: skip
REDUCED = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin", "cumsum"}


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bytes alive at the fullest moment besides the arguments, and the operation at which that is."""

    bytes: int
    at: Op | None


NOTHING = Peak(0, None)


@dataclasses.dataclass(frozen=True)
class Lives:
    """When the arrays of one run of a program are in memory: the same on every mesh.

    ops: in the order in which they run.  arrays: from which place in it to which.  places: of operations.  until: of a
    value the place where it is read for the last time, also by way of what is only another reading of it.  bodies: of
    loops, by place.
    """

    ops: list[Op]
    arrays: list[tuple[Value, int, int]]
    places: dict[Op, int]
    until: dict[Value, int]
    bodies: dict[int, "Lives"]


def lives(program: Program, donated: int) -> Lives:
    """donated: how many of the first results are written where the arguments lie."""
    free = {*program.outputs[:donated]}  # values that take no memory of their own
    ops = _order(program)
    stored = _stored(program)
    roots: dict[Value, frozenset[Value]] = {}
    made: dict[Value, int] = {}  # stored values: the operation after which they are there
    last: dict[Value, int] = {}
    for at, op in enumerate(ops):
        reads = frozenset[Value]().union(*[roots[value] for value in op.inputs if value in roots])
        for value in op.outputs:
            if value in stored:
                early = op.body is not None and value not in op.outputs[: op.carries]
                roots[value], made[value] = frozenset((value,)), 0 if early else at
                last.update(dict.fromkeys(reads, at))
                last[value] = at
            elif reads:
                roots[value] = reads
    for value in program.outputs:
        last.update(dict.fromkeys(roots.get(value, ()), len(ops)))
    arrays = [(value, begin, last[value]) for value, begin in made.items() if value not in free]
    bodies = {at: lives(op.body, op.carries) for at, op in enumerate(ops) if op.body is not None}
    return Lives(ops, arrays, {op: at for at, op in enumerate(ops)}, _last_readers(ops), bodies)


def temporaries(run: Lives, collectives: Sequence[Collective], sizes: Mapping[str, int]) -> Peak:
    """The most that is alive at once, without arguments and without results that replace them."""
    change = [0] * (len(run.ops) + 2)
    for value, begin, end in run.arrays:
        size = local_bytes(value, sizes)
        change[begin] += size
        change[end + 1] -= size
    inside = {at: temporaries(body, collectives, sizes) for at, body in run.bodies.items()}
    gathered: dict[Value, tuple[int, int]] = {}  # bytes, from when on
    for one in collectives:
        if (at := run.places.get(one.op)) is None:
            continue
        if one.kind == GATHER:
            size, begin = gathered.get(one.of, (0, at))
            gathered[one.of] = (size + one.bytes, min(begin, at))
        elif one.kind == SCATTER and one.bytes > inside.get(at, NOTHING).bytes:
            inside[at] = Peak(one.bytes, one.op)
    for value, (size, begin) in gathered.items():
        change[begin] += size
        change[run.until[value] + 1] -= size
    alive = list(itertools.accumulate(change[: len(run.ops)]))
    for at, more in inside.items():  # what an operation needs while it runs
        alive[at] += more.bytes
    most = max(alive, default=0)
    if most <= 0:
        return NOTHING
    at = alive.index(most)
    return Peak(most, inside.get(at, NOTHING).at or run.ops[at])


def _order(program: Program) -> list[Op]:
    """Operations by the number of loops that must run before them; a loop comes after all that could do without it."""
    depth: dict[Value, int] = {}
    level: dict[Op, int] = {}
    for op in program.ops:
        level[op] = max((depth.get(value, 0) for value in op.inputs), default=0)
        depth.update(dict.fromkeys(op.outputs, level[op] + (op.body is not None)))
    return sorted(program.ops, key=lambda op: (level[op], op.body is not None))


def _stored(program: Program) -> set[Value]:
    """The values that are arrays in memory."""
    stored = {value for op in program.ops if op.name in IN_MEMORY or op.name in REDUCED for value in op.outputs}
    must = [value for op in program.ops if op.name in IN_MEMORY for value in op.inputs] + program.outputs
    for value in must:
        while value.producer is not None and value.producer.name in VIEWS:
            value = value.producer.inputs[0]
        if value.producer is not None:
            stored.add(value)
    return stored


def _last_readers(ops: Sequence[Op]) -> dict[Value, int]:
    """When each value is read for the last time, also by way of what is only another reading of it."""
    until: dict[Value, int] = {}
    for at in reversed(range(len(ops))):
        op = ops[at]
        end = at
        if op.name not in IN_MEMORY and op.name not in REDUCED and len(op.inputs) == 1:
            end = max([at, *[until.get(value, at) for value in op.outputs]])
        for value in op.inputs:
            until[value] = max(until.get(value, end), end)
    return until
