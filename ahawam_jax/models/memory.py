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
    """FIFO of the newest W frames, oldest first, right-aligned: slots without a frame are at the front."""

    context: PlannerContext  # k, v [L, B, W, S, N, H]
    valid: jax.Array  # [B, W] bool

    @classmethod
    def empty(cls, context: PlannerContext, frames: int) -> "PlannerMemory":
        """A memory of `frames` invalid slots, shaped for frames like those of `context`."""
        layers, batch, _, *rest = context.k.shape
        zeros = jnp.zeros((layers, batch, frames, *rest), context.k.dtype)
        return cls(PlannerContext(zeros, zeros), jnp.zeros((batch, frames), bool))

    def push(self, context: PlannerContext) -> "PlannerMemory":
        """Appends one frame (F = 1) and drops the oldest. Pure: returns a new memory."""
        k, v = (
            jnp.concatenate([old[:, :, 1:], new.astype(old.dtype)], 2)
            for old, new in ((self.context.k, context.k), (self.context.v, context.v))
        )
        new = jnp.ones((self.valid.shape[0], 1), bool)
        return PlannerMemory(PlannerContext(k, v), jnp.concatenate([self.valid[:, 1:], new], 1))
