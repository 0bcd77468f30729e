"""PlannerMemory is a first-in first-out queue of frames."""

import jax.numpy as jnp
import numpy as np

from ahawam_jax.models.memory import PlannerContext, PlannerMemory

LAYERS, BATCH, SLOTS, TOKENS, HEADS, WIDTH = 2, 3, 4, 2, 2, 3


def frame(number: int) -> PlannerContext:
    """A frame whose keys are its number and whose values are minus its number."""
    k = jnp.full((LAYERS, BATCH, 1, TOKENS, HEADS, WIDTH), float(number))
    return PlannerContext(k, -k)


def test_only_the_newest_frames_remain() -> None:
    memory = PlannerMemory.empty(frame(0), SLOTS)
    assert memory.context.k.shape == (LAYERS, BATCH, SLOTS, TOKENS, HEADS, WIDTH)
    assert not memory.valid.any()
    for number in range(1, SLOTS + 3):
        memory = memory.push(frame(number))
        newest = range(max(1, number - SLOTS + 1), number + 1)
        np.testing.assert_array_equal(memory.valid, [[slot >= SLOTS - len(newest) for slot in range(SLOTS)]] * BATCH)
        for slot, want in enumerate(newest, start=SLOTS - len(newest)):
            np.testing.assert_array_equal(memory.context.k[:, :, slot], want)
            np.testing.assert_array_equal(memory.context.v[:, :, slot], -want)


def test_push_leaves_the_old_memory_alone() -> None:
    before = PlannerMemory.empty(frame(0), SLOTS)
    before.push(frame(1))
    assert not before.valid.any()
    np.testing.assert_array_equal(before.context.k, 0)
