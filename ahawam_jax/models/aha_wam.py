"""AhaWam: planner -> context of the current frame -> router -> executor. The composition, nothing else."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ahawam_jax.models.attention import attention_of
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.models.dit import KV, Given, dense
from ahawam_jax.models.executor import Executor
from ahawam_jax.models.memory import PlannerContext, PlannerMemory
from ahawam_jax.models.partitioning import partitioned
from ahawam_jax.models.planner import History, Planner, PlannerOutput, frame_causal_mask
from ahawam_jax.models.router import ObservationQueries, Router

ROWS = 8  # of a matrix that GPUs' products of half precision take as it is
ACTION_BRANCH = 1  # row of the branch embedding that action tokens get; the release never uses row 0


class AhaWam(nn.Module):
    """The whole model. `plan` and `refresh` run at the planner's rate, `route` and `act` at the executor's.

    deployed: with the parameters of `models/deployment.py`, for `read`, `read_state`, `refresh`, `route` and `step`.
    """

    config: ModelConfig
    deployed: bool = False

    def setup(self):
        cfg = self.config
        self.planner = Planner(cfg, self.deployed)
        self.observation_queries = ObservationQueries(cfg)
        self.router = Router(cfg)
        self.state_encoder = dense(cfg.text_dim, (None, "embed"), name="state_encoder", dtype=jnp.dtype(cfg.dtype))
        self.executor = Executor(cfg, self.deployed)
        init = partitioned(nn.initializers.normal(0.02), (None, "embed"))
        self.branch_embedding = self.param("branch_embedding", init, (2, cfg.executor_dim))

    def plan(
        self,
        latents: jax.Array,
        times: jax.Array,
        positions: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        causal: bool = True,
        history: History | None = None,
        current_only: bool = False,
    ) -> PlannerOutput:
        """The planner over a clip (Eq. 2): latents [B, c, F, h, w], times and positions [B, F].

        Frame-causal as AHA-WAM is trained, or with every token seeing every other, as Wan2.2 is. It looks back on a
        history, if any, that is planned beside it, without gradient (Eq. 13). current_only: of the context, only the
        first frame's is handed back.
        """
        tokens = latents.shape[3] * latents.shape[4] // 4
        mask = frame_causal_mask(latents.shape[2], tokens)
        if not causal:
            mask = jnp.ones_like(mask)
        kept = 1 if current_only else None
        return self.planner(latents, times, positions, text, text_mask, mask, history, kept)

    def refresh(
        self, latents: jax.Array, position: jax.Array, text: jax.Array | None, text_mask: jax.Array,
        memory: PlannerMemory, given: list[Given] | None = None,
    ) -> tuple[PlannerContext, PlannerMemory]:  # fmt: skip
        """One planner refresh: the new frame reads the memory, and joins it (Eq. 13); see `Planner.refresh`."""
        return self.planner.refresh(latents, position, text, text_mask, memory, given)[:2]

    def route(
        self, context: PlannerContext, observation_latents: jax.Array, scanned: bool = False
    ) -> PlannerContext:
        """OVCR (Eq. 8-10): context [L, B, 1, S, N, H], latents [B, C, c, 1, h, w] -> [L, B, C, S, N, H].

        scanned: layer by layer, as training does to save memory.
        """
        return self.router(self.observation_queries(observation_latents), context, scanned)

    def act(
        self,
        actions: jax.Array,
        times: jax.Array,
        positions: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        states: jax.Array,
        routed: PlannerContext,
        committed: jax.Array | None = None,
    ) -> jax.Array:
        """The executor (Eq. 3): actions [B, C, T, d], times [B, C], positions [C, T], states [B, C, p].

        committed: [B, C] int, how many actions at the beginning of each chunk are clean, at time 0; None: none.
        """
        tokens = self.state_encoder(states)
        branch = self.branch_embedding[ACTION_BRANCH]
        return self.executor(actions, times, positions, text, text_mask, tokens, routed, branch, committed)

    def read(self, text: jax.Array) -> tuple[KV, KV]:
        """Text tokens [B, K, X] -> k, v [L, B, K, N, H] of the cross-attention of planner and executor."""
        return self.planner.read(text), self.executor.read(text)

    def read_state(self, states: jax.Array) -> KV:
        """Normalised states [B, C, p] -> k, v [L, B, C, N, H] of the executor's cross-attention."""
        tokens = self.state_encoder(states)
        count = tokens.shape[1]
        # Of a matrix of one row XLA's GPUs round every product and not their sum.
        k, v = self.executor.read(jnp.pad(tokens, [(0, 0), (0, -count % ROWS), (0, 0)]))
        return k[:, :, :count], v[:, :, :count]

    def step(
        self, actions: jax.Array, positions: jax.Array, text_mask: jax.Array, seen: list[KV], given: list[Given]
    ) -> jax.Array:
        """The executor, once, on what was made before; see `Executor.step`."""
        branch = self.branch_embedding[ACTION_BRANCH]
        return self.executor.step(actions, positions, text_mask, branch, seen, given)

    def __call__(self, latents, observation_latents, actions, states, text, text_mask) -> None:
        """Touches every parameter once; used to initialise and to count."""
        batch, _, frames = latents.shape[:3]
        chunks, length = actions.shape[1:3]
        zeros = jnp.zeros((batch, frames))
        planned = self.plan(latents, zeros, zeros, text, text_mask)
        routed = self.route(planned.context.frame(0), observation_latents)
        self.act(actions, jnp.zeros((batch, chunks)), jnp.zeros((chunks, length)), text, text_mask, states, routed)


