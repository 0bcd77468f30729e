"""Deployment core: the four graphs of a policy on one device, engine, CUDA graph or eager PyTorch, whichever works.

    policy = DeployedPolicy.load("exports/robotwin", target="rtx5090d")
    state = policy.start(["pick up the red cube ..."])
    actions, state = policy(images, robot_state, state)

The interface of `ahawam_jax.inference.policy.Policy`, so that everything that serves one serves the other, but for
three things: one batch of episodes lives at a time, since their memory and plan stay in buffers on the device; noise
comes from numpy; and no JAX backend is started, so the GPU is the policy's alone.

Only what changes crosses the bus: a call copies canvas, state and noise to the device and the actions back; keys and
values of the instruction are made once an episode; the plan and the memory never leave. A chunk (encode, route, all
steps) is one CUDA graph, a refresh (encode, plan) is another; each has a stream of its own, the chunk's with priority,
so that `ahawam_jax.inference.streaming.Stream` can run both at a time.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ahawam_jax.inference.background import finish
from ahawam_jax.inference.continuing import Continued, condition, expected_state
from ahawam_jax.inference.policy import PolicyConfig, checked_instructions, checked_observation, chunk_start
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.towers.latents import make_canvas
from data_pipelines.normalization import denormalize, normalize
from export.engines.engine import Engine, Engines, current_gpu, open_engines
from export.engines.onnx_graphs import GRAPHS, make_graphs
from export.exported import Export, load_export
from export.manifest import ExportError, read_manifest
from export.twin.capture import capture
from export.twin.model import remember


@dataclasses.dataclass(frozen=True)
class DeployedObservation:
    """What the policy sees of B robots at one moment; the graphs encode it themselves."""

    canvas: Tensor  # uint8 [B, H, W, 3], on the host
    robot_state: np.ndarray  # [B, n] float32, in the robot's own order and units


@dataclasses.dataclass(frozen=True, eq=False)
class DeployedState:
    """Where a batch of episodes is; words and memory lie in the policy's buffers."""

    episode: int  # number of the `start` it comes from
    context: tuple[Tensor, Tensor] | None = None  # k, v [L, B, S, N, H] of the plan in use
    calls: int = 0
    elapsed: int = 0  # actions run since the episode began
    refreshes: int = 0  # that are in the memory
    planned_at: int = 0  # `elapsed` at the refresh whose plan is in use


