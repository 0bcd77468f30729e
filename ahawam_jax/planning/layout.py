"""How the arrays of a program lie on a mesh, and what devices must tell each other for it.

Layouts of arguments are given; those of all other values follow operation by operation, as XLA's partitioner decides
them in the main: an elementwise operation keeps its operands' layout; a weight that is split where the activations
are not is gathered, once in every pass of a loop's body; a product over a dimension that is split leaves sums to
reduce, scattered where what becomes of them is split.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence

from jax.sharding import PartitionSpec

from ahawam_jax.planning.program import Op, Program, Spec, Value

GATHER, SCATTER, REDUCE = "all-gather", "reduce-scatter", "all-reduce"

# Operations whose result is their operand, read differently.
STRUCTURAL = {"convert_element_type", "copy", "reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim",
              "stop_gradient", "neg", "rev", "reduce_precision", "slice", "sharding_constraint", "reshard",
              "optimization_barrier"}  # fmt: skip
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "argmax", "argmin"}
# Of which a dimension that they leave as it is keeps its layout, and the others lose it.
PARTIAL = {"concatenate", "pad", "slice", "dynamic_slice", "dynamic_update_slice", "gather", "split", "cumsum", "sort",
           "rev", "scatter", "scatter-add", "conv_general_dilated"}  # fmt: skip
# All others keep the layout of an operand of the result's shape.
RESHAPING = {"dot_general", "sharding_constraint", "broadcast_in_dim", "transpose", "reshape", "squeeze",
             "expand_dims", "stack", "unstack"}  # fmt: skip
ADDITIONS = {"add", "add_any"}
SPECIAL = RESHAPING | REDUCTIONS | PARTIAL


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between the devices of a group.

    axes: of the mesh, that the group spans.  bytes: of the array on one device where it is whole.  op: in which it
    takes place.  of: what is gathered, whose buffer lives as long as it is read.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    times: int
    op: Op
    of: Value


def spec_of(spec: PartitionSpec, rank: int) -> Spec:
    """JAX's notation of a layout as ours."""
    entries = (*spec, *[None] * (rank - len(spec)))
    return tuple(tuple(x) if isinstance(x, tuple) else () if x is None else (x,) for x in entries)


def parts(axes: Iterable[str], sizes: Mapping[str, int]) -> int:
    """Into how many pieces mesh axes split a dimension."""
    return math.prod(sizes[axis] for axis in axes)


