"""What must hold of the whole model and its joint loss, with random parameters at a tiny size."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ahawam_jax.models.aha_wam import AhaWam, abstract_params, empty_memory
from ahawam_jax.models.dit import Block
from ahawam_jax.models.memory import PlannerContext
from ahawam_jax.models.planner import Head, History, unpatchify
from ahawam_jax.models.router import LayerRouter
from ahawam_jax.training.objective import Noise, ObjectiveConfig, joint_loss
from tests.tiny_model import (
    BATCH,
    CONFIG,
    FRAMES,
    HEIGHT,
    TOKENS,
    WIDTH,
    Batch,
    assert_close,
    differs,
    normal,
    random_batch,
    random_noise,
    random_params,
)

MODEL = AhaWam(CONFIG)
PARAMS = {"params": random_params()}


class Result(NamedTuple):
    loss: jax.Array
    parts: dict[str, jax.Array]
    gradient: Any


def forward(model: AhaWam) -> Any:
    """The function (batch, noise, params) -> (loss, parts)."""
    return lambda batch, noise, params=PARAMS["params"]: joint_loss(model, params, batch, noise, ObjectiveConfig())


def differentiated(model: AhaWam) -> Any:
    """The function (batch, noise) -> Result."""

    def run(batch: Batch, noise: Noise) -> Result:
        loss_fn = jax.value_and_grad(lambda params: forward(model)(batch, noise, params), has_aux=True)
        (loss, parts), gradient = loss_fn(PARAMS["params"])
        return Result(loss, parts, gradient)

    return run


def layer_of(tree: Any, layer: int) -> Any:
    return jax.tree.map(lambda x: x[layer], tree)


@pytest.fixture(scope="module")
def run() -> Any:
    """(batch, noise) -> Result, compiled once for all tests."""
    return jax.jit(differentiated(MODEL))


@pytest.fixture(scope="module")
def plain(run) -> Result:
    """The result for `random_batch` and `random_noise` as they come."""
    return run(random_batch(), random_noise())


def changed(batch: Batch, name: str, where: Any) -> Batch:
    """A copy of the batch with other numbers at batch[name][where]."""
    value = batch[name].copy()
    value[where] += normal(99, *value[where].shape)
    return batch | {name: value}


apply = jax.jit(lambda method, *args, **more: MODEL.apply(PARAMS, *args, **more, method=method), static_argnums=0)


def act(batch: Batch, **other: Any) -> jax.Array:
    """The executor alone, on a routed context that depends on nothing."""
    shape = (CONFIG.num_layers, BATCH, CONFIG.num_chunks, TOKENS, CONFIG.num_heads, CONFIG.head_dim)
    inputs = dict(
        actions=normal(20, BATCH, CONFIG.num_chunks, CONFIG.chunk, CONFIG.action_dim),
        times=np.array([[100.0, 900.0]] * BATCH, np.float32),
        positions=np.arange(CONFIG.horizon).reshape(CONFIG.num_chunks, CONFIG.chunk),
        text=batch["context"],
        text_mask=batch["context_mask"],
        states=normal(21, BATCH, CONFIG.num_chunks, CONFIG.state_dim),
        routed=PlannerContext(normal(22, *shape), normal(23, *shape)),
    )
    return apply("act", *(inputs | other).values())


# ---------------------------------------------------------------------------------------------- what may see what
def test_actions_do_not_see_the_future_video(run, plain: Result) -> None:
    batch, noise = random_batch(), random_noise()
    other = run(
        changed(batch, "input_latents", np.s_[:, :, 1:]),
        noise.replace(video=-noise.video, video_times=noise.video_times[::-1]),
    )
    assert differs(other.parts["pred_video"], plain.parts["pred_video"])
    assert_close(other.parts["pred_action"], plain.parts["pred_action"], 1e-6)
    now = run(changed(batch, "input_latents", np.s_[:, :, 0]), noise)
    assert differs(now.parts["pred_action"], plain.parts["pred_action"])


@pytest.mark.parametrize("name", ["action", "proprio", "obs_latents"])
def test_chunks_are_independent(run, plain: Result, name: str) -> None:
    batch = random_batch()
    if name == "obs_latents":
        other = changed(batch, name, np.s_[:, 1])
    else:
        other = batch
        for sample, offset in enumerate(batch["action_offset"]):
            other = changed(other, name, np.s_[sample, offset + CONFIG.chunk :])
    got, want = run(other, random_noise()).parts["pred_action"][0], plain.parts["pred_action"][0]
    assert_close(got[:, 0], want[:, 0], 1e-6)
    for sample in range(BATCH):
        assert differs(got[sample, 1], want[sample, 1])


def test_masked_text_is_never_read(run, plain: Result) -> None:
    batch = random_batch()
    assert_close(run(changed(batch, "context", ~batch["context_mask"]), random_noise()), plain, 1e-6)


def test_unmasked_text_reaches_both_experts(run, plain: Result) -> None:
    batch = random_batch()
    other = changed(batch, "context", np.s_[:, 2])
    assert differs(run(other, random_noise()).parts["pred_video"], plain.parts["pred_video"])
    assert differs(act(other), act(batch))
    hidden = changed(batch, "context", ~batch["context_mask"])
    assert_close(act(hidden), act(batch), 1e-6)


def test_a_chunk_reads_its_own_state_and_context_only() -> None:
    batch = random_batch()
    shape = (CONFIG.num_layers, BATCH, CONFIG.num_chunks, TOKENS, CONFIG.num_heads, CONFIG.head_dim)
    k, v = normal(22, *shape), normal(23, *shape)
    k[:, :, 1], v[:, :, 1] = k[:, :, 0], v[:, :, 0]
    for other in (act(batch, routed=PlannerContext(k, v)), act(batch, times=np.full((BATCH, 2), 100, np.float32))):
        assert_close(other[:, 0], act(batch)[:, 0], 1e-6)
        assert differs(other[:, 1], act(batch)[:, 1])


# -------------------------------------------------------------------------------------------------------- history
@pytest.mark.parametrize("change", ["contents", "order", "positions"])
def test_padded_history_is_never_read(run, plain: Result, change: str) -> None:
    valid_len = np.array([1, 3], np.int32)
    batch = random_batch() | {"video_history_valid_len": valid_len}
    before = run(batch, random_noise())
    assert differs(before.parts["pred_video"][0], plain.parts["pred_video"][0])
    if change == "contents":
        other = changed(batch, "history_latents", np.s_[0, :2])
    elif change == "order":
        latents = batch["history_latents"].copy()
        latents[0, :2] = latents[0, 1::-1]
        other = batch | {"history_latents": latents}
    else:
        other = batch | {"video_history_frame_indices": np.array([[7, 9, 2], [0, 2, 4]], np.int32)}
    assert_close(run(other, random_noise()), before, 1e-6)


def test_empty_history_equals_no_history(run, plain: Result) -> None:
    batch = random_batch()
    empty = run(batch | {"video_history_valid_len": np.zeros(BATCH, np.int32)}, random_noise())
    names = ("history_latents", "video_history_valid_len", "video_history_frame_indices")
    none = jax.jit(forward(MODEL))({name: x for name, x in batch.items() if name not in names}, random_noise())
    assert_close((empty.loss, empty.parts), none)
    assert differs(empty.loss, plain.loss)


def test_refreshes_equal_one_causal_pass() -> None:
    """The memory of W frames makes W + 1 refreshes equal one frame-causal pass; the next one has forgotten."""
    batch, count = random_batch(), CONFIG.memory_frames + 2
    text, text_mask = batch["context"], batch["context_mask"]
    latents = normal(30, BATCH, CONFIG.latent_channels, count, HEIGHT, WIDTH)
    positions = np.array([[0, 1, 3, 6, 10], [5, 7, 8, 9, 20]], np.int32)
    memory, contexts = empty_memory(CONFIG, BATCH, TOKENS), []
    for i in range(count):
        context, memory = apply("refresh", latents[:, :, i : i + 1], positions[:, i], text, text_mask, memory)
        contexts.append(context)

    planned = apply("plan", latents, np.zeros((BATCH, count), np.float32), positions, text, text_mask)
    for i in range(CONFIG.memory_frames + 1):
        for layer in range(CONFIG.num_layers):
            assert_close(layer_of(contexts[i], layer), layer_of(planned.context.frame(i), layer))
    assert differs(contexts[-1].k[-1], planned.context.frame(count - 1).k[-1])

    past, valid = slice(0, CONFIG.memory_frames), np.ones((BATCH, CONFIG.memory_frames), bool)
    clip = latents[:, :, CONFIG.memory_frames :], np.array([[0.0, 300]] * BATCH), positions[:, CONFIG.memory_frames :]
    history = History(latents[:, :, past], positions[:, past], valid)
    beside = apply("plan", *clip, text, text_mask, history=history)
    assert_close(beside.context.frame(0), contexts[CONFIG.memory_frames])


# -------------------------------------------------------------------------------------------------------- padding
def test_fully_padded_batch_gives_zero_loss(run) -> None:
    batch = random_batch()
    padded = {name: np.ones_like(batch[name]) for name in ("image_is_pad", "action_is_pad")}
    result = run(batch | padded, random_noise())
    assert result.loss == 0
    for leaf in jax.tree.leaves(result.gradient):
        np.testing.assert_array_equal(leaf, 0.0)


def test_fully_padded_sample_adds_nothing(run, plain: Result) -> None:
    batch, losses = random_batch(), []
    for sample in range(BATCH):
        padded = {name: batch[name].copy() for name in ("image_is_pad", "action_is_pad")}
        for mask in padded.values():
            mask[sample] = True
        losses.append(run(batch | padded, random_noise()).loss)
    assert_close(sum(losses), plain.loss, 1e-5)


@pytest.mark.parametrize(("padded", "kept"), [((0, 1, 2, 3), (0, 1)), ((0, 1, 2, 3, 4), (1,)), ((5, 6, 7, 8), (0,))])
def test_latent_frame_is_padded_if_all_its_images_are(run, padded: tuple[int, ...], kept: tuple[int, ...]) -> None:
    batch, noise = random_batch(), random_noise()
    batch["image_is_pad"][0, list(padded)] = True
    parts = run(batch, noise).parts
    error = np.square(parts["pred_video"] - (noise.video - batch["input_latents"])).mean((1, 3, 4))[:, 1:]
    want = [error[0, list(kept)].mean(), error[1].mean()]
    assert_close(parts["loss_video_per_sample_unweighted"], np.array(want), 1e-5)


def test_padded_actions_do_not_count(run) -> None:
    batch = random_batch()
    batch["action_is_pad"][:, 3:] = True
    parts, noise = run(batch, random_noise()).parts, random_noise()
    error = np.square(parts["pred_action"][0] - velocity_targets(batch, noise)).mean(-1)
    weighted = (error * bell(noise.action_times[0])[..., None]).reshape(BATCH, -1)
    want = (weighted[0, :3].mean() + weighted[1, :2].mean()) / 2  # the second sample's horizon begins at row 1
    assert_close(parts["loss_action"], want, 1e-5)


def velocity_targets(batch: Batch, noise: Noise) -> np.ndarray:
    rows = [batch["action"][b, at : at + CONFIG.horizon] for b, at in enumerate(batch["action_offset"])]
    return noise.action[0] - np.stack(rows).reshape(noise.action[0].shape)


def bell(times: np.ndarray, shift: float = 5.0) -> np.ndarray:
    """The release's loss weight in float64."""
    u = np.linspace(1, 0, 1001)[:-1]
    heights = np.exp(-2 * (shift * u / (1 + (shift - 1) * u) - 0.5) ** 2)
    return (np.exp(-2 * (times / 1000 - 0.5) ** 2) - heights.min()) / (heights - heights.min()).mean()


