"""Policy: observation in, one chunk of actions out; the planner runs every few chunks, the router at every one."""

import dataclasses
import json
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ahawam_jax.checkpoints import CheckpointError, Checkpoints, find_step
from ahawam_jax.flow_matching import euler_times, noise_levels
from ahawam_jax.inference import compiled
from ahawam_jax.inference.background import finish
from ahawam_jax.inference.continuing import Continued, condition, expected_state
from ahawam_jax.inference.programs import Programs, abstract_arguments, jitted, make_programs, planner_apart, tokens_of
from ahawam_jax.inference.slices import SlicedRefresh
from ahawam_jax.models.aha_wam import AhaWam, empty_memory, resident_params
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.models.deployment import Words, deploy
from ahawam_jax.models.memory import PlannerContext, PlannerMemory
from ahawam_jax.towers.building import build_text_tower, build_video_tower
from ahawam_jax.towers.latents import make_canvas
from data_pipelines.canvas import Canvas
from data_pipelines.embodiment import Embodiment, pick_embodiment
from data_pipelines.normalization import denormalize, normalize
from data_pipelines.paths import local_path
from data_pipelines.statistics import pick_robot


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """How a checkpoint is run. Defaults are the release's for RoboTwin."""

    refresh_every: int = 2  # R, executor calls per planner refresh
    steps: int = 10  # Euler steps of the executor
    execute: int = 16  # actions of a chunk that the robot runs before the next call
    memory: bool = True  # False forgets earlier frames before every refresh (ablation)
    routing: bool = True  # False hands the planner context to the executor as it is (ablation)

    def check(self, model: ModelConfig) -> None:
        """Raises ValueError if these settings ask for chunks the model was not trained on."""
        if not 1 <= self.execute <= model.chunk:
            raise ValueError(f"policy.execute is {self.execute}; expected 1 to {model.chunk}, the actions of a chunk.")
        reach = (self.refresh_every - 1) * self.execute
        if self.refresh_every < 1 or reach >= model.horizon:
            raise ValueError(
                f"policy.refresh_every {self.refresh_every} with {self.execute} executed actions reaches {reach} "
                f"actions beyond the planner's frame, but training covered {model.horizon}; refresh more often."
            )
        if self.steps < 1:
            raise ValueError(f"policy.steps is {self.steps}; expected at least one Euler step.")


@flax.struct.dataclass
class PolicyState:
    """What lives across calls for a batch of B episodes.

    A refresh writes the memory in place. Who means to go on twice from one state copies it before, with
    jax.tree.map(jnp.copy, state).
    """

    context: PlannerContext  # of the newest planner frame, [L, B, 1, S, N, H]
    memory: PlannerMemory
    words: Words  # for the executor
    planner_words: Words
    elapsed: int = flax.struct.field(pytree_node=False, default=0)  # actions run since the episode began
    planned_at: int = flax.struct.field(pytree_node=False, default=0)  # `elapsed` at the newest refresh
    calls: int = flax.struct.field(pytree_node=False, default=0)


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the policy sees of B robots at one moment."""

    latents: jax.Array  # [B, c, 1, h, w]
    robot_state: np.ndarray  # [B, n] float32, in the robot's own order and units


def checked_observation(
    canvas: Canvas, embodiment: Embodiment, images: Mapping[str, np.ndarray], robot_state: np.ndarray, episodes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The canvas uint8 [B, H, W, 3] of the images, and the robot's own state as float32 [B, n].

    Raises ValueError for other shapes, other numbers of either than `episodes`, and for NaN or infinity in the state.
    """
    # A copy: an observation may be used when the caller has written the next one into the same array.
    robot_state, names = np.array(robot_state, np.float32), embodiment.state.names
    if robot_state.shape != (episodes, len(names)) or not np.isfinite(robot_state).all():
        named = f" ({', '.join(embodiment.state.labels)})" if any(names) else ""
        raise ValueError(
            f"robot_state has shape {robot_state.shape}; expected {(episodes, len(names))} finite numbers{named}, one "
            "row per episode that start was given; a single episode has the first axis, too: robot_state[None]."
        )
    picture = canvas.compose(embodiment.views(images))
    if picture.shape[:-3] != (episodes,):
        raise ValueError(
            f"the images of {canvas.cameras[0]} have shape {np.shape(images[canvas.cameras[0]])}; expected "
            f"({episodes}, height, width, 3), one image per episode that start was given; a single episode has the "
            "first axis, too: image[None]."
        )
    return picture, robot_state


