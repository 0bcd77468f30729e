"""Floating point operations of a program, by the part of the model they belong to.

Matrix products and convolutions are counted, two operations for each multiplication, bodies of loops as often as they
run. What XLA's `cost_analysis` says counts a loop's body once.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from ahawam_jax.planning.program import Op, Program, Value

# Which component an operation belongs to, by the modules and methods it stands in; the first that fits.
COMPONENTS = (
    ("history", r"recall"),
    ("planner", r"planner"),
    ("router", r"observation_queries|router"),
    ("executor", r"executor|AhaWam\.act"),
    ("VAE", r"Vae|vae|encode"),
)
TOWERS = ("VAE", "other")  # what is frozen, and not of the model
PASSES = ("forward", "remat", "backward")


def component(op: Op) -> str:
    """The part of the model that an operation belongs to."""
    return next((name for name, pattern in COMPONENTS if re.search(pattern, op.scope)), "other")


def which_pass(op: Op) -> str:
    """Forward, backward, or remat: the forward pass once more, before the backward pass."""
    if "rematted_computation" in op.scope:
        return "remat"
    return "backward" if "transpose(" in op.scope else "forward"


def flops(op: Op) -> float:
    """Of one operation on whole arrays."""
    if op.name == "dot_general":
        (left, _), _ = op.params["dimension_numbers"]
        return 2.0 * op.outputs[0].size * math.prod([op.inputs[0].shape[axis] for axis in left])
    if op.name == "conv_general_dilated":
        kernel: Value = op.inputs[1]
        outputs = kernel.shape[op.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * op.outputs[0].size * kernel.size / outputs
    return 0.0


def walk(program: Program, times: int = 1) -> Iterator[tuple[Op, int]]:
    """Every operation and how often it runs."""
    for op in program.ops:
        yield op, times
        if op.body is not None:
            yield from walk(op.body, times * op.times)


def products(program: Program) -> list[tuple[Op, float]]:
    """What is counted, each with its operations in all of its runs."""
    return [(op, times * found) for op, times in walk(program) if (found := flops(op))]


def on_device(counted: Iterable[tuple[Op, float]]) -> float:
    """Of the products of a program that is laid out, what one device computes."""
    return sum(found / op.split for op, found in counted)


def count(program: Program) -> Counter[tuple[str, str]]:
    """Operations by (component, pass)."""
    total: Counter[tuple[str, str]] = Counter()
    for op, found in products(program):
        total[component(op), which_pass(op)] += found
    return total


def of_model(counted: Counter[tuple[str, str]]) -> int:
    """Forward and backward pass once, without frozen towers."""
    return sum(n for (part, way), n in counted.items() if way != "remat" and part not in TOWERS)
