"""The PyTorch twin against JAX, module by module and over a whole episode, and against the reference fixtures."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ahawam_jax import flow_matching
from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.aha_wam import empty_memory as empty_jax_memory
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.models.memory import PlannerContext
from ahawam_jax.sampling import denoise
from ahawam_jax.verification.fixtures import Suite
from ahawam_jax.verification.model_checks import model_config
from ahawam_jax.weights.files import open_weights
from ahawam_jax.weights.release import release_shapes, to_release
from ahawam_jax.weights.tensors import WeightsError
from export.twin.layers import DTYPES
from export.twin.model import Twin, empty_memory, from_release, release_state_dict, remember
from tests.tiny_model import BATCH, HEIGHT, TEXT, TOKENS, WIDTH, assert_close, differs, normal, random_params
from tests.tiny_model import CONFIG as TINY

# Float32 on both sides: sums run in another order, about 1e2 roundings of 6e-8 in each of the few blocks.
TOLERANCE = 2e-5
LOOP_TOLERANCE = 5e-5  # ten executor passes, each fed with the one before
STEPS, SHIFT = 10, 5.0
CONFIG = dataclasses.replace(TINY, num_layers=3)  # a first, a middle and a last block
PARAMS = random_params(CONFIG)
RELEASE = to_release(PARAMS)
MASK = np.arange(TEXT) < np.array([[3], [4]])
STARTS = (0, CONFIG.chunk)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


def twin_of(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32, release: Any = RELEASE) -> Twin:
    return from_release(release, config, (HEIGHT, WIDTH), STEPS, SHIFT, dtype)


def tensors(*arrays: Any) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(x)) for x in arrays]


def arrays(*values: torch.Tensor) -> list[np.ndarray]:
    return [x.float().numpy() for x in values]


def jax_model(config: ModelConfig, method: str) -> Any:
    return jax.jit(lambda *inputs: AhaWam(config).apply({"params": PARAMS}, *inputs, method=method))


TEXT_TOKENS = normal(1, BATCH, TEXT, CONFIG.text_dim)
CONTEXT = (normal(2, CONFIG.num_layers, BATCH, TOKENS, CONFIG.num_heads, CONFIG.head_dim),
           normal(3, CONFIG.num_layers, BATCH, TOKENS, CONFIG.num_heads, CONFIG.head_dim))  # fmt: skip


# -------------------------------------------------------------------------------------------------------- modules
@pytest.mark.parametrize("anchor", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planner_refreshes_like_jax(dtype: str, anchor: bool) -> None:
    """Seven refreshes: the memory of three fills, overflows and, a ring here, no longer lies in order of time."""
    config = dataclasses.replace(CONFIG, dtype=dtype, memory_anchor=anchor)
    planner = twin_of(config, DTYPES[dtype]).planner
    refresh = jax_model(config, "refresh")
    memory, buffers = empty_jax_memory(config, BATCH, TOKENS), empty_memory(config, BATCH, TOKENS, DTYPES[dtype])
    text, mask = tensors(TEXT_TOKENS, MASK)
    text_k, text_v = planner.text(text)
    for i in range(CONFIG.memory_frames + 4):
        latents = normal(10 + i, BATCH, CONFIG.latent_channels, 1, HEIGHT, WIDTH)
        frames = np.array([7 * i, 700 + 5 * i])
        want, memory = refresh(latents, jnp.asarray(frames), TEXT_TOKENS, MASK, memory)
        x = torch.from_numpy(latents[:, :, 0])
        k, v = planner(x, *planner.rotary(frames), text_k, text_v, mask, *buffers)
        assert k.dtype == v.dtype == DTYPES[dtype]
        remember(*buffers, k, v, i, anchor)
        check(dtype, arrays(k, v), [want.k[:, :, 0], want.v[:, :, 0]])


@pytest.mark.parametrize("slots", [1, 2, 3, 6])
@pytest.mark.parametrize("anchor", [False, True])
def test_the_ring_holds_what_a_list_would(anchor: bool, slots: int) -> None:
    config = dataclasses.replace(CONFIG, memory_frames=slots)
    memory_k, memory_v, valid = empty_memory(config, BATCH, TOKENS, torch.float32)
    frame, seen = torch.ones(memory_k[:, :, 0].shape), []
    for number in range(20):
        remember(memory_k, memory_v, valid, frame * number, frame * -number, number, anchor)
        seen.append(number)
        while len(seen) > slots:
            del seen[1 if anchor else 0]
        assert valid.sum(1).tolist() == [len(seen)] * BATCH
        held = memory_k[:, valid]  # [L, B * frames, S, N, H]
        assert sorted(held[0, : len(seen), 0, 0, 0].tolist()) == seen
        np.testing.assert_array_equal(held, held[:1, :, :1, :1, :1].expand(held.shape))
        np.testing.assert_array_equal(memory_v, -memory_k)


def check(dtype: str, got: list[np.ndarray], want: list[Any], tolerance: float = TOLERANCE) -> None:
    """float32: within the tolerance. bfloat16: the same direction, and no further off than bfloat16 itself is."""
    want = [np.asarray(x, np.float32) for x in want]
    if dtype == "float32":
        assert_close(got, want, tolerance)
        return
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        # Two bfloat16 computations, each with roundings of 2^-9 per operation: 1 - cos is about their square.
        assert np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) > 0.9995


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_router_routes_like_jax(dtype: str) -> None:
    config = dataclasses.replace(CONFIG, dtype=dtype)
    latents = normal(4, BATCH, CONFIG.latent_channels, HEIGHT, WIDTH)
    context = PlannerContext(*(jnp.asarray(x[:, :, None], dtype) for x in CONTEXT))
    want = jax_model(config, "route")(context, latents[:, None, :, None])
    got = twin_of(config, DTYPES[dtype]).router(*tensors(latents), *(x.to(DTYPES[dtype]) for x in tensors(*CONTEXT)))
    check(dtype, arrays(*got), [want.k[:, :, 0], want.v[:, :, 0]])
    assert all(differs(a, b) for a, b in zip(arrays(*got), CONTEXT, strict=True))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("prediction", ["velocity", "sample"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_executor_acts_like_jax(dtype: str, prediction: str, start: int) -> None:
    config = dataclasses.replace(CONFIG, dtype=dtype, prediction=prediction)
    noise, state = normal(5, BATCH, CONFIG.chunk, CONFIG.action_dim), normal(6, BATCH, CONFIG.state_dim)
    routed = PlannerContext(*(jnp.asarray(x[:, :, None], dtype) for x in CONTEXT))
    positions = start + np.arange(CONFIG.chunk)[None]
    want = jax.jit(lambda params, x: denoise(
        AhaWam(config), params, x, positions, TEXT_TOKENS, MASK, state[:, None], routed, STEPS, SHIFT
    ))(PARAMS, noise[:, None])[:, 0]  # fmt: skip
    executor = twin_of(config, DTYPES[dtype]).executor
    text, mask, noise_t, state_t = tensors(TEXT_TOKENS, MASK, noise, state)
    routed_t = (x.to(DTYPES[dtype]) for x in tensors(*CONTEXT))
    got = executor(
        noise_t, *executor.rotary(start), *executor.text(text), mask, *executor.state(state_t), *routed_t
    )
    assert got.dtype == torch.float32
    check(dtype, arrays(got), [want], LOOP_TOLERANCE)


def test_one_step_is_one_euler_step() -> None:
    one = from_release(RELEASE, CONFIG, (HEIGHT, WIDTH), 1, SHIFT).executor
    assert one.rows.shape == (1, CONFIG.num_layers, 6, CONFIG.executor_dim) and one.schedule == ((1.0, -1.0),)
    text, mask, noise, state, k, v = tensors(
        TEXT_TOKENS, MASK, normal(5, BATCH, CONFIG.chunk, CONFIG.action_dim), normal(6, BATCH, CONFIG.state_dim),
        *CONTEXT,
    )  # fmt: skip
    text_kv, state_kv, rotary = one.text(text), one.state(state), one.rotary(0)
    cross = [torch.cat(pair, 2) for pair in zip(text_kv, state_kv, strict=True)]
    cross_mask = torch.cat([mask, torch.ones(BATCH, 1, dtype=torch.bool)], 1)[:, None, None]
    velocity = one.predict(noise, one.rows[0], *rotary, *cross, cross_mask, k, v)
    assert_close(arrays(one(noise, *rotary, *text_kv, mask, *state_kv, k, v)), arrays(noise - velocity), 1e-6)


# ------------------------------------------------------------------------------------------------------- precision
def test_weights_have_the_promised_dtypes() -> None:
    """Products in bfloat16; norms, gates, modulation, rotary tables and the last projection in float32."""
    twin = twin_of(dtype=torch.bfloat16)
    single = ("norm", "rows", "space_", "gate", "head.")
    for module in (twin.planner, twin.router, twin.executor):
        for name, x in (*module.named_parameters(), *module.named_buffers()):
            assert not x.requires_grad
            assert x.dtype == (torch.float32 if any(part in name for part in single) else torch.bfloat16), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.float64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(WeightsError, match=rf"cannot be built in {dtype}.*float32 or bfloat16"):
        twin_of(dtype=dtype)


# --------------------------------------------------------------------------------------------------------- release
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_release_comes_back_bit_for_bit(stored: str, held: str) -> None:
    """Every name once, in the release's order; a float32 source needs a float32 twin."""
    release = {name: torch.from_numpy(x).to(DTYPES[stored]) for name, x in RELEASE.items()}
    twin = twin_of(dtype=DTYPES[held], release=release)
    again = release_state_dict(twin)
    assert list(again) == list(release_shapes(CONFIG))
    changed = [name for name, x in release.items() if not torch.equal(again[name], x)]
    assert all(again[name].dtype == x.dtype for name, x in release.items())
    assert bool(changed) == (stored == "float32" and held == "bfloat16")
    views = [name for name, _ in twin.views()]
    assert len(views) == len(set(views)) and set(views) < set(release)


