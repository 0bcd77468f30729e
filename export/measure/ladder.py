"""From the released way to one CUDA graph of the compiled twin, one change at a time: what `ahawam benchmark` times.

A way to make a chunk takes what a robot sends (`Call`, on the host) and returns actions on the host; a way to refresh
the plan takes latents and leaves its keys and values on the device. All start from the same plan, memory and text,
which lie on the device.

Axis letters: B batch, S tokens of one frame, T action tokens, d action width, p state width, c latent channels.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ahawam_jax.models.config import PATCH
from export.measure.models import BATCH, STAGES, Models, as_cache, tree_tensors
from export.released.way import Cache, join
from export.twin.capture import capture
from export.twin.model import Executor, remember


class Call(NamedTuple):
    """Inputs of one chunk, on the host."""

    canvas: Tensor  # uint8 [B, H, W, 3]
    state: Tensor  # [B, p] normalised
    noise: Tensor  # [B, T, d]
    start: int  # position of the first action


class Stage(NamedTuple):
    """A part of a chunk, or a refresh: functions of the twin's inputs, which lie on the device."""

    released: Callable[..., Any]
    twin: Callable[..., Any]
    compiled: Callable[..., Any]
    inputs: tuple[Tensor, ...]


Chunk = Callable[[Call], Any]  # actions [B, T, d] on the host
Refresh = Callable[[Tensor, int], Any]  # latents [B, c, h, w] and the frame's position -> keys and values


class Captured:
    """A function of tensors as one CUDA graph; on a CPU, the function with inputs and outputs in fixed places."""

    def __init__(self, run: Callable[..., Any], *inputs: Tensor, priority: int = 0):
        """inputs: become the graph's own, and are read where they are.  priority: of its kernels; -1 goes first."""
        self.run, self.inputs, self.replay = run, inputs, None
        if inputs[0].device.type != "cuda":
            self.outputs = run(*inputs)
            return
        self.replay, self.outputs = capture(lambda: run(*inputs), torch.cuda.Stream(priority=priority))
        torch.cuda.synchronize()

    def __call__(self, *values: Tensor) -> Any:
        """Copies values to the first inputs; the others are read as they are. Outputs lie in the same place always."""
        for place, x in zip(self.inputs, values, strict=False):
            place.copy_(x)
        if self.replay is not None:
            self.replay()
        else:
            for place, x in zip(tree_tensors(self.outputs), tree_tensors(self.run(*self.inputs)), strict=True):
                place.copy_(x)
        return self.outputs