def init(model: AhaWam, key: jax.Array) -> Any:
    """Fresh parameters, boxed with their logical axis names. Sizes do not depend on image or clip size."""
    cfg = model.config
    f32 = jnp.float32
    latents = jnp.zeros((1, cfg.latent_channels, 1, 2, 2), f32)
    actions = jnp.zeros((1, 1, cfg.chunk, cfg.action_dim), f32)
    states = jnp.zeros((1, 1, cfg.state_dim), f32)
    text, text_mask = jnp.zeros((1, 1, cfg.text_dim), f32), jnp.ones((1, 1), bool)
    with attention_of("cpu"):  # a process that only wants the shapes must not take the GPU
        return model.init(key, latents, latents[:, None], actions, states, text, text_mask)["params"]


@functools.lru_cache(maxsize=8)  # tracing takes a second
def abstract_params(config: ModelConfig) -> Any:
    """Shapes, dtypes and logical axes of every parameter, without allocating anything. Not to be changed."""
    return jax.eval_shape(lambda key: init(AhaWam(config), key), jax.ShapeDtypeStruct((2,), jnp.uint32))


def resident_params(config: ModelConfig) -> Any:
    """Shapes of all parameters in the dtypes in which a policy holds them.

    What the model casts to config.dtype before every use lies in it, which halves the bytes read in bfloat16 and
    changes no result. Norms, modulation, gates, time embeddings and heads stay float32.
    """

    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, resident_dtype(config, path)), nn.unbox(abstract_params(config))
    )


def resident_dtype(config: ModelConfig, path: tuple[Any, ...]) -> str:
    """Of the parameter at a path of keys, in either form."""
    names = [key.key for key in path]
    precise = "time_embedding" in names or "head" in names or any(name.endswith("norm") for name in names)
    cast = names[-1] in ("kernel", "bias", "base_queries", "branch_embedding")
    return config.dtype if cast and not precise else "float32"


def empty_memory(config: ModelConfig, batch: int, tokens: int) -> PlannerMemory:
    """A memory without frames, for a scene of `tokens` planner tokens a frame."""
    shape = (batch, config.memory_frames + 1, tokens, config.num_heads, config.head_dim)
    return PlannerMemory.empty(config.num_layers, shape, jnp.dtype(config.dtype))
