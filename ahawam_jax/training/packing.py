"""The update rule as a CPU runs it best: small parameters as a few vectors, and all of it in a loop of its own.

Of a model's hundred parameters most are norms and biases. XLA's CPU backend writes a loop for each of them and each of
its moments; that is a third of a step's program, and a program holds 4 kB of memory an instruction (JAX 0.10.2). On
GPUs XLA joins such loops by itself, and parameters that are sharded have no common vector.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

LARGE = 16_384  # numbers of a parameter that stays by itself


def pays(devices: Sequence[jax.Device]) -> bool:
    """Whether this is to be done for a step on these devices: on one, of a CPU."""
    return len(devices) == 1 and devices[0].platform == "cpu"


def pack(tree: Any) -> Any:
    """Dicts of parameters, or of what is like them, with the small ones of each component end to end.

    Kernels among them have a vector of their own, since weights decay by name.
    """
    found: dict[str, list[jax.Array]] = {}
    for path, x in _leaves(tree).items():
        place = _place(path, x)
        found.setdefault(place, []).append(x if place == path else x.reshape(-1))
    return unflatten_dict({place: x[0] if len(x) == 1 else jnp.concatenate(x) for place, x in found.items()}, sep="/")


def unpack(packed: Any, like: Any) -> Any:
    """The dicts of which `pack` made this; like: arrays of their shapes."""
    vectors, done, leaves = flatten_dict(packed, sep="/"), dict[str, int](), {}
    for path, x in _leaves(like).items():
        place = _place(path, x)
        begin = done.get(place, 0)
        done[place] = begin + x.size
        vector = vectors[place]
        leaves[path] = vector if place == path else vector[begin : begin + x.size].reshape(x.shape)
    return unflatten_dict(leaves, sep="/")


def packed_all(state: Any) -> Any:
    """`pack` of every dict of parameters in a state, such as an optimizer's."""
    return jax.tree.map(lambda x: pack(x) if isinstance(x, dict) else x, state, is_leaf=_is_dict)


def apply_if(condition: jax.Array, change: Callable[[Any], Any], state: Any) -> Any:
    """change(state) where the condition, a bool, holds, else the state; change sees and returns it packed.

    In a loop of one round or none, whose arrays are written in place.
    """
    after = jax.lax.fori_loop(0, condition.astype(jnp.int32), lambda _, x: change(x), packed_all(state))
    return jax.tree.map(
        lambda like, x: unpack(x, like) if isinstance(like, dict) else x, state, after, is_leaf=_is_dict
    )


def _is_dict(x: Any) -> bool:
    return isinstance(x, dict)


def _leaves(tree: Any) -> dict[str, Any]:
    return dict(sorted(flatten_dict(tree, sep="/").items()))


def _place(path: str, x: Any) -> str:
    """Where the parameter lies in the packed form."""
    component, _, rest = path.partition("/")
    if x.size > LARGE or not rest:
        return path
    return f"{component}/small_{'kernel' if 'kernel' in rest else 'others'}"
