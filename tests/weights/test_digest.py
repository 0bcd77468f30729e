"""The hash that tells one model's weights from another's."""

import jax.numpy as jnp
import numpy as np
import pytest

from ahawam_jax.weights.convert import digest

TREE = {"a": np.arange(60, dtype=np.float32).reshape(3, 4, 5), "b": {"c": np.zeros(7, np.float32)}}


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 2, 3), (2, 3, 4)])
def test_every_entry_counts(place: tuple[int, ...]) -> None:
    changed = TREE["a"].copy()
    changed[place] = np.nextafter(changed[place], np.float32(np.inf))
    assert digest(TREE | {"a": changed}) != digest(TREE)


def test_shapes_and_dtypes_count_and_places_do_not() -> None:
    others = [TREE["a"].reshape(4, 3, 5), TREE["a"].astype(np.float64), np.asfortranarray(TREE["a"]) + 1]
    assert len({digest(TREE | {"a": x}) for x in [TREE["a"], *others]}) == 4
    assert digest({"a": jnp.asarray(np.asfortranarray(TREE["a"])), "b": TREE["b"]}) == digest(TREE)
