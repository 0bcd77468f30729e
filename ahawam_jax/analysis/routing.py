"""Where the routing queries look, and how far routing moves the planner context (Sec. 3.2, Eq. 8-10)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ahawam_jax.analysis.episodes import grid_of
from ahawam_jax.inference.policy import Observation, Policy, PolicyState
from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.attention import MASKED
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.models.memory import PlannerContext
from ahawam_jax.models.router import LayerRouter


def attention_weights(q: jax.Array, k: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The weights that `models.attention` gives v and never hands out, softmax(q k / sqrt(H)).

    q [..., S, N, H], k [..., K, N, H], mask broadcastable to [..., S, K] -> float32 [..., N, S, K].
    """
    scores = jnp.einsum("...qnh,...knh->...nqk", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask[..., None, :, :], scores, MASKED)
    return jax.nn.softmax(scores, -1)


@flax.struct.dataclass
class LayerRouting:
    """What routing does in one layer, for one frame and one observation."""

    gate: jax.Array  # [] float32, the sigmoid of the learned number
    weights: jax.Array  # [N, Q, S] float32, how the queries read the frame
    planned: PlannerContext  # k, v [S, N, H] of the frame
    routed: PlannerContext  # k, v [S, N, H] that the executor reads


def check_routing(policy: Policy) -> None:
    """Raises ValueError for a policy that hands its context on as it is."""
    if not policy.config.routing:
        raise ValueError(
            "This policy runs without routing (config.policy.routing=False), so there is nothing of it to look at; "
            "load it with routing=True if it was trained so."
        )


def layers(policy: Policy, context: PlannerContext, observation: Observation) -> Iterator[LayerRouting]:
    """Routing of a context [L, 1, 1, S, N, H] by an observation, one layer after the other; all that one layer makes
    is gone when the next is asked for. Raises ValueError for a policy without routing."""
    check_routing(policy)
    queries, _ = _queries(policy.sizes, policy.deployed.params, observation.latents)
    stacked = policy.deployed.params["router"]["layers"]
    for i in range(policy.sizes.num_layers):
        params = jax.tree.map(lambda x, i=i: x[i], stacked)
        yield _layer(policy.sizes, params, queries, context.k[i, :, 0], context.v[i, :, 0])


@partial(jax.jit, static_argnums=0)
def _layer(config: ModelConfig, params: Any, queries: jax.Array, k: jax.Array, v: jax.Array) -> LayerRouting:
    router = LayerRouter(config)
    routed, made = router.apply(
        {"params": params}, queries, k, v, mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name == "query",
    )  # fmt: skip
    (q,) = made["intermediates"]["query"]["__call__"]
    weights = attention_weights(q, k[:, None])[0, 0]
    return LayerRouting(
        nn.sigmoid(params["gate"]), weights, PlannerContext(k[0], v[0]), PlannerContext(*(x[0, 0] for x in routed))
    )


@partial(jax.jit, static_argnums=0)
def _queries(config: ModelConfig, params: Any, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries [1, 1, Q, X] of latents [1, c, 1, h, w], and how they read them, float32 [Q, h*w]."""
    queries, made = AhaWam(config, deployed=True).apply(
        {"params": params}, latents[:, None], method=lambda model, x: model.observation_queries(x),
        mutable=["intermediates"], capture_intermediates=lambda module, _: module.name == "key",
    )  # fmt: skip
    (keys,) = made["intermediates"]["observation_queries"]["encoder"]["key"]["__call__"]
    base = params["observation_queries"]["encoder"]["base_queries"].astype(keys.dtype)
    return queries, attention_weights(base[:, None], keys[0, 0][:, None])[0]


def queries(policy: Policy, observation: Observation) -> np.ndarray:
    """The routing queries of what is seen (Eq. 8), B = 1: float32 [Q, X]."""
    check_routing(policy)
    return np.asarray(_queries(policy.sizes, policy.deployed.params, observation.latents)[0], np.float32)[0, 0]


@dataclass(frozen=True)
class Look:
    """Where the queries of one observation look, as shares of 1.

    observation: float32 [Q, h, w], over the latents of the observation that they are made of (Eq. 8).
    layers: float32 [L, Q, N, h/2, w/2], over the planner's tokens of the frame, on the canvas (Eq. 9).
    """

    observation: np.ndarray
    layers: np.ndarray


def look(policy: Policy, state: PolicyState, observation: Observation) -> Look:
    """Where the routing queries look, given a state's plan and what is seen now, B = 1."""
    grid = grid_of(observation)
    maps = [np.asarray(layer.weights).swapaxes(0, 1) for layer in layers(policy, state.context, observation)]
    _, weights = _queries(policy.sizes, policy.deployed.params, observation.latents)
    return Look(
        np.asarray(weights).reshape(-1, *observation.latents.shape[-2:]),
        np.stack(maps).reshape(len(maps), *maps[0].shape[:2], *grid),
    )


@dataclass(frozen=True)
class Movement:
    """How far routing moves the context. The last axis of 2 is K, V.

    gate: [L], learned, between 0 and 1.  norm: [L, 2], |routed - planned| / |planned| over all tokens and heads.
    cosine: [L, 2], between routed and planned.  where: [L, 2, h/2, w/2], `norm` of each token on the canvas.
    All float64.
    """

    gate: np.ndarray
    norm: np.ndarray
    cosine: np.ndarray
    where: np.ndarray


def movement(policy: Policy, state: PolicyState, observation: Observation) -> Movement:
    """How far routing by what is seen now moves K and V of a state's plan, B = 1."""
    gates, found = [], []
    for layer in layers(policy, state.context, observation):
        gates.append(float(layer.gate))
        pairs = zip((layer.planned.k, layer.planned.v), (layer.routed.k, layer.routed.v), strict=True)
        found.append([_moved(*(np.asarray(x, np.float64) for x in pair)) for pair in pairs])
    norm, cosine, where = (np.stack([[kv[i] for kv in layer] for layer in found]) for i in range(3))
    return Movement(np.array(gates), norm, cosine, where.reshape(*norm.shape, *grid_of(observation)))


def _moved(planned: np.ndarray, routed: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Relative norm of the change, cosine, relative norm by token [S]; x [S, N, H]."""
    change, size = (np.linalg.norm(x.reshape(len(x), -1), axis=1) for x in (routed - planned, planned))
    whole = np.linalg.norm(planned)
    cosine = (planned * routed).sum() / (whole * np.linalg.norm(routed))
    return np.linalg.norm(change) / whole, cosine, change / size
