"""The analysis: its maps are the model's own, and what must be nothing is nothing."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahawam_jax.analysis.ageing import ageing, ageing_of_chunks
from ahawam_jax.analysis.episodes import Plan, Seen, chunk, period, plans, seen
from ahawam_jax.analysis.imagining import given_back, prediction_error
from ahawam_jax.analysis.probing import PARTS, probe
from ahawam_jax.analysis.reading_out import features, positions, read_out, ridge
from ahawam_jax.analysis.remembering import memory_mass, slots
from ahawam_jax.analysis.routing import attention_weights, layers, look, movement
from ahawam_jax.analysis.simulated import simulated
from ahawam_jax.inference.policy import Policy, PolicyConfig
from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.attention import attention
from ahawam_jax.models.config import ModelConfig
from data_pipelines.recording.record import disturbance
from data_pipelines.simulation.env import EPISODE_STEPS, AlohaSim
from data_pipelines.simulation.expert import plan
from data_pipelines.simulation.rendering import check_rendering
from tests.inference.test_policy import HOW, STATISTICS
from tests.tiny_config import get_config
from tests.tiny_model import assert_close, random_params

CONFIG = get_config()
MODEL = AhaWam(ModelConfig.create(CONFIG.model))
PARAMS = random_params(MODEL.config)
ROWS = range(0, 21, 4)
PLANNED = (0, 8, 16)  # W = 2: the last remembers both others


def policy(model: AhaWam = MODEL, params: Any = PARAMS, **settings: Any) -> Policy:
    how = PolicyConfig(**{"steps": 2, "execute": 4, "refresh_every": 2, **settings})
    return Policy(model, params, CONFIG, STATISTICS, how)


@pytest.fixture(scope="module")
def tiny() -> Policy:
    return policy()


def episode(of: Policy, seed: int, objects: bool = False) -> Seen:
    rng = np.random.default_rng(seed)
    sizes = {"cam_high": (64, 64), "cam_left_wrist": (32, 32), "cam_right_wrist": (32, 32)}
    images = {name: rng.integers(0, 256, (len(ROWS), *size, 3), dtype=np.uint8) for name, size in sizes.items()}
    states = rng.normal(size=(len(ROWS), 5)).astype(np.float32)
    places = rng.normal(size=(len(ROWS), 1, 3)) if objects else None
    return seen(of, ROWS, images, states, "open the drawer", places)


def changed(name: str, value: float) -> Any:
    """The parameters with one array of every layer filled with a number."""

    def leaf(path: Any, x: np.ndarray) -> np.ndarray:
        return np.full_like(x, value) if name == "/".join(key.key for key in path) else x

    found = jax.tree_util.tree_map_with_path(leaf, PARAMS)
    assert any(x is not y for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(PARAMS), strict=True)), name
    return found


def last(of: Policy, shown: Seen) -> Plan:
    *_, plan = plans(of, shown, PLANNED)
    return plan


def test_weights_are_a_softmax_by_hand_and_give_what_the_model_computes() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 3, 4)).astype(np.float32) for n in (5, 6, 6))
    mask = np.arange(6) < np.array([4, 6])[:, None, None]  # [2, 1, 6]
    got = attention_weights(q, k, mask)
    powers = np.exp(np.einsum("bqnh,bknh->bnqk", q.astype(np.float64), k) / 2) * mask[:, None]
    assert_close(got, powers / powers.sum(-1, keepdims=True))
    with jax.default_matmul_precision("highest"):
        assert_close(jnp.einsum("bnqk,bknh->bqnh", got, v), attention(q, k, v, mask))


def test_maps_sum_to_one_and_are_the_routers_by_hand(tiny: Policy) -> None:
    """Every layer's map from its parameters, in float64."""
    shown = episode(tiny, 0)
    plan, now = last(tiny, shown), shown.at(20)
    found = look(tiny, plan.after, now)
    assert found.observation.shape == (2, 6, 4) and found.layers.shape == (2, 2, 2, 3, 2)
    np.testing.assert_allclose(found.observation.sum((1, 2)), 1, rtol=1e-5)
    np.testing.assert_allclose(found.layers.sum((3, 4)), 1, rtol=1e-5)

    queries = np.asarray(MODEL.apply(
        {"params": PARAMS}, now.latents[:, None], method=lambda model, x: model.observation_queries(x)
    ), np.float64)[0, 0]  # fmt: skip
    normed = (queries - queries.mean(-1, keepdims=True)) / np.sqrt(queries.var(-1, keepdims=True) + 1e-5)
    for layer, mapped in enumerate(found.layers):
        of = jax.tree.map(lambda x, i=layer: x[i].astype(np.float64), PARAMS["router"]["layers"])
        y = normed * of["query_norm"]["scale"] + of["query_norm"]["bias"]
        q = np.einsum("qx,xnh->qnh", y, of["query"]["kernel"]) + of["query"]["bias"]
        k = np.asarray(plan.after.context.k[layer, 0, 0], np.float64)
        scores = np.einsum("qnh,knh->qnk", q, k) / math.sqrt(12)
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        # float32 scores of up to 20 are off by some 1e-5, and so are relative weights.
        assert_close(mapped.reshape(2, 2, 6), powers / powers.sum(-1, keepdims=True), 1e-4)


