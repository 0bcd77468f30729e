"""The functions that a policy runs on its device, in the deployment form, and the shapes that they are called with."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ahawam_jax.flow_matching import Guide
from ahawam_jax.models.aha_wam import AhaWam, empty_memory
from ahawam_jax.models.config import PATCH, SPATIAL_STRIDE, ModelConfig
from ahawam_jax.models.deployment import Deployed, Words, by_layer, give
from ahawam_jax.models.dit import KV
from ahawam_jax.models.memory import PlannerContext, PlannerMemory
from ahawam_jax.sampling import Committed, denoise_deployed
from ahawam_jax.towers.building import VideoTower
from ahawam_jax.towers.encoding import pixels


class Programs(NamedTuple):
    """The four functions, or something about each.

    read(deployed, text, mask) -> words. Text [B, K, X], mask [B, K] bool; once an episode. Of the planner and of the
        executor where deployed has them.
    encode(tower, canvas) -> latents [B, c, 1, h, w] of a canvas uint8 [B, H, W, 3].
    refresh(deployed, latents, position, words, memory) -> planner context of the frame, memory after it. Position
        int32 [B]. The memory's arrays are written in place: they are gone afterwards.
    act(deployed, context, latents, states, words, start, key, continued) -> normalised actions [B, T, d]. States
        [B, p] normalised, start the position of the chunk's first action, continued what it goes on from: None,
        Committed or Guide.
    """

    read: Any
    encode: Any
    refresh: Any
    act: Any


DONATED = Programs((), (), (4,), ())  # arguments that a function takes for itself
# XLA would hand products and sums over an axis to a library (YNNPACK), which takes its time to lay out weights anew in
# every call and keeps the operations around from being fused. Without, ten steps of 67M parameters take 0.55 times as
# long (AVX2, two cores, JAX 0.10.2), and so do those of many episodes. Training steps are quicker with it.
_WITHOUT_LIBRARY = {"xla_cpu_experimental_ynn_fusion_type": ""}


@functools.cache
def compiler_options() -> dict[str, str]:
    """For programs that a policy runs in this process, as `jax.jit` takes them: on a CPU, if this XLA knows of it."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=_WITHOUT_LIBRARY).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # no such option, or no such value
        return {}
    return _WITHOUT_LIBRARY


def make_programs(config: ModelConfig, shift: float, routing: bool = True, present: ArrayLike = True) -> Programs:
    """The functions, to be jitted with what is DONATED.

    shift: of the noise levels. routing False: the executor reads the context as it is. present: bool [d], the numbers
    of an action that the robot has.
    """
    model = AhaWam(config, deployed=True)

    def apply(deployed: Deployed, method: str | Callable[..., Any], *inputs: Any) -> Any:
        return model.apply({"params": deployed.params}, *inputs, method=method)

    def read(deployed: Deployed, text: jax.Array, mask: jax.Array) -> Words:
        def of(part: str) -> list[KV]:
            if part not in deployed.params:
                return []
            return by_layer(*apply(deployed, lambda model, text: getattr(model, part).read(text), text))

        return Words(of("planner"), of("executor"), mask)

    def encode(tower: VideoTower, canvas: jax.Array) -> jax.Array:
        return tower.encode(pixels(canvas[:, None]))

    def refresh(
        deployed: Deployed, latents: jax.Array, position: jax.Array, words: Words, memory: PlannerMemory
    ) -> tuple[PlannerContext, PlannerMemory]:
        given = give(deployed.planner_rows[0], words.planner)
        return apply(deployed, "refresh", latents, position, None, words.mask, memory, given)

    def act(
        deployed: Deployed, context: PlannerContext, latents: jax.Array, states: jax.Array, words: Words,
        start: jax.Array, key: jax.Array, continued: Committed | Guide | None = None,
    ) -> jax.Array:  # fmt: skip
        routed = apply(deployed, "route", context, latents[:, None]) if routing else context
        noise = jax.random.normal(key, (len(latents), 1, config.chunk, config.action_dim))
        positions = start + jnp.arange(config.chunk)[None]
        return denoise_deployed(
            model, deployed, noise, positions, words, states[:, None], routed, shift, present, continued
        )[:, 0]

    return Programs(read, encode, refresh, act)


def jitted(functions: Programs) -> Programs:
    """For this process."""
    options = compiler_options()
    return Programs(*(
        jax.jit(run, donate_argnums=own, compiler_options=options)
        for run, own in zip(functions, DONATED, strict=True)
    ))  # fmt: skip


def abstract_arguments(
    config: ModelConfig, deployed: Deployed, tower: VideoTower, size: tuple[int, int], text: jax.ShapeDtypeStruct
) -> Programs:
    """Arguments of the functions as ShapeDtypeStructs; deployed and tower may be arrays.

    size: height and width of the canvas. text: [B, K, X], which says for how many episodes.
    """
    episodes, tokens = text.shape[0], text.shape[:2]

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    deployed, tower = jax.eval_shape(lambda held: held, (deployed, tower))
    heads = (config.num_heads, config.head_dim)
    kv = [(array(config.dtype, *tokens, *heads),) * 2 for _ in range(config.num_layers)]
    words = Words(kv, kv, array(bool, *tokens))
    grid = [side // SPATIAL_STRIDE for side in size]
    latents = array(jnp.float32, episodes, config.latent_channels, 1, *grid)
    memory = jax.eval_shape(lambda: empty_memory(config, episodes, tokens_of(size)))
    frame = array(config.dtype, config.num_layers, episodes, 1, tokens_of(size), *heads)
    key, continued = jax.eval_shape(lambda: jax.random.key(0)), None
    if deployed.clean_rows is not None:
        chunk = (episodes, 1, config.chunk, config.action_dim)
        continued = Committed(array(jnp.float32, *chunk), array(jnp.int32, episodes, 1))
    return Programs(
        (deployed, text, words.mask),
        (tower, array(jnp.uint8, episodes, *size, 3)),
        (deployed, latents, array(jnp.int32, episodes), words, memory),
        (deployed, PlannerContext(frame, frame), latents, array(jnp.float32, episodes, config.state_dim), words,
         array(jnp.int32), key, continued),
    )  # fmt: skip


def tokens_of(size: tuple[int, int]) -> int:
    """Planner tokens of a canvas of such height and width."""
    height, width = size
    return height * width // (SPATIAL_STRIDE * PATCH) ** 2


def planner_apart(deployed: Deployed, device: jax.Device) -> tuple[Deployed, Deployed]:
    """The planner's part, moved to a device, and the executor's, which stays where it is."""
    params = dict(deployed.params)
    moved = jax.device_put({"planner": params.pop("planner")}, device, donate=True)
    branch, rows, others = jax.device_put(
        (params["branch_embedding"], deployed.planner_rows, deployed.executor_rows), device
    )
    return Deployed({**moved, "branch_embedding": branch}, rows, others), deployed.replace(params=params)
