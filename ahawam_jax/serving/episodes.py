"""One client's episode: a message in, an answer out."""

import time
from typing import Any

import numpy as np

from ahawam_jax.inference.continuing import Continued, checked_rows
from ahawam_jax.inference.handover import HandOver
from ahawam_jax.serving.metrics import Metrics
from ahawam_jax.serving.observations import Observation, Refusal, ServedPolicy, read_observation
from ahawam_jax.serving.wire import WireError, pack, unpack


class ClientEpisode:
    """What a connection's newest episode is at.

    A connection begins with none. The first observation starts one, and so does each with another `episode` than the
    one before, or with another instruction: the planner's memory was made under the old one.
    """

    def __init__(
        self, policy: ServedPolicy, hand_over: HandOver, instruction: str | None, metrics: Metrics
    ) -> None:
        """hand_over: of observations that bring the rest of a chunk.  instruction: of those that bring none."""
        self._policy, self._hand_over, self._default, self._metrics = policy, hand_over, instruction, metrics
        self._state: Any = None
        self._key: int | str | None = None
        self._instruction: str | None = None
        self._number = 0
        self._planned_at: int | None = None  # of the episode's newest chunk
        self._failure: str | None = None  # of the planner, the newest that was counted

    def answer(self, message: bytes, facts: dict[str, Any], timing: dict[str, float]) -> bytes:
        """The packed answer: {"actions": float32 [chunk, m], "plan_age", "refreshed", "episode_number", "step",
        **facts, "server_timing"}; to who sent the rest of a chunk "begins", the rows from the observation to the first
        action; and what a policy of two streams tells: "plan_age_ms", "held", "planner_error".

        No other array is in it, because openpi's ActionChunkBroker takes the first axis of every array for the chunk.
        timing: milliseconds so far. Raises Refusal for what the client did wrong; anything else is the policy's.
        """
        began = time.perf_counter()
        try:
            observation = read_observation(unpack(message), self._policy)
        except WireError as error:
            raise Refusal(str(error)) from None
        continued = self._continued(observation)
        decoded = time.perf_counter()
        self._begin_if_new(observation)
        actions, state = self._policy(observation.images, observation.state, self._state, continued)
        self._require_finite(actions)
        self._state = state
        ended = time.perf_counter()
        step = state.elapsed - self._policy.config.execute  # of this observation, in its episode
        age = step - state.planned_at
        refreshed = state.planned_at != self._planned_at
        told = getattr(state, "told", {})
        self._planned_at = state.planned_at
        self._count(decoded - began, ended - decoded, age, refreshed, told)
        timing = timing | {"decode_ms": 1e3 * (decoded - began), "infer_ms": 1e3 * (ended - decoded)}
        begins = {} if observation.rest is None else {"begins": continued.begins if continued is not None else 0}
        return pack({
            "actions": np.asarray(actions[0], np.float32), **begins, "plan_age": int(age), "refreshed": refreshed,
            "episode_number": self._number, "step": int(step), **told, **facts, "server_timing": timing,
        })  # fmt: skip

    def _continued(self, observation: Observation) -> Continued | None:
        """What the chunk goes on from. Raises Refusal for a delay that the hand-over or the checkpoint cannot do."""
        if observation.rest is None:
            return None
        try:
            self._hand_over.check(self._policy, observation.delay)
            continued = self._hand_over.ask(observation.rest, observation.delay)
            if continued is not None:
                checked_rows(continued, self._policy.embodiment, 1)
        except ValueError as error:
            raise Refusal(str(error)) from None
        return continued

    def _begin_if_new(self, observation: Observation) -> None:
        instruction = observation.instruction or self._default
        if instruction is None:
            raise Refusal("the observation lacks prompt, the instruction in words; this server has none of its own.")
        key = self._key if observation.episode is None else observation.episode
        if self._state is not None and (key, instruction) == (self._key, self._instruction):
            return
        try:
            self._state = self._policy.start([instruction])
        except (ValueError, OSError) as error:  # as of a text that was never encoded
            raise Refusal(str(error)) from error
        self._key, self._instruction = key, instruction
        self._planned_at = self._failure = None
        self._number += 1
        self._metrics.episodes.inc()

    def _require_finite(self, actions: np.ndarray) -> None:
        """Of the numbers that the policy drives."""
        places = [place for place in self._policy.embodiment.action.places if place >= 0]
        if not np.isfinite(actions[..., places]).all():
            raise FloatingPointError("the policy's actions are not finite; its checkpoint or device is at fault.")

    def _count(self, decode: float, infer: float, age: int, refreshed: bool, told: dict[str, Any]) -> None:
        metrics = self._metrics
        metrics.stages.labels("decode").observe(decode)
        metrics.stages.labels("chunk" if age else "refresh_and_chunk").observe(infer)
        metrics.plan_age.observe(age)
        metrics.refreshes.inc(refreshed)
        if told:
            metrics.plan_age_seconds.observe(told["plan_age_ms"] / 1e3)
            metrics.held.inc(told["held"])
            failure = told["planner_error"]
            metrics.failures.inc(failure is not None and failure != self._failure)
            self._failure = failure
