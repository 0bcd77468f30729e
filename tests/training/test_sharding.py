"""Eight virtual devices against one: the same step, and checkpoints that move between them."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahawam_jax.models.aha_wam import AhaWam, abstract_params
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.models.towers import BlockTransform
from ahawam_jax.training import sharding
from ahawam_jax.training.checkpoints import CheckpointError, Checkpoints
from ahawam_jax.training.loop import initial_state
from ahawam_jax.training.objective import ObjectiveConfig
from ahawam_jax.training.optimizer import OptimizerConfig, make_optimizer
from ahawam_jax.training.step import TrainState, make_train_step
from tests.tiny_config import get_config

MODEL = ModelConfig.create(get_config().model)
OPTIMIZER = OptimizerConfig(**(get_config().optimizer.to_dict() | {"learning_rate": 1e-2, "warmup_steps": 0}))


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    sizes = dict(data=data, fsdp=fsdp, tensor=tensor)
    return sharding.make_mesh(sizes, jax.devices()[: data * fsdp * tensor])


def loader_batch(size: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    canvas = (96, 64, 3)
    return {
        "video": rng.integers(0, 256, (size, 9, *canvas), dtype=np.uint8),
        "image_is_pad": np.zeros((size, 9), bool),
        "observations": rng.integers(0, 256, (size, 2, *canvas), dtype=np.uint8),
        "history": rng.integers(0, 256, (size, 2, *canvas), dtype=np.uint8),
        "video_history_valid_len": rng.integers(0, 3, size, dtype=np.int32),
        "video_history_frame_indices": np.tile(np.arange(2, dtype=np.int32), (size, 1)),
        "video_temporal_position_ids": np.tile(8 + 4 * np.arange(3, dtype=np.int32), (size, 1)),
        "action": rng.normal(size=(size, 8, 3)).astype(np.float32),
        "action_is_pad": np.arange(8)[None] >= rng.integers(1, 9, size)[:, None],
        "proprio": rng.normal(size=(size, 8, 5)).astype(np.float32),
        "action_offset": np.zeros(size, np.int32),
        "instruction": np.zeros(size, np.int32),
    }


def run(mesh: jax.sharding.Mesh, folder: Path, steps: int, accumulate: int = 1) -> tuple[TrainState, dict, Any]:
    """Trains `steps` steps from the folder's newest checkpoint or from scratch."""
    model, optimizer = AhaWam(MODEL), OptimizerConfig(**{**vars(OPTIMIZER), "accumulate": accumulate})
    tx = make_optimizer(optimizer, 10)
    checkpoints = Checkpoints(folder)
    state, layout = initial_state(model, tx, jax.random.key(0), True, mesh, checkpoints)
    checkpoints.close()
    step = jax.jit(
        make_train_step(model, BlockTransform(), tx, ObjectiveConfig(), optimizer),
        out_shardings=(layout, sharding.replicated(mesh)),
    )
    text = np.random.default_rng(1).normal(size=(1, 4, MODEL.text_dim)).astype(np.float32)
    metrics = {}
    with sharding.activation_rules(mesh), jax.default_matmul_precision("highest"):
        batch = sharding.put_batch(loader_batch(), mesh)
        for _ in range(steps):
            state, metrics = step(state, batch, text, np.ones((1, 4), bool), jax.random.key(7))
    return state, jax.device_get(metrics), layout


def worst_difference(a: Any, b: Any) -> float:
    """Largest |a - b| over the largest |b|, over all leaves of two trees."""
    pairs = zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True)
    return max(float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-6)) for x, y in pairs)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, dict]:
    return run(mesh_of(1, 1, 1), tmp_path_factory.mktemp("one"), 1)[:2]


def test_parameters_are_spread_over_fsdp_and_tensor() -> None:
    mesh = mesh_of(2, 2, 2)
    layout = sharding.shardings(abstract_params(MODEL), mesh)
    q = layout["planner"]["blocks"]["q"]["kernel"]  # [L, D, N, H]
    assert q.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor", None)
    kernels = [s.spec for path, s in jax.tree_util.tree_leaves_with_path(layout) if "blocks" in str(path)
               and "kernel" in str(path)]  # fmt: skip
    assert all("fsdp" in spec and "tensor" in spec for spec in kernels)


def test_eight_devices_compute_what_one_does(one_device: tuple[TrainState, dict], tmp_path: Path) -> None:
    state, metrics, _ = run(mesh_of(2, 2, 2), tmp_path, 1)
    expected, expected_metrics = one_device
    for name in ("loss", "loss_video", "loss_action", "gradient_norm"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-5)
    # Adam's first update is learning_rate * sign(gradient), so a gradient that is only rounding noise (the biases of
    # softmax keys, whose exact gradient is 0) may differ in sign; the averages of the gradient do not have that.
    assert worst_difference(state.opt_state[1][0].mu, expected.opt_state[1][0].mu) < 1e-5
    differing = [
        jax.tree_util.keystr(path)
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(expected.params), strict=True
        )
        if np.abs(jax.device_get(x) - jax.device_get(y)).max() > 1e-5
    ]
    assert all("bias" in name and "'k'" in name or "key" in name for name in differing), differing


def test_accumulated_microbatches_give_the_mean_gradient(tmp_path: Path) -> None:
    """With everything random fixed per microbatch, four of them differ from one batch, but not between meshes."""
    one, metrics_one, _ = run(mesh_of(1, 1, 1), tmp_path / "a", 1, accumulate=4)
    two, metrics_two, _ = run(mesh_of(2, 1, 1), tmp_path / "b", 1, accumulate=4)
    assert metrics_one["loss"] == pytest.approx(metrics_two["loss"], rel=1e-5)
    assert worst_difference(one.opt_state[1][0].mu, two.opt_state[1][0].mu) < 1e-5


def test_checkpoint_of_eight_restores_on_one_and_four(tmp_path: Path) -> None:
    state, _, _ = run(mesh_of(2, 2, 2), tmp_path, 2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {"config": {}})
    checkpoints.close()
    for mesh in (mesh_of(1, 1, 1), mesh_of(1, 2, 2)):
        restored, _, layout = run(mesh, tmp_path, 0)
        assert int(restored.step) == 2
        assert all(x.sharding == s for x, s in zip(jax.tree.leaves(restored), jax.tree.leaves(layout), strict=True))
        assert worst_difference(restored, state) == 0.0


def test_checkpoint_that_lacks_or_misshapes_arrays(tmp_path: Path) -> None:
    state, _, _ = run(mesh_of(1, 1, 1), tmp_path, 0)
    params = dict(state.params)
    del params["router"]
    params["state_encoder"] = {"kernel": jnp.zeros((5, 3)), "bias": jnp.zeros(3)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state.replace(params=params, ema=params, step=jnp.asarray(5)), {"config": {}})
    checkpoints.wait()
    like = nn.unbox(abstract_params(MODEL))
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore_params(5, like)
    checkpoints.close()
    message = str(caught.value)
    assert "missing: router/layers/gate [2]" in message
    assert "misshapen: state_encoder/kernel is [5, 3], expected [5, 16]" in message


def test_mesh_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        sharding.make_mesh(dict(data=3, fsdp=1, tensor=1))
    assert sharding.make_mesh(dict(data=-1, fsdp=2, tensor=2)).shape["data"] == 2