# -------------------------------------------------------------------------------------- other ways to compute it
def block(dim: int, ffn_dim: int, across_groups: bool) -> Block:
    return Block(
        dim=dim, ffn_dim=ffn_dim, num_heads=CONFIG.num_heads, head_dim=CONFIG.head_dim, eps=CONFIG.norm_eps,
        dtype=jnp.float32, fused=False, across_groups=across_groups,
    )  # fmt: skip


@pytest.fixture(scope="module")
def captured() -> dict[str, Any]:
    run = jax.jit(lambda b, n: joint_loss(MODEL, PARAMS["params"], b, n, ObjectiveConfig(), capture=True)[1])
    return run(random_batch(), random_noise())


def test_scanned_planner_equals_its_layers_in_a_row(captured: dict[str, Any]) -> None:
    params, seen = PARAMS["params"]["planner"], captured["intermediates"]["plan"]["planner"]
    (before, x), (condition_before, condition) = seen["tokens"], seen["condition"]
    context = captured["planned"].context
    one = jax.jit(block(CONFIG.planner_dim, CONFIG.planner_ffn_dim, True).apply)
    for layer in range(CONFIG.num_layers):
        weights = layer_of(params["blocks"], layer)
        before, remembered, _ = one({"params": weights}, before, None, condition_before)
        prefix = tuple(y.reshape(BATCH, -1, *y.shape[3:]) for y in remembered)
        x, (k, v), _ = one({"params": weights}, x, prefix, condition)
        assert_close((k[:, :1], v[:, :1]), (context.k[layer], context.v[layer]))  # of the current frame alone
    head = Head(4 * CONFIG.latent_channels, CONFIG.norm_eps)
    patches = head.apply({"params": params["head"]}, x, seen["time"][1])
    assert patches.shape[:2] == (BATCH, FRAMES)
    assert_close(unpatchify(patches, HEIGHT, WIDTH), captured["planned"].velocity)


