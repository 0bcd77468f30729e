"""Low-rank adapters (LoRA): of a kernel W, W + alpha / rank * A B is used; W is frozen, and A and B are trained.

They lie beside the kernel in the tree of parameters, as lora_a and lora_b, and are merged before the model sees them,
so that the model knows nothing of them and what is deployed is an ordinary model. Merging makes whole kernels, and
gradients of whole kernels, for the time of a step; what is saved is their moments.
"""

import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

A, B = "lora_a", "lora_b"


def add_adapters(params: Any, targets: str, rank: int, key: jax.Array) -> Any:
    """Boxed parameters with adapters beside each kernel whose path `targets` matches from the start.

    A is normal with the variance of one over the kernel's inputs, B is zero: the model begins as it was. Raises
    ValueError where nothing matches.
    """
    flat = flatten_dict(params)
    kernels = [path for path in flat if path[-1] == "kernel" and re.match(targets, "/".join(path))]
    if not kernels:
        raise ValueError(
            f"config.optimizer.lora_targets {targets!r} matches no kernel's path; one is planner/blocks/q/kernel."
        )
    for index, path in enumerate(kernels):
        kernel, bias = flat[path], flat[*path[:-1], "bias"]
        lead = int(kernel.names[0] == "layers")
        inputs = kernel.value.ndim - (bias.value.ndim - lead)  # where the output's axes begin, as many as the bias has
        shape, names = kernel.value.shape, kernel.names
        scale = 1 / math.sqrt(math.prod(shape[lead:inputs]))
        a = scale * jax.random.normal(jax.random.fold_in(key, index), (*shape[:inputs], rank))
        b = jnp.zeros((*shape[:lead], rank, *shape[inputs:]))
        flat[*path[:-1], A] = nn.LogicallyPartitioned(a, (*names[:inputs], None))
        flat[*path[:-1], B] = nn.LogicallyPartitioned(b, (*names[:lead], None, *names[inputs:]))
    return unflatten_dict(flat)


def merged(params: Any, scale: float) -> Any:
    """Parameters without adapters, which are added to their kernels times `scale`, alpha / rank."""
    flat = flatten_dict(params)
    plain = {path: x for path, x in flat.items() if path[-1] not in (A, B)}
    for path in (path for path in flat if path[-1] == A):
        a, b, target = flat[path], flat[*path[:-1], B], (*path[:-1], "kernel")
        lead = tuple(range(a.ndim + b.ndim - 2 - plain[target].ndim))
        change = jax.lax.dot_general(a, b, (((a.ndim - 1,), (len(lead),)), (lead, lead)))
        plain[target] = plain[target] + scale * change
    return unflatten_dict(plain)


def without_adapters(params: Any) -> tuple[Any, Any]:
    """The model's own parameters, and the adapters beside them; either may be of shapes."""
    flat = flatten_dict(params)
    own, beside = ({p: x for p, x in flat.items() if (p[-1] in (A, B)) == wanted} for wanted in (False, True))
    return unflatten_dict(own), unflatten_dict(beside)