def test_queries_without_a_direction_look_everywhere_alike() -> None:
    blind = policy(params=changed("observation_queries/encoder/base_queries", 0.0))
    shown = episode(blind, 0)
    np.testing.assert_allclose(look(blind, last(blind, shown).after, shown.at(20)).observation, 1 / 24, rtol=1e-5)


def test_layers_route_as_the_model_does(tiny: Policy) -> None:
    shown = episode(tiny, 0)
    context, now = last(tiny, shown).after.context, shown.at(20)
    want = MODEL.apply({"params": PARAMS}, context, now.latents[:, None], method="route")
    for i, layer in enumerate(layers(tiny, context, now)):
        assert_close((layer.routed.k, layer.routed.v), (want.k[i, 0, 0], want.v[i, 0, 0]))
    moved = movement(tiny, last(tiny, shown).after, now)
    change = np.asarray(want.v[:, 0, 0] - context.v[:, 0, 0]).reshape(2, -1)
    size = np.linalg.norm(np.asarray(context.v).reshape(2, -1), axis=1)
    assert_close(moved.norm[:, 1], np.linalg.norm(change, axis=1) / size)
    assert moved.where.shape == (2, 2, 3, 2) and (np.abs(moved.cosine) < 1).all()


def test_a_closed_gate_moves_nothing() -> None:
    closed = policy(params=changed("router/layers/gate", -200.0))
    shown = episode(closed, 0)
    moved = movement(closed, last(closed, shown).after, shown.at(20))
    assert (moved.gate == 0).all() and (moved.norm == 0).all() and (moved.where == 0).all()
    np.testing.assert_allclose(moved.cosine, 1, rtol=1e-12)


def test_a_policy_without_routing_or_memory_is_told_so() -> None:
    plain = policy(routing=False, memory=False)
    shown = episode(plain, 0)
    plan = last(plain, shown)
    with pytest.raises(ValueError, match="runs without routing"):
        look(plain, plan.after, shown.at(20))
    with pytest.raises(ValueError, match="forgets before every refresh"):
        memory_mass(plain, plan, shown.at(16))


def test_a_plan_is_fresh_at_age_0_and_old_later(tiny: Policy) -> None:
    shown, other = episode(tiny, 0), episode(tiny, 1)
    aged = ageing(tiny, shown, plans(tiny, shown, PLANNED), plans(tiny, other, PLANNED), (0, 4))
    assert aged.stale.shape == aged.routed.shape == aged.to_planned.shape == (3, 2, 2, 2)
    assert (aged.stale[:, 0] == 0).all() and (aged.routed[:, 0] == 0).all()
    assert (aged.stale[:, 1] > 0).all() and (aged.routed[:, 1] > 0).all() and (aged.other > 0).all()
    first, now = next(plans(tiny, shown, PLANNED)), shown.at(0)
    np.testing.assert_allclose(aged.to_planned[0, 0], movement(tiny, first.after, now).norm, rtol=1e-5)
    chunks = ageing_of_chunks(tiny, shown, plans(tiny, shown, PLANNED), (0, 4))
    assert (chunks.seeing[:, 0] == 0).all() and (chunks.blind[:, 0] == 0).all()
    assert (chunks.blind[:, 1] > 0).all() and (chunks.seeing[:, 1] > 0).all() and (chunks.noise > 0).all()