class DeployedPolicy:
    """An export and how to run it.

    backends: by graph, "engine", "CUDA graph" or "eager".
    """

    one_queue = False  # chunks and refreshes have streams of their own
    can_guide = False  # the Euler steps are fixed in the executor's graph

    def __init__(
        self, export: Export, policy: PolicyConfig, device: torch.device, engines: Engines | None = None,
        say: Callable[[str], None] = print,
    ):  # fmt: skip
        """engines: used in place of PyTorch where they load. say: as in `load`."""
        policy.check(export.model)
        self.model, self.config, self.statistics = export.model, policy, export.statistics
        self.embodiment, self.max_delay = export.embodiment, export.max_delay
        self.canvas, self.backends = make_canvas(export.config), dict.fromkeys(GRAPHS, "eager")
        self._text_tower, self._seed, self._device = export.text_tower, export.config.seed, device
        self._say = say
        self._graphs = make_graphs(export)
        self._engines = self._load_engines(engines)
        self._planner, self._executor = export.planner, export.executor
        for name in GRAPHS:
            module = getattr(export, name)
            if name in self._engines:  # it has these weights; keys and values of the text stay in PyTorch
                for part in [part for part, _ in module.named_children() if part != "text"]:
                    delattr(module, part)
            module.to(device)
        on_gpu = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device, priority=x) if on_gpu else None for x in (-1, 0)]  # chunk, refresh
        self._buffers: dict[str, Tensor] = {}
        self._planning = threading.Lock()  # of all that a refresh reads and writes
        self._episode = self._refreshes = 0
        self._routed: tuple[Tensor, Tensor] | None = None  # the context that lies before the router

    @classmethod
    def load(
        cls, folder: str | Path, target: str | None = None, device: str | None = None, dtype: str | None = None,
        say: Callable[[str], None] = print, **overrides: Any,
    ) -> "DeployedPolicy":  # fmt: skip
        """From a folder of `ahawam to-torch`.

        target: use its engines for this GPU, as built by `ahawam to-tensorrt`; what cannot be used is said and
        replaced by PyTorch. device: "cuda" or "cpu", by default the GPU where there is one. dtype: of the products in
        PyTorch, by default the export's. overrides: fields of PolicyConfig.
        """
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        engines = None
        if target is not None:
            try:
                engines = find_engines(Path(folder), target)
            except ExportError as error:
                say(f"without engines: {error}")
        steps = overrides.get("steps")
        if engines is not None and steps not in (None, engines.manifest["steps"]):
            say(f"without engines: they take {engines.manifest['steps']} steps, {steps} were asked for.")
            engines = None
        export = load_export(folder, dtype, "cpu" if engines else where, steps)
        policy = PolicyConfig(**{**export.config.policy.to_dict(), **overrides})
        return cls(export, policy, where, engines, say)

    # ------------------------------------------------------------------------------------------------- the interface
    @property
    def sizes(self) -> ModelConfig:
        """Of the model."""
        return self.model

    def start(self, instructions: Sequence[str]) -> DeployedState:
        """State of a batch of new episodes, one instruction each: an empty memory. Ends the batch before it.

        Waits for a refresh that still runs.
        """
        instructions = checked_instructions(instructions)
        words, mask = zip(*(self._text_tower.tokens(text) for text in instructions), strict=True)
        with self._planning, torch.no_grad():
            if not self._buffers or len(instructions) != self._batch:
                self._allocate(len(instructions))
            text = torch.from_numpy(np.stack(words).astype(np.float32)).to(self._device)
            for name, module in (("planner", self._planner), ("executor", self._executor)):
                k, v = module.text(text)
                self._fill(f"{name}.text_k", k), self._fill(f"{name}.text_v", v)
                self._fill(f"{name}.text_mask", torch.from_numpy(np.stack(mask)))
            self._buffers["planner.valid"].zero_()
            self._episode, self._refreshes = self._episode + 1, 0
        return DeployedState(self._episode)

    def __call__(
        self, images: Mapping[str, np.ndarray], robot_state: np.ndarray, state: DeployedState,
        continued: Continued | None = None,
    ) -> tuple[np.ndarray, DeployedState]:  # fmt: skip
        """One executor call, with a planner refresh before it when one is due: `encode`, `refresh` and `act`.

        images: uint8 [B, h, w, 3] per camera that the robot has, of now. robot_state: [B, n] in the order and units of
        its recordings. Returns actions float32 [B, chunk, m], in the order and units of the recorded ones, of which
        config.execute are meant to be run before the next call, and the state for that call. Numbers in
        embodiment.held repeat robot_state, see `Embodiment.act`. continued: as of `act`.
        """
        self._require(state)
        observation = self.encode(images, robot_state, self._batch)
        if state.calls % self.config.refresh_every == 0:
            state = self.refresh(observation, state)
        return self.act(observation, state, continued)

    def encode(
        self, images: Mapping[str, np.ndarray], robot_state: np.ndarray, episodes: int
    ) -> DeployedObservation:
        """What `refresh` and `act` take. Raises ValueError for anything else than one image and state an episode."""
        picture, robot_state = checked_observation(self.canvas, self.embodiment, images, robot_state, episodes)
        return DeployedObservation(torch.from_numpy(picture), robot_state)

    def refresh(self, observation: DeployedObservation, state: DeployedState) -> DeployedState:
        """The state with a plan of this observation, which joins the memory. Returns when it is there.

        Raises ValueError for a state of another batch, and for one from which a refresh has begun already.
        """
        return finish(self.refreshing(observation, state))

    def refreshing(
        self, observation: DeployedObservation, state: DeployedState
    ) -> Generator[None, None, DeployedState]:
        """`refresh` as `Stream` calls it: in one slice, on any thread."""
        yield from ()
        with self._planning:
            self._require(state)
            if state.refreshes != self._refreshes:
                raise ValueError(
                    f"The state is of refresh {state.refreshes} of batch {state.episode}, the memory of refresh "
                    f"{self._refreshes}; go on from the state that was returned."
                )
            with self._on(self._streams[1]):
                self._fill("refresh.canvas", observation.canvas)
                frame = np.full(self._batch, state.elapsed // self.model.video_ratio)
                self._turn("planner", self._planner.rotary(frame))
                if not self.config.memory:
                    self._buffers["planner.valid"].zero_()
                self._plan()
                made = [self._buffers[f"planner.{name}"] for name in ("memory_k", "memory_v", "valid", "k", "v")]
                remember(*made, state.refreshes, self.model.memory_anchor)
                k, v = (x.clone() for x in made[3:])  # the next refresh writes over these
            if self._streams[1] is not None:
                self._streams[1].synchronize()
            self._refreshes += 1
        return dataclasses.replace(state, context=(k, v), refreshes=state.refreshes + 1, planned_at=state.elapsed)

    def forget(self, state: DeployedState) -> DeployedState:
        """The state without memory, as at the beginning of an episode."""
        with self._planning:
            self._require(state)
            with self._on(self._streams[1]):
                self._buffers["planner.valid"].zero_()
            self._refreshes = 0
        return dataclasses.replace(state, refreshes=0)

    def act(
        self, observation: DeployedObservation, state: DeployedState, continued: Continued | None = None
    ) -> tuple[np.ndarray, DeployedState]:
        """A chunk of actions by the state's plan, and the state after it; both as `__call__` returns them.

        continued: as of the JAX policy, but for guidance, which is refused.
        """
        self._require(state)
        if continued is not None and continued.guidance is not None:
            raise ValueError("Guidance changes the Euler steps, which an export has fixed; run the checkpoint in JAX.")
        robot_state, ahead = expected_state(continued, self.embodiment, observation.robot_state)
        sizes = (self._batch, self.model.chunk, self.max_delay)
        committed = condition(continued, self.embodiment, self.statistics["action"], *sizes)
        in_layout = self.embodiment.state.to_layout(robot_state)
        start = chunk_start(state.elapsed + ahead - state.planned_at, self.model.chunk)
        shape = (self._batch, self.model.chunk, self.model.action_dim)
        with self._on(self._streams[0]):
            if self._routed is not state.context:
                self._fill("router.k", state.context[0]), self._fill("router.v", state.context[1])
                self._routed = state.context
            self._fill("chunk.canvas", observation.canvas)
            self._fill("executor.state", torch.from_numpy(normalize(in_layout, self.statistics["state"])))
            self._fill("executor.noise", torch.from_numpy(draw_noise(self._seed, state.calls, shape)))
            self._turn("executor", self._executor.rotary(start))
            if committed is not None:
                self._fill("executor.committed", torch.from_numpy(committed.actions[:, 0]))
                self._fill("executor.first", torch.from_numpy(np.arange(self.model.chunk) < committed.count))
            self._act()
            actions = self._buffers["executor.actions"].cpu().numpy()
        actions = self.embodiment.act(denormalize(actions, self.statistics["action"]), observation.robot_state)
        after = dataclasses.replace(state, calls=state.calls + 1, elapsed=state.elapsed + self.config.execute)
        return actions, after

    def _require(self, state: DeployedState) -> None:
        """Raises ValueError for a state of a batch that has ended."""
        if state.episode != self._episode:
            raise ValueError(
                f"The state is of batch {state.episode}, this policy is at batch {self._episode}: its buffers hold "
                "one batch of episodes at a time; go on from what the last start returned, or load a second policy."
            )

    # ------------------------------------------------------------------------------------------------------- buffers
    def _allocate(self, batch: int) -> None:
        """Buffers for a batch of episodes, and the two functions that run on them."""
        if self._engines and batch != 1:
            raise ValueError(f"The engines are built for one episode at a time, {batch} were started; load the policy "
                             "without target to run several.")  # fmt: skip
        self._batch, self._routed = batch, None
        buffers: dict[str, Tensor] = {}

        def make(name: str, x: Tensor, batched: bool = True) -> Tensor:
            shape = list(x.shape)
            if batched:
                shape[1 if x.ndim > 4 else 0] = batch  # behind the layers, where there are any
            buffers[name] = torch.zeros(shape, dtype=x.dtype, device=self._device)
            return buffers[name]

        inputs = {name: graph.inputs for name, graph in self._graphs.items()}
        for stage in ("chunk", "refresh"):
            make(f"{stage}.canvas", inputs["vae"]["canvas"])
            make(f"{stage}.latents", inputs["router"]["latents"])
        for name in ("planner", "router", "executor"):
            for what, x in inputs[name].items():
                if what != "latents":
                    make(f"{name}.{what}", x, not (name == "executor" and what in ("cos", "sin")))
        for part in "kv":
            make(f"planner.{part}", inputs["router"][part])
            buffers[f"router.routed_{part}"] = buffers[f"executor.routed_{part}"]
        make("executor.actions", inputs["executor"]["noise"])
        buffers["planner.latents"], buffers["router.latents"] = buffers["refresh.latents"], buffers["chunk.latents"]
        self._buffers = buffers
        chunk = [self._stage("vae", "chunk"), self._stage("router", "router"), self._stage("executor", "executor")]
        if not self.config.routing:
            chunk[1] = lambda: [self._fill(f"executor.routed_{x}", buffers[f"router.{x}"]) for x in "kv"]
        self._act = self._captured("chunk", ("vae", "router", "executor"), chunk, self._streams[0])
        refresh = [self._stage("vae", "refresh"), self._stage("planner", "planner")]
        self._plan = self._captured("refresh", ("planner",), refresh, self._streams[1])

    def _fill(self, name: str, x: Tensor) -> None:
        self._buffers[name].copy_(x)

    def _turn(self, name: str, turn: tuple[Tensor, Tensor]) -> None:
        """Rotary tables of a graph."""
        for part, x in zip(("cos", "sin"), turn, strict=True):
            self._fill(f"{name}.{part}", x)

    # ------------------------------------------------------------------------------------------------------ backends
    def _load_engines(self, engines: Engines | None) -> dict[str, Engines]:
        """The graphs whose engine loads here; the others are said and run in PyTorch."""
        found: dict[str, Engines] = {}
        for name in GRAPHS if engines is not None else ():
            try:
                Engine(engines.trt, engines.plan(name), name)
                found[name], self.backends[name] = engines, "engine"
            except ExportError as error:
                self._say(f"{name} in PyTorch: {error}")
        return found

    def _stage(self, name: str, prefix: str) -> Callable[[], Any]:
        """Runs one graph from its buffers into its buffers."""
        graph = self._graphs[name]
        places = {what: self._buffers[f"{prefix}.{what}"] for what in (*graph.inputs, *graph.outputs)}
        if name in self._engines:
            engine = Engine(self._engines[name].trt, self._engines[name].plan(name), name)
            engine.bind(**places)
            return engine.launch

        def run() -> None:
            for what, x in graph(**{what: places[what] for what in graph.inputs}).items():
                places[what].copy_(x)

        return run

    def _captured(
        self, name: str, graphs: Sequence[str], stages: Sequence[Callable[[], Any]], stream: Any
    ) -> Callable[[], None]:
        """The stages as one CUDA graph, or as they are where there is no GPU or the capture fails."""

        def run() -> None:
            with torch.no_grad():
                for stage in stages:
                    stage()

        if stream is None:
            return run
        try:
            replay, _ = capture(run, stream)
        except (RuntimeError, ExportError) as error:
            self._say(f"{name} without a CUDA graph: capturing it failed ({str(error).splitlines()[0]}).")
            return run
        self.backends |= {x: "CUDA graph" for x in graphs if x not in self._engines}
        return replay

    @staticmethod
    def _on(stream: Any) -> Any:
        """Work on a stream that begins when what was asked for before is done."""
        if stream is None:
            return contextlib.nullcontext()
        stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(stream)


def draw_noise(seed: int, call: int, shape: tuple[int, ...]) -> np.ndarray:
    """Start of a chunk's denoising, float32: fresh in every call, the same in every run."""
    return np.random.default_rng([seed, call]).standard_normal(shape, np.float32)


def find_engines(folder: Path, target: str) -> Engines:
    """The engines of an export for a target, on this machine's GPU. Raises ExportError where they cannot be used."""
    gpu = current_gpu()
    if gpu is None:
        raise ExportError("engines run on a GPU, and PyTorch finds none; check the driver with nvidia-smi.")
    return open_engines(folder / f"engines-{target}", read_manifest(folder)["source"]["sha256"], gpu, hashes=False)