def checked_instructions(instructions: Sequence[str]) -> list[str]:
    """One instruction per episode. Raises ValueError for none, and for a text that is not in a list."""
    if isinstance(instructions, str) or not len(instructions):
        raise ValueError(f"start takes a list of instructions, one per episode; got {instructions!r}.")
    return list(instructions)


def chunk_start(since_plan: int, chunk: int) -> int:
    """Position of a chunk's first action, `since_plan` actions after the planner's frame.

    Chunks count from that frame; a call in the midst of one belongs to it, as offsets do in training.
    """
    return since_plan // chunk * chunk


def load_run(path: str | Path) -> tuple[AhaWam, Any, dict[str, Any]]:
    """Model, parameters in the training form on the first device, and the record of a workdir or checkpoint step."""
    workdir, step = find_step(path)
    checkpoints = Checkpoints(workdir)
    run = checkpoints.restore_run(step)
    if "config" not in run:
        raise CheckpointError(f"{path} at step {step} lacks its config; train and import_weights write one.")
    model = AhaWam(ModelConfig.create(run["config"]["model"]))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), resident_params(model.config)
    )
    params = checkpoints.restore_params(step, like)
    checkpoints.close()
    return model, params, run


class Policy:
    """A checkpoint and how to run it on one robot. Holds no episode: the state goes in and comes back.

        policy = Policy.load("runs/demo")
        state = policy.start(["pick up the red cube ..."])
        actions, state = policy(images, robot_state, state)

    embodiment: the robot's own vectors; `policy.embodiment.held` names the numbers of an action that are not driven.
    """

    def __init__(
        self, model: AhaWam, params: Any, config: ConfigDict, statistics: Mapping[str, Any],
        policy: PolicyConfig, embodiment: Embodiment | None = None, donate: bool = False,
        planner_device: jax.Device | None = None, refresh_slices: int = 1,
    ):  # fmt: skip
        """params: of the training form. embodiment: None for a robot whose vectors are those of the model.

        donate: the arrays of params are deleted one by one as they are laid out for inference. planner_device: for
        the planner, beside the first one, which has the rest. refresh_slices: of about as many layers each, between
        which a chunk may run.
        """
        policy.check(model.config)
        self.model, self.config, self.statistics = model, policy, statistics
        self.embodiment = embodiment or Embodiment.as_recorded(model.config.state_dim, model.config.action_dim)
        self.canvas = make_canvas(config)
        self._text_tower = build_text_tower(config.towers, model.config)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self._video_tower = build_video_tower(config.towers, model.config, device)
        self._tokens = tokens_of(self.canvas.size)
        self._key = jax.random.key(config.seed)
        self._shift = config.objective.shift
        times = euler_times(noise_levels(policy.steps, self._shift))
        self.can_guide = True  # `Continued.guidance` can be followed
        self.max_delay = config.objective.get("max_delay", 0)  # most committed actions of training
        self._executor_device, self._planner_device = jax.devices()[0], planner_device or jax.devices()[0]
        self.one_queue = self._planner_device == self._executor_device
        self.deployed = self._deployed_planner = deploy(model.config, params, times, donate, self.max_delay > 0)
        if not self.one_queue:
            self._deployed_planner, self.deployed = planner_apart(self.deployed, self._planner_device)
        self._functions = make_programs(model.config, self._shift, policy.routing, self.embodiment.action.present)
        self._programs = jitted(self._functions)
        self._sliced = None
        if refresh_slices != 1:
            self._sliced = SlicedRefresh(model.config, self._deployed_planner, refresh_slices)

    @classmethod
    def load(
        cls, path: str | Path, robot: str | None = None, dataset: str | None = None,
        compiled_in: str | Path | None = None, planner_device: int | None = None, refresh_slices: int = 1,
        **overrides: Any,
    ) -> "Policy":  # fmt: skip
        """From a workdir of ahawam train or one of its checkpoint steps.

        robot: whose statistics and vectors to use, where the run was trained on several.
        dataset: of that robot, where its datasets differ in the robot's own vectors: whose the robot takes.
        compiled_in: folder of `save_compiled`, whose functions are used instead of traced ones.
        planner_device, refresh_slices: as of Policy; the device by its number in jax.devices().
        overrides: fields of PolicyConfig; the rest comes from the run's config.policy.
        """
        if compiled_in is not None and (planner_device is not None or refresh_slices != 1):
            raise ValueError("compiled functions are of one device and one slice; leave compiled_in out.")
        if planner_device is not None and not 0 <= planner_device < len(jax.devices()):
            raise ValueError(f"planner_device is {planner_device}, but JAX has {len(jax.devices())} device(s).")
        model, params, run = load_run(path)
        if "statistics" not in run:
            raise CheckpointError(
                f"{path} has no statistics of states and actions, which a policy needs; import the checkpoint again "
                "with --statistics=dataset_stats.json."
            )
        config = ConfigDict(run["config"])
        statistics = pick_robot(run["statistics"], robot)
        embodiment = pick_embodiment(run.get("robots", {}), robot, dataset)
        settings = PolicyConfig(**{**config.policy.to_dict(), **overrides})
        device = None if planner_device is None else jax.devices()[planner_device]
        policy = cls(model, params, config, statistics, settings, embodiment, True, device, refresh_slices)
        if compiled_in is not None:
            policy._load_compiled(local_path(compiled_in))
        return policy

    def save_compiled(self, folder: str | Path, episodes: int = 1) -> None:
        """Traces the policy's functions ahead of time for so many episodes at once; see `load`."""
        compiled.write(local_path(folder), self._functions._asdict(), self._arguments(episodes)._asdict(), self._about)

    def _load_compiled(self, folder: Path) -> None:
        refresh, act = self._arguments(1)[2:]
        words, memory = refresh[3:]
        results = Programs(words, 0, (act[1], memory), 0)
        self.can_guide = False
        functions = compiled.read(folder, results._asdict(), {"refresh": memory}, self._about)
        self._programs = Programs(**functions)

    def _arguments(self, episodes: int) -> Programs:
        tower = self._text_tower
        text = jax.ShapeDtypeStruct((episodes, tower.length, tower.dim), tower.dtype)
        return abstract_arguments(self.model.config, self.deployed, self._video_tower, self.canvas.size, text)

    @property
    def sizes(self) -> ModelConfig:
        """Of the model."""
        return self.model.config

    @property
    def _about(self) -> dict[str, Any]:
        """What a compiled function holds besides its arguments."""
        fields = {"model": self.model.config, "policy": self.config, "canvas": self.canvas}
        about = {name: json.dumps(dataclasses.asdict(x)) for name, x in fields.items()}
        return about | {
            "shift": self._shift, "present": self.embodiment.action.present.tolist(),
            "tower": type(self._video_tower).__name__, "platform": jax.devices()[0].platform,
            "committed actions": self.max_delay > 0,
        }  # fmt: skip

    def start(self, instructions: Sequence[str]) -> PolicyState:
        """State of a batch of new episodes, one instruction each: an empty memory."""
        instructions = checked_instructions(instructions)
        text, mask = (np.stack(x) for x in zip(*map(self._text_tower.tokens, instructions), strict=True))
        memory = empty_memory(self.model.config, len(instructions), self._tokens)
        context = jnp.zeros((len(memory.k), len(text), 1, *memory.k[0].shape[2:]), memory.k[0].dtype)
        words = planner_words = self._programs.read(self.deployed, text, mask)
        if not self.one_queue:
            planner_words = self._programs.read(self._deployed_planner, text, mask)
        return PolicyState(PlannerContext(context, context), self._to_planner(memory), words, planner_words)

    def __call__(
        self, images: Mapping[str, np.ndarray], robot_state: np.ndarray, state: PolicyState,
        continued: Continued | None = None,
    ) -> tuple[np.ndarray, PolicyState]:  # fmt: skip
        """One executor call, with a planner refresh before it when one is due: `encode`, `refresh` and `act`.

        images: uint8 [B, h, w, 3] per camera that the robot has, of now. robot_state: [B, n] in the order and units
        of its recordings. Returns actions float32 [B, chunk, m], in the order and units of the recorded ones, of which
        config.execute are meant to be run before the next call, and the state for that call. Numbers in
        embodiment.held repeat robot_state, see `Embodiment.act`. continued: as of `act`.
        """
        observation = self.encode(images, robot_state, len(state.words.mask))
        if state.calls % self.config.refresh_every == 0:
            state = self.refresh(observation, state)
        return self.act(observation, state, continued)

    def encode(self, images: Mapping[str, np.ndarray], robot_state: np.ndarray, episodes: int) -> Observation:
        """What `refresh` and `act` take. Raises ValueError for anything else than one image and state an episode."""
        picture, robot_state = checked_observation(self.canvas, self.embodiment, images, robot_state, episodes)
        return Observation(self._programs.encode(self._video_tower, picture), robot_state)

    def refresh(self, observation: Observation, state: PolicyState) -> PolicyState:
        """The state with a plan of this observation. Takes the memory of the state given, whose use is over then."""
        return finish(self._slices(observation, state))

    def refreshing(self, observation: Observation, state: PolicyState) -> Generator[None, None, PolicyState]:
        """`refresh` slice by slice: goes on when a slice is done, and returns the state when the plan is there."""
        slices = self._slices(observation, state)
        try:
            while True:
                jax.block_until_ready(next(slices))
                yield
        except StopIteration as end:
            return jax.block_until_ready(end.value)

    def _slices(self, observation: Observation, state: PolicyState) -> Generator[Any, None, PolicyState]:
        memory = state.memory
        if memory.k[0].is_deleted():
            raise ValueError(
                f"The memory of this state, of call {state.calls}, was written over by a refresh that began from it; "
                "go on from the state that was returned, or keep jax.tree.map(jnp.copy, state) to go on twice."
            )
        if not self.config.memory:
            memory = memory.replace(valid=jnp.zeros_like(memory.valid))
        position = np.full(len(observation.robot_state), state.elapsed // self.model.config.video_ratio, np.int32)
        given = self._to_planner(observation.latents), position, state.planner_words, memory
        if self._sliced is None:
            context, memory = self._programs.refresh(self._deployed_planner, *given)
        else:
            context, memory = yield from self._sliced(*given)
        if not self.one_queue:
            context = jax.device_put(context, self._executor_device)
        return state.replace(context=context, memory=memory, planned_at=state.elapsed)

    def forget(self, state: PolicyState) -> PolicyState:
        """The state without memory, as at the beginning of an episode."""
        memory = empty_memory(self.model.config, len(state.words.mask), self._tokens)
        return state.replace(memory=self._to_planner(memory))

    def _to_planner(self, x: Any) -> Any:
        return x if self.one_queue else jax.device_put(x, self._planner_device)

    def act(
        self, observation: Observation, state: PolicyState, continued: Continued | None = None
    ) -> tuple[np.ndarray, PolicyState]:
        """A chunk of actions by the state's plan, and the state after it; both as `__call__` returns them.

        continued: the chunk before, of which rows are run while this one is computed; row 0 of both is that of the
        observation. Raises ValueError for what this checkpoint cannot go on from.
        """
        robot_state, ahead = expected_state(continued, self.embodiment, observation.robot_state)
        given = condition(
            continued, self.embodiment, self.statistics["action"], len(robot_state), self.sizes.chunk, self.max_delay
        )
        in_layout = self.embodiment.state.to_layout(robot_state)
        start = chunk_start(state.elapsed + ahead - state.planned_at, self.sizes.chunk)
        actions = self._programs.act(
            self.deployed, state.context, observation.latents, normalize(in_layout, self.statistics["state"]),
            state.words, np.int32(start), jax.random.fold_in(self._key, state.calls), given,
        )  # fmt: skip
        actions = denormalize(np.asarray(actions), self.statistics["action"])
        after = state.replace(calls=state.calls + 1, elapsed=state.elapsed + self.config.execute)
        return self.embodiment.act(actions, observation.robot_state), after