def test_released_file_comes_back_bit_for_bit(shared_dir: Path) -> None:
    suite = Suite(shared_dir / "reference")
    source = open_weights(suite.folder / "tiny_checkpoint.pt").tensors
    payload = torch.load(suite.folder / "tiny_checkpoint.pt", weights_only=True)
    again = release_state_dict(from_release(source, model_config(suite), (4, 6), 1, SHIFT))
    assert set(again) == set(source)
    for name, x in again.items():
        section, _, rest = name.partition("/")
        assert torch.equal(x, payload[section][rest]), name


def test_what_does_not_fit_is_one_error() -> None:
    broken = {name: x for name, x in RELEASE.items() if not name.endswith("blocks.1.ffn.0.bias")}
    broken |= {"mot/extra": np.zeros(3, np.float32), "proprio_encoder/bias": np.zeros(2, np.float32)}
    with pytest.raises(WeightsError, match="4 tensors do not fit") as error:
        twin_of(release=broken)
    text = str(error.value)
    assert "missing: mot/mixtures.video.blocks.1.ffn.0.bias" in text and "surplus: mot/extra [3]" in text
    assert "misshapen: proprio_encoder/bias is [2], expected [10]" in text


@pytest.mark.parametrize("name", [
    "mot/mixtures.video.blocks.1.ffn.0.weight", "mot/mixtures.action.time_projection.1.weight",
    "mot/chunk_kv_cache_editor.layer_delta_proj.2.3.bias",
])  # fmt: skip
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(name: str, value: float) -> None:
    bad = RELEASE[name].copy()
    bad.flat[1] = value
    with pytest.raises(WeightsError, match=r"(mixtures.video.blocks.1.ffn.0.weight|mixtures.action.time_embedding"
                                           r"|layer_delta_proj.2.3.bias).* holds NaN or infinity"):  # fmt: skip
        twin_of(release=RELEASE | {name: bad})


