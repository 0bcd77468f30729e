"""PlannerMemory is a first-in first-out queue of frames, which with an anchor keeps the very first."""

import jax.numpy as jnp
import numpy as np
import pytest

from ahawam_jax.models.memory import PlannerContext, PlannerMemory

LAYERS, BATCH, SLOTS, TOKENS, HEADS, WIDTH = 2, 3, 4, 2, 2, 3


def frame(number: int | np.ndarray) -> PlannerContext:
    """A frame whose keys are its number, or each episode's own [B], and whose values are minus that."""
    numbers = jnp.broadcast_to(jnp.asarray(number, float).reshape(-1, 1, 1, 1, 1), (BATCH, 1, 1, 1, 1))
    k = jnp.broadcast_to(numbers, (LAYERS, BATCH, 1, TOKENS, HEADS, WIDTH))
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


@pytest.mark.parametrize("slots", [1, 2, 3, 6])
@pytest.mark.parametrize("anchor", [False, True])
def test_every_episode_remembers_what_a_list_would(anchor: bool, slots: int) -> None:
    """Episodes of a batch begin anew at calls of their own, told by their slots being marked empty."""
    rng = np.random.default_rng(slots)
    memory, lists = PlannerMemory.empty(frame(0), slots), [[] for _ in range(BATCH)]
    for number in range(1, 30):
        begins = rng.random(BATCH) < 0.1
        memory = memory.replace(valid=memory.valid & ~begins[:, None])
        memory = memory.push(frame(number + 100 * np.arange(BATCH)), anchor)
        for episode, seen in enumerate(lists):
            if begins[episode]:
                seen.clear()
            seen.append(number + 100 * episode)
            while len(seen) > slots:
                del seen[1 if anchor else 0]
            assert memory.valid[episode].tolist() == [False] * (slots - len(seen)) + [True] * len(seen)
            held = np.asarray(memory.context.k)[:, episode, slots - len(seen) :]
            np.testing.assert_array_equal(held, np.reshape(seen, (1, -1, 1, 1, 1)) + np.zeros_like(held))
            np.testing.assert_array_equal(memory.context.v, -memory.context.k)