def own(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Copies for a graph that gets its inputs by copying."""
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)


def paired(flat: Any) -> list[tuple[Tensor, Tensor]]:
    """k, v, k, v, ... -> a pair for every layer."""
    return list(zip(flat[::2], flat[1::2], strict=True))


class Ways:
    """Every way to make a chunk and to refresh the plan, built when it is first asked for."""

    def __init__(self, models: Models, first: Call, mode: str, backend: str):
        """first: some call, for its shapes. mode, backend: of torch.compile."""
        self.models, self.first, self.cache = models, first, models.cache
        # One step and not the loop: it is compiled once for every number of steps, and in minutes.
        compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
        self._compile = functools.partial(compiled, mode=mode) if backend == "inductor" else compiled

    # -------------------------------------------------------------------------------------------------- compiled parts
    @functools.cached_property
    def compiled_vae(self) -> Callable[..., Any]:
        return self._compile(self.models.vae)

    @functools.cached_property
    def compiled_router(self) -> Callable[..., Any]:
        return self._compile(self.models.router)

    @functools.cached_property
    def compiled_planner(self) -> Callable[..., Any]:
        return self._compile(self.models.planner)

    @functools.cached_property
    def compiled_predict(self) -> Callable[..., Any]:
        return self._compile(self.models.executors[1].predict)

    @functools.cached_property
    def text(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of the instruction for the executor, and their mask."""
        return *self.models.executors[1].text(self.models.text), self.models.text_mask

    # ------------------------------------------------------------------------------------------------- released chunks
    def released_eager(self, steps: int) -> Chunk:
        m = self.models
        levels = m.levels(steps)

        def chunk(call: Call) -> Tensor:
            cache = m.released.route(m.released_vae(call.canvas.to(m.device)), self.cache)
            noise, state = call.noise.to(m.device), call.state.to(m.device)
            return m.released.denoise(noise, state, call.start, levels, m.text, m.text_mask, cache).cpu()

        return chunk

    def released_loop(self, steps: int) -> Captured:
        """The executor's loop with all its inputs copied to it: noise, state, rotary factors, text, mask, k and v."""
        m = self.models
        levels = m.levels(steps)

        def run(noise: Tensor, state: Tensor, factors: Tensor, text: Tensor, mask: Tensor, *flat: Tensor) -> Tensor:
            return m.released.denoise(noise, state, 0, levels, text, mask, paired(flat), factors)

        factors = m.released.action_factors(0)
        inputs = [self.first.noise, self.first.state, factors, m.text, m.text_mask, *tree_tensors(self.cache)]
        return Captured(run, *self.placed(*inputs))

    def graph_of_loop(self, steps: int, router_too: bool) -> Chunk:
        """The released way with a CUDA graph of the executor's loop, and of the router."""
        m, loop = self.models, self.released_loop(steps)
        route = m.released.route
        if router_too:
            flat = own(self.latents, *tree_tensors(self.cache))
            captured = Captured(lambda latents, *flat: m.released.route(latents, paired(flat)), *flat)

            def route(latents: Tensor, cache: Cache) -> Cache:
                return captured(latents, *tree_tensors(cache))

        def chunk(call: Call) -> Tensor:
            cache = route(m.released_vae(call.canvas.to(m.device)), self.cache)
            factors = m.released.action_factors(call.start)
            return loop(call.noise, call.state, factors, m.text, m.text_mask, *tree_tensors(cache)).cpu()

        return chunk

    # ----------------------------------------------------------------------------------------------------- twin chunks
    @functools.cached_property
    def latents(self) -> Tensor:
        """Of some observation, as the released tower makes them."""
        return self.models.released_vae(self.first.canvas.to(self.models.device))

    def rotary(self, start: int) -> tuple[Tensor, Tensor]:
        return self.models.executors[1].rotary(start)

    def executor(self, steps: int, compiled: bool) -> Callable[..., Tensor]:
        """noise, state, cos, sin, text k, v, mask, routed k, v -> actions."""
        executor: Executor = self.models.executors[steps]
        if compiled:
            executor = with_predict(executor, self.compiled_predict)

        def act(noise: Tensor, state: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor) -> Tensor:
            *text, routed_k, routed_v = rest
            return executor(noise, cos, sin, *text, *executor.state(state), routed_k, routed_v)

        return act

    def placed(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Copies on the device."""
        return own(*(x.to(self.models.device) for x in inputs))

    def first_inputs(self) -> tuple[Tensor, ...]:
        """Noise, state and rotary tables of the first call, copied to the device."""
        call = self.first
        return self.placed(call.noise, call.state, *self.rotary(call.start))

    def hoisted(self, steps: int, copies: bool, flat_vae: bool) -> Chunk:
        """The twin's router and executor as two graphs.

        copies: every input is copied to them, also what lies on the device. flat_vae: two-dimensional convolutions.
        """
        m, vae = self.models, self.models.vae if flat_vae else self.models.released_vae
        act = self.executor(steps, False)
        latents = self.latents.clone()
        plan = own(m.k, m.v) if copies else (m.k, m.v)
        router = Captured(m.router, latents, *plan)
        rest = (*self.text, *router.outputs)
        loop = Captured(act, *self.first_inputs(), *(own(*rest) if copies else rest))

        def chunk(call: Call) -> Tensor:
            seen = vae(call.canvas.to(m.device))
            routed = router(seen, m.k, m.v) if copies else router(seen)
            changed = (call.noise, call.state, *self.rotary(call.start))
            return (loop(*changed, *self.text, *routed) if copies else loop(*changed)).cpu()

        return chunk

    def whole(self, steps: int, compiled: bool) -> Callable[..., Tensor]:
        """canvas, noise, state, cos, sin on the device -> actions: the twin's chunk."""
        m, act = self.models, self.executor(steps, compiled)
        vae = self.compiled_vae if compiled else m.vae
        router = self.compiled_router if compiled else m.router

        def run(canvas: Tensor, *changed: Tensor) -> Tensor:
            return act(*changed, *self.text, *router(vae(canvas), m.k, m.v))

        return run

    def twin(self, steps: int, compiled: bool, graph: bool, priority: int = 0) -> Chunk:
        """The twin's chunk as Python calls it, compiled or not, or as one CUDA graph whose kernels have a priority."""
        m, run = self.models, self.whole(steps, compiled)
        if graph:
            run = Captured(run, *self.placed(self.first.canvas), *self.first_inputs(), priority=priority)

        def chunk(call: Call) -> Tensor:
            changed = (call.canvas, call.noise, call.state, *self.rotary(call.start))
            return run(*(changed if graph else (x.to(m.device) for x in changed))).cpu()

        return chunk

    # ------------------------------------------------------------------------------------------------------- refreshes
    def released_refresh(self, compiled: bool) -> Refresh:
        """Memory: a list of frames, the oldest dropped, or the second oldest where the first stays."""
        m = self.models
        prefill = self._compile(m.released.prefill) if compiled else m.released.prefill
        memory = [as_cache(m.memory_k[:, :, i], m.memory_v[:, :, i]) for i in range(m.memory_k.shape[2])]

        def refresh(latents: Tensor, frame: int) -> Any:
            rows, columns = (side // PATCH for side in latents.shape[2:])
            factors = m.released.video_factors(frame, rows, columns).to(m.device)
            cache = prefill(latents, factors, m.text, m.text_mask, join(memory))
            memory.append(cache)
            memory.pop(int(m.config.memory_anchor))
            return zip_cache(cache)

        return refresh

    def twin_refresh(self, compiled: bool, graph: bool) -> Refresh:
        """Memory: a ring in fixed buffers."""
        m = self.models
        count = m.config.memory_frames  # it is full
        memory_k, memory_v = own(m.memory_k, m.memory_v)
        valid = torch.ones(memory_k.shape[1:3], dtype=torch.bool, device=m.device)
        run = self.planning(compiled, memory_k, memory_v, valid)
        if graph:
            run = self.captured_planning(run)

        def refresh(latents: Tensor, frame: int) -> Any:
            nonlocal count
            turn = (x.to(m.device) for x in m.planner.rotary(np.full(BATCH, frame)))
            k, v = run(latents, *turn)
            remember(memory_k, memory_v, valid, k, v, count, m.config.memory_anchor)
            count += 1
            return k, v

        return refresh

    def planning(self, compiled: bool, memory_k: Tensor, memory_v: Tensor, valid: Tensor) -> Callable[..., Any]:
        """latents, cos, sin on the device -> keys and values of the plan."""
        m = self.models
        planner = self.compiled_planner if compiled else m.planner
        text = (*m.planner.text(m.text), m.text_mask)
        return lambda latents, cos, sin: planner(latents, cos, sin, *text, memory_k, memory_v, valid)

    def captured_planning(self, run: Callable[..., Any]) -> Captured:
        """A planning function as one CUDA graph."""
        return Captured(run, *self.placed(self.latents.float(), *self.models.planner.rotary(np.zeros(BATCH))))

    # ---------------------------------------------------------------------------------------------------------- stages
    def stages(self) -> dict[str, Stage]:
        """By name, `benchmark_models.STAGES`."""
        m, executor, frame = self.models, self.models.executors[1], np.zeros(BATCH)
        noise, state, cos, sin = self.first_inputs()
        canvas, latents = self.first.canvas.to(m.device), self.latents.float()
        k, v, mask = self.text
        mask = torch.cat([mask, mask.new_ones(BATCH, 1)], 1)[:, None, None]
        cross = [torch.cat(pair, 2) for pair in zip((k, v), executor.state(state), strict=True)]
        step = (noise, executor.rows[0], cos, sin, *cross, mask, m.k, m.v)
        turn = [x.to(m.device) for x in m.planner.rotary(frame)]
        valid = torch.ones(m.memory_k.shape[1:3], dtype=torch.bool, device=m.device)
        plan = (latents, *turn, *m.planner.text(m.text), m.text_mask, m.memory_k, m.memory_v, valid)
        refresh, levels = self.released_refresh(False), m.levels(1)
        stages = (
            (m.released_vae, m.vae, self.compiled_vae, (canvas,)),
            (lambda *_: m.released.route(latents, self.cache), m.router, self.compiled_router, (latents, m.k, m.v)),
            (lambda x: m.released.state(x.to(m.dtype)), executor.state, executor.state, (state,)),
            (
                lambda *_: m.released.denoise(noise, state, 0, levels, m.text, m.text_mask, self.cache),
                executor.predict, self.compiled_predict, step,
            ),
            (lambda *_: refresh(latents, 0), m.planner, self.compiled_planner, plan),
        )  # fmt: skip
        return {name: Stage(*stage) for name, stage in zip(STAGES, stages, strict=True)}


def zip_cache(cache: Any) -> Any:
    """Keys and values of every layer -> all keys, all values."""
    return tuple(zip(*cache, strict=True))


def with_predict(executor: Executor, predict: Callable[..., Tensor]) -> Executor:
    """An executor with the same weights whose steps are made by `predict`."""
    with torch.device("meta"):
        other = Executor(executor.config, len(executor.schedule), 1.0, executor.branch.dtype)
    other.load_state_dict(executor.state_dict(), assign=True)
    other.schedule, other.predict = executor.schedule, predict
    return other