def test_scanned_executor_equals_its_layers_in_a_row(captured: dict[str, Any]) -> None:
    params = PARAMS["params"]["executor"]
    seen = captured["intermediates"]["act"]["executor"]
    x, condition = seen["tokens"][0] + PARAMS["params"]["branch_embedding"][1], seen["condition"][0]
    one = jax.jit(block(CONFIG.executor_dim, CONFIG.executor_ffn_dim, False).apply)
    for layer in range(CONFIG.num_layers):
        weights = layer_of(params["blocks"], layer)
        prefix = (captured["routed"].k[layer], captured["routed"].v[layer])
        x, *_ = one({"params": weights}, x, prefix, condition)
    out = x @ params["head"]["kernel"] + params["head"]["bias"]
    assert_close(out, captured["pred_action"][0])


def test_router_equals_its_layers_one_by_one(captured: dict[str, Any]) -> None:
    queries = captured["intermediates"]["route"]["observation_queries"]["encoder"]["queries"][0]
    frame, routed = captured["planned"].context.frame(0), captured["routed"]
    one = jax.jit(LayerRouter(CONFIG).apply)
    for layer in range(CONFIG.num_layers):
        weights = layer_of(PARAMS["params"]["router"]["layers"], layer)
        k, v = one({"params": weights}, queries, frame.k[layer, :, 0], frame.v[layer, :, 0])
        assert_close((k, v), (routed.k[layer], routed.v[layer]))


