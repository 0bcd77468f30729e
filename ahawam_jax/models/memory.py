"""PlannerMemory: what the planner remembers of earlier frames (Sec. 3.4, Eq. 13)."""

import flax
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class PlannerContext:
    """Layerwise keys and values of one or several clean frames, k and v [L, B, F, S, N, H].

    The rotary position of a frame is already in its keys, so contexts can be stored and concatenated.
    """

    k: jax.Array
    v: jax.Array

    def frame(self, index: int) -> "PlannerContext":
        """The context of one frame, still with an F axis of length 1."""
        return PlannerContext(self.k[:, :, index : index + 1], self.v[:, :, index : index + 1])


@flax.struct.dataclass
class PlannerMemory:
    """FIFO of the newest W frames, oldest first, right-aligned: slots without a frame are at the front.

    With an anchor (`ModelConfig.memory_anchor`) the episode's first frame stays, and the other slots are the FIFO.
    """

    context: PlannerContext  # k, v [L, B, W, S, N, H]
    valid: jax.Array  # [B, W] bool

    @classmethod
    def empty(cls, context: PlannerContext, frames: int) -> "PlannerMemory":
        """A memory of `frames` invalid slots, shaped for frames like those of `context`."""
        layers, batch, _, *rest = context.k.shape
        zeros = jnp.zeros((layers, batch, frames, *rest), context.k.dtype)
        return cls(PlannerContext(zeros, zeros), jnp.zeros((batch, frames), bool))

    def push(self, context: PlannerContext, anchor: bool = False) -> "PlannerMemory":
        """Appends one frame (F = 1) and drops the oldest. Pure: returns a new memory.

        anchor: the first frame of all is kept, and the oldest of the others dropped.
        """
        moved = jax.tree.map(
            lambda old, new: jnp.concatenate([old[:, :, 1:], new.astype(old.dtype)], 2), self.context, context
        )
        if anchor:
            full = self.valid[:, 0, None, None, None]  # slots are filled from the back
            moved = jax.tree.map(
                lambda old, new: new.at[:, :, 0].set(jnp.where(full, old[:, :, 0], new[:, :, 0])), self.context, moved
            )
        new = jnp.ones((self.valid.shape[0], 1), bool)
        return PlannerMemory(moved, jnp.concatenate([self.valid[:, 1:], new], 1))
