"""How one chunk of actions follows another while the robot moves.

A chunk is computed from an observation and is there some rows later: `delay` control steps, in which the robot runs
what it has. Every strategy answers two questions: what the executor is told of that (`ask`), and which rows are run
when the chunk has come (`join`).

    hand_over.check(policy, delay)
    chunk, state = policy.act(observation, state, continued=hand_over.ask(rest, delay))    # or stream.act(seen, ...)
    rest = hand_over.join(rest, chunk, delay, passed)

rest [B, R, m]: the rows still to be run, counted from that of the observation; at an episode's beginning, where there
is none, the command that holds the robot where it is, `delay` times. passed: rows that have been run since the
observation, which on a clock may be more or fewer than `delay`. What join returns is to be run from now on; whoever
runs out of it holds the last command.

With s rows executed of every chunk of H, whoever moves needs delay <= s <= H - delay.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from ahawam_jax.inference.continuing import Continued, Guidance, told_max_delay, told_unlike


class HandOver:
    """A strategy. Raises ValueError, in `check`, for what it cannot do."""

    name: ClassVar[str]
    moves: ClassVar[bool] = True  # the robot runs the rest of the chunk before, rather than to wait for the next one

    def max_delay(self, policy: Any) -> int:
        """Most rows of the rest that may be run while this policy's next chunk is computed."""
        return min(policy.config.execute, policy.sizes.chunk - policy.config.execute) if self.moves else 0

    def check(self, policy: Any, delay: int) -> None:
        """policy: JAX or deployed. delay: most rows that a chunk takes to come."""
        execute, chunk = policy.config.execute, policy.sizes.chunk
        if delay < 0:
            raise ValueError(f"A delay of {delay} rows was asked for; expected 0 or more.")
        if self.moves and not delay <= execute <= chunk - delay:
            raise ValueError(
                f"A chunk that comes {delay} rows late cannot be handed over in motion: with policy.execute {execute} "
                f"of {chunk} actions, delays go up to {HandOver.max_delay(self, policy)}; make chunks faster, execute "
                f"more or fewer of each, towards {chunk // 2}, or take the hand-over wait."
            )

    def ask(self, rest: np.ndarray, delay: int) -> Continued | None:
        """What the next chunk goes on from, for `act` of either policy."""
        return None

    def join(self, rest: np.ndarray, chunk: np.ndarray, delay: int, passed: int) -> np.ndarray:
        """The rows to run from now on, [B, R, m]: of the chunk, what has not passed."""
        return chunk[:, passed:]


@dataclasses.dataclass(frozen=True)
class Wait(HandOver):
    """The robot stands still until the chunk is there, and runs all of it."""

    name = "wait"
    moves = False

    def join(self, rest: np.ndarray, chunk: np.ndarray, delay: int, passed: int) -> np.ndarray:
        return chunk


@dataclasses.dataclass(frozen=True)
class Skip(HandOver):
    """Rows that have passed are dropped: the command jumps to where the new chunk is by then."""

    name = "skip"


@dataclasses.dataclass(frozen=True)
class TrainedChunking(HandOver):
    """Training-time real-time chunking (arXiv 2512.05964): the chunk goes on from the rows that are run meanwhile.

    For checkpoints trained with config.objective.max_delay. Without cost: the executor sees those rows clean.
    """

    name = "trained"

    def max_delay(self, policy: Any) -> int:
        return min(super().max_delay(policy), policy.max_delay)

    def check(self, policy: Any, delay: int) -> None:
        super().check(policy, delay)
        if delay > policy.max_delay:
            raise ValueError(told_max_delay(delay, policy.max_delay))

    def ask(self, rest: np.ndarray, delay: int) -> Continued | None:
        return Continued(rest[:, :delay], delay)


@dataclasses.dataclass(frozen=True)
class GuidedChunking(HandOver):
    """Real-time chunking (arXiv 2506.07339) for any checkpoint: sampling is pulled to the rest of the chunk before.

    Its Euler steps take the executor's vector-Jacobian product, which only JAX has.
    """

    guidance: Guidance = Guidance()
    name = "guided"

    def check(self, policy: Any, delay: int) -> None:
        super().check(policy, delay)
        if not policy.can_guide:
            raise ValueError(
                f"The hand-over {self.name} changes the Euler steps, which are fixed in what was exported or compiled "
                "ahead; run the checkpoint itself in JAX, or take another hand-over: trained, skip or wait."
            )

    def ask(self, rest: np.ndarray, delay: int) -> Continued | None:
        return Continued(rest, delay, self.guidance)


@dataclasses.dataclass(frozen=True)
class JacobianFreeChunking(GuidedChunking):
    """The same without the Jacobian: no backward pass, and every action is pulled by its own error alone."""

    guidance: Guidance = Guidance(jacobian=False)
    name = "jacobian-free"


@dataclasses.dataclass(frozen=True)
class RollForward(HandOver):
    """The executor is told the state that the rows run meanwhile lead to, after arXiv 2512.01031; the image is of now.

    Its chunk begins where they end. For robots whose actions are targets of what the state measures.
    """

    name = "roll-forward"

    def check(self, policy: Any, delay: int) -> None:
        super().check(policy, delay)
        if problem := told_unlike(policy.embodiment):
            raise ValueError(problem)

    def ask(self, rest: np.ndarray, delay: int) -> Continued | None:
        return Continued(rest[:, :delay], delay, forward=True)

    def join(self, rest: np.ndarray, chunk: np.ndarray, delay: int, passed: int) -> np.ndarray:
        return np.concatenate([rest[:, passed:delay], chunk[:, max(passed - delay, 0) :]], 1)


HAND_OVERS = {
    way.name: way
    for way in (Wait(), Skip(), TrainedChunking(), GuidedChunking(), JacobianFreeChunking(), RollForward())
}


def default_hand_over(policy: Any) -> HandOver:
    """What suits a checkpoint: to go on from committed actions where it was trained to, and else to skip."""
    return HAND_OVERS["trained" if policy.max_delay else "skip"]