def test_plans_are_those_of_a_policy_that_runs(tiny: Policy) -> None:
    """And so is the chunk, but for its units."""
    shown = episode(tiny, 0)
    state = tiny.start([shown.instruction])
    made = list(plans(tiny, shown, PLANNED))
    assert period(tiny) == 8
    for row in (0, 4, 8, 12):
        if row in PLANNED:
            state = tiny.refresh(shown.at(row), state)
            np.testing.assert_array_equal(state.context.k, made[row // 8].after.context.k)
        actions, after = tiny.act(shown.at(row), state)
        units = STATISTICS["action"]["q99"] - STATISTICS["action"]["q01"]
        own = chunk(tiny, made[row // 8].after, shown.at(row), row, draw=state.calls)
        difference = own - own[:1]
        np.testing.assert_allclose(
            difference[:, 1], (actions[0] - actions[0, :1])[:, 1] * 2 / units[1], rtol=1e-4, atol=1e-5
        )
        state = after


def test_exchanging_an_episode_with_itself_changes_nothing(tiny: Policy) -> None:
    shown, other = episode(tiny, 0), episode(tiny, 1)
    same = probe(tiny, shown, shown, plans(tiny, shown, PLANNED), plans(tiny, shown, PLANNED), 4)
    assert same.shape == (3, len(PARTS), 4)
    assert (same[:, :-1] == 0).all() and (same[:, -1] > 0).all()
    swapped = probe(tiny, shown, other, plans(tiny, shown, PLANNED), plans(tiny, other, PLANNED), 4)
    differs = (swapped > 0).all(-1)
    assert not differs[0, PARTS.index("memory")], "the first plan remembers nothing that could be exchanged"
    differs[0, PARTS.index("memory")] = True
    assert differs.all()


def test_attention_is_shared_between_the_frames_that_are_remembered(tiny: Policy) -> None:
    shown = episode(tiny, 0)
    masses = [memory_mass(tiny, plan, shown.at(plan.row)) for plan in plans(tiny, shown, PLANNED)]
    assert masses[0].shape == (2, 2, 3)
    np.testing.assert_allclose(np.stack(masses).sum(-1), 1, rtol=1e-5)
    assert [(mass[0, 0] > 0).tolist() for mass in masses] == [[False, False, True], [False, True, True], [True] * 3]
    blind = policy(params=changed("planner/blocks/q_norm", 0.0))  # every frame is as good as another
    shown = episode(blind, 0)
    shares = [memory_mass(blind, plan, shown.at(plan.row)) for plan in plans(blind, shown, PLANNED)]
    np.testing.assert_allclose(shares[0], np.broadcast_to([0, 0, 1], (2, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(shares[1], np.broadcast_to([0, 0.5, 0.5], (2, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(shares[2], 1 / 3, rtol=1e-5)


def test_frames_stand_in_the_order_in_which_they_were_seen(tiny: Policy) -> None:
    """Before the third, fourth and fifth plan the ring has the two before it, the older one first."""
    made = list(plans(tiny, episode(tiny, 0), (0, 4, 8, 12, 16)))
    for number in (2, 3, 4):
        memory = made[number].before.memory
        order = slots(tiny.sizes, memory)
        assert sorted(order) == [0, 1, 2]
        for place, earlier in zip(order, made[number - 2 : number], strict=False):
            np.testing.assert_array_equal(memory.k[0][:, place], earlier.after.context.k[0][:, 0])


def test_the_anchor_is_the_oldest_frame() -> None:
    anchored = policy(model=AhaWam(dataclasses.replace(MODEL.config, memory_anchor=True)))
    shown = episode(anchored, 0)
    found = [slots(anchored.sizes, plan.before.memory) for plan in plans(anchored, shown, (0, 4, 8, 12, 16))]
    assert [order[-1] for order in found] == [0, 1, 2, 1, 2]  # where the frame goes
    assert [order[0] for order in found[2:]] == [0, 0, 0]


def test_ridge_finds_a_planted_map_and_nothing_in_noise() -> None:
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(120, 8)), rng.normal(size=(120, 3))
    episodes, held = np.arange(120) // 6, range(10, 20)
    y = x @ rng.normal(size=(8, 3)) + 2
    assert read_out(x, y, episodes, held) > 0.999999
    assert abs(read_out(x, noise, episodes, held)) < 0.1
    wide = rng.normal(size=(120, 200))  # more features than rows: whatever fits them does not hold
    assert abs(read_out(wide, noise, episodes, held)) < 0.1
    a = x - x.mean(0)
    scale = np.trace(a @ a.T) / 120
    primal = np.linalg.solve(a.T @ a + 0.3 * scale * np.eye(8), a.T @ (y - y.mean(0)))
    np.testing.assert_allclose(ridge(x, y, x, [1, 0.3])[1], a @ primal + y.mean(0), rtol=1e-9)
    with pytest.raises(ValueError, match="3 episodes to train on"):
        read_out(x, y, episodes, range(3, 20))


def test_read_outs_have_a_place_for_every_layer_and_age(tiny: Policy) -> None:
    shown = [episode(tiny, seed, objects=True) for seed in range(6)]
    read = features(tiny, [(one, plans(tiny, one, PLANNED)) for one in shown], (0, 4))
    assert read.objects.shape == (18, 2, 3) and read.state.shape == (18, 2, 5)
    context = last(tiny, shown[0]).after.context
    want = np.concatenate([np.ravel(context.k[1]), np.ravel(context.v[1])])
    np.testing.assert_array_equal(read.contexts["stale"][1][2, 0], want)
    np.testing.assert_array_equal(read.contexts["fresh"][1][:, 0], read.contexts["stale"][1][:, 0])
    some = features(tiny, [(shown[0], plans(tiny, shown[0], PLANNED))], (0,), chosen=(1,))
    np.testing.assert_array_equal(some.contexts["routed"][0], read.contexts["routed"][1][:3, :1])
    found = positions(read, (4, 5))
    assert {kind: x.shape for kind, x in found.contexts.items()} == dict.fromkeys(("stale", "routed", "fresh"), (2, 2))


def test_rows_that_were_not_taken_in_are_named(tiny: Policy) -> None:
    with pytest.raises(ValueError, match="Row 3 of the episode was not taken in, only 6 rows from 0 to 20"):
        episode(tiny, 0).at(3)


def test_errors_of_predictions() -> None:
    came = np.zeros((3, 2, 2, 3), np.uint8)
    came[1:] = np.array([10, 20])[:, None, None, None]
    error = prediction_error(np.minimum(came, 15), came)
    assert error.predicted.tolist() == [0, 5] and error.still.tolist() == [10, 20]
    with pytest.raises(ValueError, match="the clips have shapes"):
        prediction_error(came[:2], came)


def test_a_tower_of_stand_ins_gives_back_what_it_keeps() -> None:
    """Pictures of one colour, of which it keeps all: the first, and the mean of the four behind it."""
    levels = np.array([50, 100, 104, 108, 112])
    clip = np.broadcast_to(levels[:, None, None, None].astype(np.uint8), (5, 32, 32, 3))
    back = given_back(CONFIG, MODEL.config, clip)
    assert back.shape == (2, 32, 32, 3)
    assert np.abs(back[0].astype(int) - 50).max() <= 1 and np.abs(back[1].astype(int) - 106).max() <= 1


def test_simulated_rows_are_those_of_a_recording() -> None:
    if problem := check_rendering():
        pytest.skip(problem)
    config = get_config()
    config.model.update(action_dim=14, state_dim=14)
    model = AhaWam(ModelConfig.create(config.model))
    statistics = {kind: {"mean": np.zeros(14), "std": np.ones(14)} | HOW.of(kind, (), 14) for kind in STATISTICS}
    two_arms = Policy(model, random_params(model.config), config, statistics, PolicyConfig(steps=1, execute=4))
    shown = simulated(two_arms, "transfer_cube", 1000, (0, 9))
    env = AlohaSim("transfer_cube")
    env.reset(1000)
    first = env.objects()[:, :3]
    actions = plan(env) + disturbance(EPISODE_STEPS, 0.01, 1000)
    for action in actions[:9]:
        env.step(action)
    np.testing.assert_array_equal(shown.objects[0], first)
    np.testing.assert_array_equal(shown.at(9).robot_state[0], env.state())
    np.testing.assert_array_equal(shown.canvas[9], two_arms.canvas.compose(env.images()))
    with pytest.raises(ValueError, match="an episode has rows 0 to 154"):
        simulated(two_arms, "transfer_cube", 1000, (155,))