def test_a_tensor_of_another_dtype_is_refused() -> None:
    name = "mot/mixtures.video.blocks.0.self_attn.q.weight"
    with pytest.raises(WeightsError, match="stores a tensor .* as float16; .*float32 or bfloat16"):
        twin_of(release=RELEASE | {name: RELEASE[name].astype(np.float16)})


# -------------------------------------------------------------------------------------------------------- fixtures
def test_reference_inference(shared_dir: Path) -> None:
    """Planner prefills, then chunks, as the released implementation computed them."""
    suite = Suite(shared_dir / "reference")
    config, stored = model_config(suite), load_file(suite.folder / "c_inference.safetensors")
    f = {name: torch.from_numpy(x) for name, x in stored.items()}
    grid = tuple(f["in.prefill0.latent"].shape[-2:])
    twin = from_release(suite.weights(), config, grid, len(stored["timesteps"]), suite.config["flow"]["shift"])
    levels = flow_matching.noise_levels(len(stored["timesteps"]), suite.config["flow"]["shift"])
    np.testing.assert_allclose(stored["timesteps"], 1000 * levels[:-1], rtol=1e-6)
    text, mask = f["in.context"], f["in.context_mask"].bool()
    planner, router, executor = twin.planner, twin.router, twin.executor
    planner_text, executor_text = planner.text(text), executor.text(text)
    buffers = empty_memory(config, 1, grid[0] * grid[1] // 4, torch.float32)
    refreshes = sum(name.startswith("in.prefill") for name in f)
    assert refreshes > config.memory_frames + 1  # the ring has wrapped
    for i in range(refreshes):
        frame = np.array([i * f["in.start_latents"].shape[1] // config.video_ratio])
        context = planner(f[f"in.prefill{i}.latent"][:, :, 0], *planner.rotary(frame), *planner_text, mask, *buffers)
        remember(*buffers, *context, i, config.memory_anchor)
        for layer in range(config.num_layers):
            for name, x in zip("kv", context, strict=True):
                assert_close(arrays(x[layer].flatten(-2)), arrays(f[f"out.prefill{i}.layer{layer}.{name}"]), TOLERANCE)
    for i in range(2):
        observation, start = f[f"in.chunk{i}.obs_latent"][:, :, 0], i * config.chunk
        queries = router.queries(observation)
        assert_close(arrays(queries), arrays(f[f"out.chunk{i}.chunk_queries"][:, 0]), TOLERANCE)
        routed = router(observation, *context)
        for layer in range(config.num_layers):
            for name, x in zip("kv", routed, strict=True):
                assert_close(arrays(x[layer].flatten(-2)), arrays(f[f"out.chunk{i}.layer{layer}.{name}"]), TOLERANCE)
        noise = f["in.start_latents"][:, start : start + config.chunk]
        state = executor.state(f[f"in.chunk{i}.proprio"])
        actions = executor(noise, *executor.rotary(start), *executor_text, mask, *state, *routed)
        assert_close(arrays(actions[0]), arrays(f[f"out.chunk{i}.action"]), LOOP_TOLERANCE)


# --------------------------------------------------------------------------------------------------------- export
def test_every_graph_exports_and_computes_the_same() -> None:
    """torch.export, with attention spelled out, gives the eager values."""
    twin = twin_of()
    text, mask, k, v, latents, noise, state = tensors(
        TEXT_TOKENS, MASK, *CONTEXT, normal(4, BATCH, CONFIG.latent_channels, HEIGHT, WIDTH),
        normal(5, BATCH, CONFIG.chunk, CONFIG.action_dim), normal(6, BATCH, CONFIG.state_dim),
    )  # fmt: skip
    planner, executor = twin.planner, twin.executor
    memory_k, memory_v, valid = empty_memory(CONFIG, BATCH, TOKENS, torch.float32)
    remember(memory_k, memory_v, valid, k, v, 1, anchor=False)
    calls = {
        planner: (latents, *planner.rotary(np.array([3, 800])), *planner.text(text), mask, memory_k, memory_v, valid),
        twin.router: (latents, k, v),
        executor: (noise, *executor.rotary(0), *executor.text(text), mask, *executor.state(state), k, v),
    }
    for module, inputs in calls.items():
        program = torch.export.export(module, inputs)
        assert "scaled_dot_product_attention" not in str(program.graph)
        want = module(*inputs)
        got = program.module()(*inputs)
        pair = ([got], [want]) if isinstance(want, torch.Tensor) else (got, want)
        assert_close(*(arrays(*x) for x in pair), TOLERANCE)
        text_of = json.dumps([str(node.target) for node in program.graph.nodes])
        assert "complex" not in text_of and "view_as" not in text_of