@pytest.mark.parametrize("gate", [-4.0, 0.0])
def test_gates_begin_where_the_config_says(gate: float) -> None:
    config = dataclasses.replace(CONFIG, initial_gate=gate)
    queries, kv = normal(0, 1, 1, 2, config.text_dim), normal(1, 1, 3, config.num_heads, config.head_dim)
    params = LayerRouter(config).init(jax.random.key(0), queries, kv, kv)["params"]
    assert params["gate"] == gate


def test_scanned_router_equals_all_layers_at_once() -> None:
    shape = (CONFIG.num_layers, BATCH, 1, TOKENS, CONFIG.num_heads, CONFIG.head_dim)
    context = PlannerContext(normal(24, *shape), normal(25, *shape))

    def loss(params: Any, scanned: bool) -> tuple[jax.Array, PlannerContext]:
        latents = random_batch()["obs_latents"]
        routed = MODEL.apply({"params": params}, context, latents, scanned=scanned, method="route")
        return sum(jnp.sin(x).sum() for x in jax.tree.leaves(routed)), routed

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    assert_close(run(PARAMS["params"], True), run(PARAMS["params"], False), 2e-6)  # some roundings of 2^-24


def test_training_scans_the_router_and_keeps_one_frame() -> None:
    """No array of all layers holds the router's hidden tokens, or keys of more than the current frame."""
    model, heads = AhaWam(dataclasses.replace(CONFIG, num_layers=5, remat="full")), (CONFIG.num_heads, CONFIG.head_dim)
    batch = {name: x for name, x in random_batch().items() if "history" not in name}
    inputs = nn.unbox(abstract_params(model.config)), batch, random_noise()
    program = str(jax.make_jaxpr(jax.grad(lambda *args: joint_loss(model, *args, ObjectiveConfig())[0]))(*inputs))

    def stacked(*shape: int) -> bool:
        return f"f32[{','.join(map(str, (5, BATCH, *shape)))}]" in program

    assert stacked(1, TOKENS, *heads) and stacked(CONFIG.num_chunks, TOKENS, *heads)
    assert not stacked(FRAMES, TOKENS, *heads)
    assert not stacked(CONFIG.num_chunks, TOKENS, CONFIG.num_heads * CONFIG.head_dim)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing(plain: Result, remat: str) -> None:
    model = AhaWam(dataclasses.replace(CONFIG, remat=remat))
    batch, noise = random_batch(), random_noise()
    assert "remat" in str(jax.make_jaxpr(forward(model))(batch, noise))
    assert_close(jax.jit(differentiated(model))(batch, noise), plain)


def test_bfloat16_stays_close_and_keeps_parameters_float32(plain: Result) -> None:
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(nn.unbox(abstract_params(config)))} == {jnp.dtype("float32")}
    model, batch, noise = AhaWam(config), random_batch(), random_noise()
    abstract = jax.eval_shape(differentiated(model), batch, noise)
    assert {x.dtype for x in jax.tree.leaves(abstract) if x.dtype != bool} == {jnp.dtype("float32")}
    loss, parts = jax.jit(forward(model))(batch, noise)
    assert differs(parts["pred_video"], plain.parts["pred_video"])  # it is really used
    assert_close((loss, parts), (plain.loss, plain.parts), 3e-2)