def local_bytes(value: Value, sizes: Mapping[str, int]) -> int:
    """Bytes of a value on one device."""
    split = 1
    for axes in value.spec or ():
        for axis in axes:
            split *= sizes[axis]
    return -(-value.size // split) * value.itemsize


def lay_out(program: Program, inputs: Sequence[Spec], outputs: Sequence[Spec | None], sizes: Mapping[str, int],
            weights: Sequence[bool]) -> list[Collective]:  # fmt: skip
    """Fills in the layouts of all values; returns the collectives.

    inputs, outputs: layouts of arguments, and of those results for which one is prescribed.  sizes: of the mesh axes.
    weights: which arguments are parameters and what is shaped like them.
    """
    for value in program.values:  # layouts of an earlier call, on another mesh
        value.spec = value.wanted = None
    layout = _Layout({axis: size for axis, size in sizes.items() if size > 1})
    for value, spec, weight in zip(program.inputs, inputs, weights, strict=True):
        value.spec, value.weight = layout.legal(spec, value.shape), weight
    for value, spec in zip(program.outputs, outputs, strict=True):
        value.wanted = None if spec is None else layout.legal(spec, value.shape)
    _want(program)
    layout.run(program, 1)
    return layout.found


# ------------------------------------------------------------------------------------------- what readers end in
def _want(program: Program) -> None:
    """Passes the layouts of results back through what does not change them: that is where gradients will lie."""
    for op in reversed(program.ops):
        if op.body is not None:
            _want_loop(op, op.body)
        for value in op.outputs:
            if value.wanted is not None:
                for operand in op.inputs:
                    if operand.wanted is None and operand.shape:
                        operand.wanted = _backwards(op, operand, value)


def _want_loop(op: Op, body: Program) -> None:
    carries, first = op.carries, op.constants
    for i, (outer, inner) in enumerate(zip(op.outputs, body.outputs, strict=True)):
        if inner.wanted is None and outer.wanted is not None:
            inner.wanted = outer.wanted if i < carries else outer.wanted[1:]
    _want(body)
    for i in range(carries):
        op.inputs[first + i].wanted = op.inputs[first + i].wanted or body.outputs[i].wanted


def _backwards(op: Op, operand: Value, result: Value) -> Spec | None:
    wanted = result.wanted
    if op.name not in SPECIAL:
        return wanted if op.body is None and operand.shape == result.shape else None
    if op.name == "transpose":
        order = op.params["permutation"]
        return tuple(wanted[order.index(i)] for i in range(len(order)))
    if op.name in ("reshape", "squeeze", "expand_dims"):
        return _reshaped(wanted, result.shape, operand.shape)
    if op.body is None and operand.shape == result.shape and op.name not in ("dot_general", "sharding_constraint"):
        return wanted
    return None


# ------------------------------------------------------------------------------------------------------ layouts
@functools.cache
def _reshaped(spec: Spec, old: tuple[int, ...], new: tuple[int, ...]) -> Spec:
    """Layout after a reshape: what is split stays split, in the first dimension that its own becomes part of."""
    out: list[tuple[str, ...]] = [()] * len(new)
    if math.prod(old) == 0:
        return tuple(out)
    i = j = 0
    while i < len(old) and j < len(new):
        first_i, first_j, left, right = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        axes = tuple(axis for k in range(first_i, i) for axis in spec[k])
        if axes:
            out[next((k for k in range(first_j, j) if new[k] > 1), first_j)] = axes
    return tuple(out)


class _Layout:
    def __init__(self, sizes: Mapping[str, int]):
        self.sizes = sizes
        self.found: list[Collective] = []
        self.sums: dict[Value, Collective] = {}  # what is reduced everywhere, and by which collective
        self._gathered: set[tuple[Program, Value, tuple[str, ...]]] = set()
        self._legal: dict[tuple[Spec, tuple[int, ...]], Spec] = {}

    def run(self, program: Program, times: int) -> None:
        self.program, self.times = program, times
        for op in program.ops:
            if op.body is not None:
                self.loop(op, op.body, program, times)
                continue
            weight = op.name in STRUCTURAL and all([x.weight for x in op.inputs])
            if (spec := self.shared(op)) is not None:
                value = op.outputs[0]
                value.spec, value.weight = spec, weight
                continue
            spec = self.result(op)
            for value in op.outputs:
                value.spec = None if spec is None else self.legal(spec[: len(value.shape)], value.shape)
                if op.name == "conv_general_dilated":
                    op.split = parts((axis for axes in value.spec or () for axis in axes), self.sizes)
                value.weight = weight

    def legal(self, spec: Spec, shape: tuple[int, ...]) -> Spec:
        """Without axes that are not there, that do not divide, or that come twice."""
        if (known := self._legal.get((spec, shape))) is not None:
            return known
        seen: set[str] = set()
        out = []
        for axes, size in zip((*spec, *[()] * (len(shape) - len(spec))), shape, strict=True):
            axes = tuple(axis for axis in axes if axis in self.sizes and axis not in seen)
            axes = axes if size % parts(axes, self.sizes) == 0 else ()
            seen.update(axes)
            out.append(axes)
        self._legal[spec, shape] = tuple(out)
        return self._legal[spec, shape]

    # -------------------------------------------------------------------------------------------- by operation
    def shared(self, op: Op) -> Spec | None:
        """Of an elementwise operation: the layout that all its operands have; most operations are that simple."""
        if not op.alike or op.name in SPECIAL or len(op.outputs) > 1:
            return None
        spec = op.alike[0].spec
        if spec is None or any([x.spec != spec for x in op.alike]):
            return None
        if op.name in ADDITIONS:
            self.add_sums(op)
        return spec

    def result(self, op: Op) -> Spec | None:
        name, inputs, out = op.name, op.inputs, op.outputs[0]
        if name == "dot_general":
            return self.product(op)
        if name == "sharding_constraint":
            return self.constrained(op)
        known = [x for x in inputs if x.spec is not None]
        if not known:
            return out.wanted if inputs and inputs[0].shape != out.shape else None
        if name == "broadcast_in_dim":
            spec: list[tuple[str, ...]] = [()] * len(out.shape)
            for axis, place in enumerate(op.params["broadcast_dimensions"]):
                if inputs[0].shape[axis] == out.shape[place]:
                    spec[place] = inputs[0].spec[axis]
            return tuple(spec)
        if name == "transpose":
            return tuple(inputs[0].spec[i] for i in op.params["permutation"])
        if name in ("reshape", "squeeze", "expand_dims"):
            return _reshaped(inputs[0].spec, inputs[0].shape, out.shape)
        if name in REDUCTIONS:
            gone = op.params["axes"]
            summed = {axis for i in gone for axis in inputs[0].spec[i]}
            spec = tuple(axes for i, axes in enumerate(inputs[0].spec) if i not in gone)
            return self.reduced(op, spec, summed)
        if name == "stack":
            spec = list(self.merged(op, known))
            return (*spec[: op.params["axis"]], (), *spec[op.params["axis"] :])
        if name == "unstack":
            return tuple(axes for i, axes in enumerate(inputs[0].spec) if i != op.params["axis"])
        if name in PARTIAL or not any(x.shape == out.shape for x in known):
            like = known[0]
            if len(like.shape) != len(out.shape):
                return None
            same = [a == b for a, b in zip(like.shape, out.shape, strict=True)]
            return tuple(axes if kept else () for axes, kept in zip(like.spec, same, strict=True))
        return self.merged(op, [x for x in known if x.shape == out.shape])

    def merged(self, op: Op, operands: list[Value]) -> Spec:
        """Of an elementwise operation: the layout of the operand that is most, to which the others are brought."""
        if op.name in ADDITIONS:
            self.add_sums(op)
        if any(other.spec != operands[0].spec for other in operands):
            operands = sorted(operands, key=lambda x: (x.weight, -_origin(x).size))
        spec = list(operands[0].spec)
        for other in operands[1:]:
            used = {axis for axes in spec for axis in axes}
            for i, axes in enumerate(other.spec):
                fresh = tuple(axis for axis in axes if axis not in used)
                if lost := tuple(axis for axis in axes if axis in used and axis not in spec[i]):
                    self.gather(op, other, lost)
                if fresh and not spec[i]:
                    spec[i] = fresh
        for value in op.inputs:  # what had no layout takes this one
            if value.shape == operands[0].shape:
                _settle(value, tuple(spec))
        return tuple(spec)

    def constrained(self, op: Op) -> Spec:
        before = self.known(op.inputs[0])
        spec = spec_of(op.params["sharding"].spec, len(before))
        open_ = PartitionSpec.UNCONSTRAINED
        asked = self.legal(
            tuple(old if new == (open_,) else new for old, new in zip(before, spec, strict=True)), op.inputs[0].shape
        )
        if op.inputs[0].spec is None:
            _settle(op.inputs[0], asked)
        kept = {axis for axes in asked for axis in axes}
        if lost := tuple(axis for axes in op.inputs[0].spec for axis in axes if axis not in kept):
            self.gather(op, op.inputs[0], lost)
        return asked

    def product(self, op: Op) -> Spec:
        left, right = op.inputs
        (lc, rc), (lb, rb) = op.params["dimension_numbers"]
        ls, rs = ([list(axes) for axes in self.known(x)] for x in (left, right))
        pairs = list(zip((*lc, *lb), (*rc, *rb), strict=True))
        # An axis that splits one thing here and another there: it is gathered where its dimension is summed over, else
        # where the weights are.
        lost: dict[Value, list[str]] = {left: [], right: []}
        for i, axes in enumerate(ls):
            for j, others in enumerate(rs):
                for axis in [axis for axis in axes if axis in others and (i, j) not in pairs]:
                    yields = (i in lc, left.weight, -left.size) > (j in rc, right.weight, -right.size)
                    (axes if yields else others).remove(axis)
                    lost[left if yields else right].append(axis)
        for value, gone in lost.items():
            if gone:
                self.gather(op, value, tuple(gone))
        op.split = parts({axis for axes in (*ls, *rs) for axis in axes}, self.sizes)
        free = [axes for i, axes in enumerate(ls) if i not in (*lc, *lb)]
        free += [axes for i, axes in enumerate(rs) if i not in (*rc, *rb)]
        batch = [sorted({*ls[i], *rs[j]}, key=list(self.sizes).index) for i, j in zip(lb, rb, strict=True)]
        summed = {axis for i, j in zip(lc, rc, strict=True) for axis in (*ls[i], *rs[j])}
        return self.reduced(op, tuple(tuple(axes) for axes in (*batch, *free)), summed)

    def known(self, value: Value) -> Spec:
        return value.spec if value.spec is not None else ((),) * len(value.shape)

    def reduced(self, op: Op, spec: Spec, summed: set[str]) -> Spec:
        """Sums over split dimensions: scattered over the axes that split the result in the end, else everywhere."""
        out = op.outputs[0]
        spec = out.spec = self.legal(spec, out.shape)
        everywhere = []
        for axis in (axis for axis in self.sizes if axis in summed):
            taken = {a for axes in out.spec for a in axes}
            wanted = self.legal(out.wanted, out.shape) if out.wanted is not None and axis not in taken else ()
            place = next((i for i, axes in enumerate(wanted) if axis in axes), None)
            if place is None:
                everywhere.append(axis)
                continue
            self.found.append(Collective(SCATTER, (axis,), local_bytes(out, self.sizes), self.times, op, out))
            out.spec = tuple((*axes, axis) if i == place else axes for i, axes in enumerate(out.spec))
        if everywhere:
            one = Collective(REDUCE, tuple(everywhere), local_bytes(out, self.sizes), self.times, op, out)
            self.found.append(one)
            self.sums[out] = one
        return out.spec

    def add_sums(self, op: Op) -> None:
        """Two sums that are only added are reduced once."""
        if not self.sums:
            return
        first, second = [self.sums.get(_origin(x)) for x in op.inputs]
        if first and second and first is not second and (first.axes, first.times) == (second.axes, second.times):
            self.found.remove(second)
            self.sums[op.outputs[0]] = first

    def gather(self, op: Op, value: Value, axes: tuple[str, ...]) -> None:
        """Brings a value to devices that lack parts of it; once for all who read it in this pass of a body."""
        base = _origin(value)
        key = (self.program, base, axes)
        if key in self._gathered:
            return
        self._gathered.add(key)
        cheapest = min(_chain(value), key=lambda x: (x.size * x.itemsize, x is not base))
        kept = [axis for split in cheapest.spec or () for axis in split if axis not in axes]
        size = cheapest.size // parts(kept, self.sizes) * cheapest.itemsize
        self.found.append(Collective(GATHER, axes, size, self.times, op, base))

    def loop(self, op: Op, body: Program, outer: Program, times: int) -> None:
        first, count = op.constants, op.carries
        for i, (given, inner) in enumerate(zip(op.inputs, body.inputs, strict=True)):
            scanned = i >= first + count
            inner.spec = given.spec[1:] if scanned and given.spec is not None else given.spec
            if inner.spec is None and given.wanted is not None:
                inner.spec = self.legal(given.wanted[1:] if scanned else given.wanted, inner.shape)
            inner.weight = given.weight
        before = len(self.found)
        self.run(body, times * op.times)
        for i in range(count):  # a carry lies as its body leaves it
            carried, left = body.inputs[first + i], body.outputs[i]
            if carried.spec != left.spec:
                carried.spec = left.spec
                del self.found[before:]
                self._gathered = {key for key in self._gathered if key[0] is not body}
                self.run(body, times * op.times)
        self.program, self.times = outer, times
        for given, inner in zip(op.inputs[: first + count], body.inputs, strict=False):
            if inner.spec is not None:  # its readers have decided
                _settle(given, inner.spec)
        for i, (value, inner) in enumerate(zip(op.outputs, body.outputs, strict=True)):
            value.spec = inner.spec if i < count or inner.spec is None else ((), *inner.spec)


def _chain(value: Value) -> list[Value]:
    """A value and what it is a reading of, back to where it was made."""
    chain = [value]
    while (op := value.producer) is not None and op.name in STRUCTURAL:
        value = op.inputs[0]
        chain.append(value)
    return chain


def _origin(value: Value) -> Value:
    return _chain(value)[-1]


def _settle(value: Value, spec: Spec) -> None:
    """Gives a layout to a value without one, and to what it is made of."""
    while value.spec is None and len(value.shape) == len(spec):
        value.spec = spec
        inputs = value.producer.inputs if value.producer else []
        same = [x for x in inputs if x.spec is None and x.shape == value.shape]
        for other in same[1:]:
            _settle(other, spec)
        if not same:
            return
        value = same[0]
