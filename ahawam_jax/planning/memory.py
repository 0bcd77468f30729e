"""Memory of a program on one device: how much is alive at once, operation by operation.

What XLA does to a program is modelled by few rules. Elementwise operations, broadcasts and the like take no memory:
they are computed where they are read, so that what they are made of stays alive until then. Matrix products, sums,
loops and whatever a matrix product or a loop reads are arrays in memory. A gathered weight is there from its first to
its last reader. What depends on no loop is computed before the first, what depends on the first before the second, and
so on. What a loop stacks up is an array of zeros from the very beginning, as XLA fills it before all loops.
"""

import dataclasses
from collections import defaultdict
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


def temporaries(program: Program, collectives: Sequence[Collective], sizes: Mapping[str, int],
                donated: int) -> Peak:  # fmt: skip
    """The most that is alive at once, without arguments and without results that replace them.

    donated: how many of the first results are written where the arguments lie.
    """
    by_op: dict[Op, list[Collective]] = defaultdict(list)
    for one in collectives:
        by_op[one.op].append(one)
    return _Memory(by_op, sizes).peak(program, {*program.outputs[:donated]})


class _Memory:
    def __init__(self, by_op: Mapping[Op, list[Collective]], sizes: Mapping[str, int]):
        self.by_op, self.sizes = by_op, sizes

    def peak(self, program: Program, free: set[Value]) -> Peak:
        """Of one run of a program; `free`: values that take no memory of their own."""
        program = Program(program.inputs, program.outputs, _order(program))
        stored = _stored(program)
        roots: dict[Value, frozenset[Value]] = {value: frozenset() for value in program.inputs}
        made: dict[Value, int] = {}  # stored values: the operation after which they are there
        last: dict[Value, int] = {}
        buffers: dict[Value, tuple[int, int]] = {}  # gathered: bytes, from when on
        for at, op in enumerate(program.ops):
            reads = frozenset().union(*(roots.get(value, frozenset()) for value in op.inputs))
            for value in op.outputs:
                if value in stored:
                    early = op.body is not None and value not in op.outputs[: op.carries]
                    roots[value], made[value] = frozenset((value,)), 0 if early else at
                    last.update(dict.fromkeys(reads, at))
                    last[value] = at
                else:
                    roots[value] = reads
            for one in self.by_op.get(op, ()):
                if one.kind == GATHER:
                    before = buffers.get(one.of, (0, at))
                    buffers[one.of] = (before[0] + one.bytes, before[1])
        for value in program.outputs:
            for root in roots.get(value, ()):
                last[root] = len(program.ops)
        gathered = _readers(program, buffers)

        change = [0] * (len(program.ops) + 2)
        for value, begin in made.items():
            if value not in free:
                change[begin] += local_bytes(value, self.sizes)
                change[last[value] + 1] -= local_bytes(value, self.sizes)
        for value, (size, begin) in buffers.items():
            change[begin] += size
            change[gathered[value] + 1] -= size
        alive, best = 0, Peak(0, None)
        for at, op in enumerate(program.ops):
            alive += change[at]
            inside = self.inside(op)
            if alive + inside.bytes > best.bytes:
                best = Peak(alive + inside.bytes, inside.at or op)
        return best

    def inside(self, op: Op) -> Peak:
        """What an operation needs while it runs."""
        if op.body is not None:
            return self.peak(op.body, {*op.body.outputs[: op.carries]})  # written where the carry lies
        scattered = (one for one in self.by_op.get(op, ()) if one.kind == SCATTER)
        return Peak(max((one.bytes for one in scattered), default=0), op)


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


def _readers(program: Program, values: Mapping[Value, object]) -> dict[Value, int]:
    """When each of the values is read for the last time, also by way of what is only another reading of it."""
    made_of: dict[Value, Value] = {value: value for value in values}
    last: dict[Value, int] = {}
    for at, op in enumerate(program.ops):
        for value in op.inputs:
            if value in made_of:
                last[made_of[value]] = at
        if op.name not in IN_MEMORY and op.name not in REDUCED and len(op.inputs) == 1 and op.inputs[0] in made_of:
            made_of.update(dict.fromkeys(op.outputs, made_of[op.inputs[0]]))
    return last
