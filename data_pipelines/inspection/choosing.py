"""Which of many datasets to use: those that an expression holds for, or as many as make up some hours."""

import ast
import dataclasses
import operator
import random
from collections.abc import Callable
from typing import Any

from data_pipelines.inspection.findings import Finding
from data_pipelines.inspection.proposal import Candidate, Proposal

# What an expression may name.
FIELDS: dict[str, Callable[[Finding], Any]] = {
    "path": lambda finding: finding.path,
    "robot": lambda finding: finding.robot,
    "arms": lambda finding: finding.arms,
    "joints": lambda finding: finding.joints,
    "gripper": lambda finding: finding.gripper,
    "hands": lambda finding: finding.hands,
    "views": lambda finding: finding.views,
    "rate": lambda finding: finding.rate,
    "episodes": lambda finding: len(finding.lengths),
    "hours": lambda finding: finding.hours,
    "layout": lambda finding: finding.layout,
    "instructions": lambda finding: finding.instructions,
}
_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda one, other: one in other, ast.NotIn: lambda one, other: one not in other,
}  # fmt: skip


class SelectError(ValueError):
    """An expression that selects no datasets; the message says what one looks like."""


def selection(text: str) -> Callable[[Finding], bool]:
    """Of an expression such as 'arms == 2 and gripper and robot != "unknown"': whether it holds for a dataset.

    Names of FIELDS, numbers, texts and tuples of them, comparisons, `in`, and, or, not. Raises SelectError.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise SelectError(f"--select is {text!r}, which is no expression ({error}); {_way()}.") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in FIELDS:
            raise SelectError(f"--select is {text!r}: a dataset has no {node.id}; {_way()}.")
    _value(tree, text, {name: "" for name in FIELDS}, dry=True)

    def holds(finding: Finding) -> bool:
        return bool(_value(tree, text, {name: of(finding) for name, of in FIELDS.items()}))

    return holds


def _way() -> str:
    return f'it may compare {", ".join(FIELDS)}, as in "arms == 2 and gripper and joints == 6"'


def _value(node: ast.expr, text: str, fields: dict[str, Any], dry: bool = False) -> Any:
    """dry: only whether all parts are known; nothing is compared."""

    def of(part: ast.expr) -> Any:
        return _value(part, text, fields, dry)

    match node:
        case ast.Name(id=name):
            return fields[name]
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return tuple(of(part) for part in parts)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            return not of(part)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.BoolOp(op=op, values=parts):
            found = [of(part) for part in parts]
            return all(found) if isinstance(op, ast.And) else any(found)
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in _COMPARE for op in ops):
            values = [of(left), *map(of, rest)]
            pairs = zip(ops, values, values[1:], strict=False)
            try:
                return dry or all(_COMPARE[type(op)](one, other) for op, one, other in pairs)
            except TypeError as error:
                raise SelectError(f"--select is {text!r}: {error}; {_way()}.") from error
    raise SelectError(f"--select is {text!r}: {ast.unparse(node)!r} is not understood; {_way()}.")


def draw(proposal: Proposal, hours: float, seed: int) -> Proposal:
    """Leaves of the included datasets some, at random, that make up `hours` together as nearly as whole ones can.

    Every robot keeps its share. Those that are not drawn are no longer in the proposal; with fewer hours than asked
    for it stays as it is.
    """
    total = sum(candidate.finding.hours for candidate in proposal.included)
    rng = random.Random(seed)
    drawn: list[Candidate] = []
    rest: list[Candidate] = []
    owed = 0.0  # what the robots before are short of
    for robot in sorted({candidate.robot for candidate in proposal.included}):
        of_robot = [candidate for candidate in proposal.included if candidate.robot == robot]
        rng.shuffle(of_robot)
        owed += hours / total * sum(candidate.finding.hours for candidate in of_robot)
        for candidate in of_robot:
            fits = candidate.finding.hours <= owed
            (drawn if fits else rest).append(candidate)
            owed -= candidate.finding.hours * fits
    while rest:
        nearest = min(rest, key=lambda candidate: abs(owed - candidate.finding.hours))
        if abs(owed - nearest.finding.hours) >= abs(owed):
            break
        rest.remove(nearest)
        drawn.append(nearest)
        owed -= nearest.finding.hours
    kept = {candidate.name for candidate in drawn}
    candidates = [c for c in proposal.candidates if c.exclude or c.name in kept]
    return dataclasses.replace(proposal, candidates=tuple(candidates))
