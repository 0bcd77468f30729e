"""The program of a step whose components differ in remat, from two in which they do not."""

from ahawam_jax.planning.flops import component
from ahawam_jax.planning.program import Op, Program, Value, prune, resized


def spliced(program: Program, other: Program, part: str) -> Program | None:
    """A copy of a program in which the loops of one component are those of another program of the same step.

    The two may differ in loops, of which either keeps other intermediate results for the backward pass, and in what
    `other` computes for its own loops beforehand. None where they differ in more.
    """
    found = _spliced(program, other, part)
    return None if found is None else resized(found, {})  # where every value knows its own producer


def _spliced(program: Program, other: Program, part: str) -> Program | None:
    if len(program.inputs) != len(other.inputs):
        return None
    same = dict(zip(other.inputs, program.inputs, strict=True))  # values of the other: those of the program
    arguments = {*program.inputs}
    # What a loop of the component gives to others; the rest it keeps for the backward pass.
    given_on = {*program.outputs}
    given_on.update(value for op in program.ops if not _of(op, part) for value in op.inputs)
    ops: list[Op] = []
    rest = program.ops[::-1]
    for theirs in other.ops:
        given = [same.get(value, value) for value in theirs.inputs]
        if not rest or not _corresponds(rest[-1], theirs, given, arguments):
            ops.append(Op(theirs.name, theirs.params, given, theirs.outputs, theirs.scope, theirs.body))
            continue
        mine = rest.pop()
        pairs = zip(theirs.outputs, mine.outputs, strict=False)  # of loops what is given on comes first
        same |= {value: own for value, own in pairs if own in given_on or not _of(mine, part)}
        if _of(mine, part):
            outputs = [same.get(value, value) for value in theirs.outputs]
            ops.append(Op(theirs.name, theirs.params, given, outputs, theirs.scope, theirs.body))
        elif mine.body is not None and component(mine) == "other":  # over microbatches
            body = _spliced(mine.body, theirs.body, part)
            if body is None:
                return None
            ops.append(Op(mine.name, mine.params, mine.inputs, mine.outputs, mine.scope, body))
        else:
            ops.append(mine)
    if rest:
        return None
    result = Program(program.inputs, program.outputs, ops)
    prune(result)  # what was computed for loops that were not taken
    return result


def _corresponds(mine: Op, theirs: Op, given: list[Value], arguments: set[Value]) -> bool:
    """Whether it is the same operation on the same values; of loops, whether it is the same loop."""
    if (mine.name, mine.scope) != (theirs.name, theirs.scope):
        return False
    if mine.body is not None:
        return True
    if [x.shape for x in mine.outputs] != [x.shape for x in theirs.outputs] or len(mine.inputs) != len(given):
        return False
    return all(
        value is x
        or (value.producer is None and value not in arguments and x.producer is None and x.shape == value.shape)
        for value, x in zip(mine.inputs, given, strict=True)
    )  # a number in the text is no value of either


def _of(op: Op, part: str) -> bool:
    return op.body is not None and component(op) == part
