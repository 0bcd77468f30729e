"""Eight virtual devices against one: the same step, and checkpoints that move between them."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh

from ahawam_jax.checkpoints import CheckpointError, Checkpoints
from ahawam_jax.models.aha_wam import AhaWam, abstract_params
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.models.dit import RESIDUAL_AXES
from ahawam_jax.models.partitioning import constrain
from ahawam_jax.towers.encoding import encode
from ahawam_jax.towers.stand_ins import BlockTransform
from ahawam_jax.training import sharding
from ahawam_jax.training.loop import initial_state
from ahawam_jax.training.objective import ObjectiveConfig, joint_loss, sample_noise
from ahawam_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from ahawam_jax.training.step import TrainState, create_state, make_train_step
from configs import robotwin
from tests.tiny_config import get_config
from tests.tiny_model import random_params

MODEL = ModelConfig.create(get_config().model)
OPTIMIZER = OptimizerConfig(**(get_config().optimizer.to_dict() | {"warmup_steps": 0}))

TEXT = np.random.default_rng(1).normal(size=(1, 4, MODEL.text_dim)).astype(np.float32)


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
        "action_present": rng.integers(0, 3, (size, 1)) != np.arange(3),  # each robot lacks another number
        "context": np.tile(TEXT, (size, 1, 1)),
        "context_mask": np.ones((size, 4), bool),
    }


def run(mesh: jax.sharding.Mesh, folder: Path, steps: int, accumulate: int = 1) -> tuple[TrainState, dict, Any]:
    """Trains `steps` steps from the folder's newest checkpoint or from random parameters."""
    model, optimizer = AhaWam(MODEL), OptimizerConfig(**{**vars(OPTIMIZER), "accumulate": accumulate})
    tx = make_optimizer(optimizer, 10)
    checkpoints = Checkpoints(folder)
    state, layout = initial_state(model, tx, jax.random.key(0), True, mesh, checkpoints)
    checkpoints.close()
    if int(state.step) == 0:  # heads start at zero: random ones let every gradient through
        params = jax.tree.map(jax.device_put, random_params(MODEL), layout.params)
        state = state.replace(params=params, ema=params)
    step = jax.jit(
        make_train_step(model, tx, ObjectiveConfig(), optimizer),
        out_shardings=(layout, sharding.replicated(mesh)),
    )
    metrics = {}
    with sharding.activation_rules(mesh), jax.default_matmul_precision("highest"):
        batch = sharding.put_batch(loader_batch(), mesh)
        for _ in range(steps):
            state, metrics = step(state, batch, BlockTransform(), jax.random.key(7))
    return state, jax.device_get(metrics), layout


def worst_difference(a: Any, b: Any) -> float:
    """Largest |a - b| over the largest |b|, over all leaves of two trees."""
    pairs = zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True)
    return max(float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-6)) for x, y in pairs)


def momentum(state: TrainState) -> Any:
    """Of the first step: the clipped gradient times 1 - b1."""
    return jax.device_get(state.opt_state[1][0].mu)


def with_gradient(tree: Any) -> list[np.ndarray]:
    """All leaves but the biases of the observation keys: softmax ignores them, so their exact gradient is 0."""
    zero = ("['key']['bias']", "['key_norm']['bias']")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    kept = [x for path, x in leaves if not jax.tree_util.keystr(path).endswith(zero)]
    assert len(kept) == len(leaves) - 2
    return kept


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


@pytest.fixture(scope="module")
def full_size_state() -> Any:
    run = robotwin.get_config()
    model, tx = AhaWam(ModelConfig.create(run.model)), make_optimizer(OptimizerConfig(**run.optimizer), 10)
    return jax.eval_shape(lambda: create_state(model, tx, jax.random.key(0), ema=True))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (8, 8, 1), (1, 64, 1), (2, 4, 4)])
def test_full_size_state_is_spread_evenly(full_size_state: Any, sizes: tuple[int, int, int]) -> None:
    """Within a tenth of a state without any copies; the rest are biases and scales of norms."""
    mesh = AbstractMesh(sizes, sharding.MESH_AXES)
    assert not sharding.left_whole(full_size_state, mesh)
    here, ideal = sharding.bytes_per_device(full_size_state, mesh)
    assert ideal == pytest.approx(16 * 7.35e9 / (sizes[1] * sizes[2]), rel=1e-2)  # parameters, two moments, average
    assert ideal <= here < 1.1 * ideal


def test_large_leaf_left_whole_is_named() -> None:
    def leaf(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nn.LogicallyPartitioned:
        return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)

    tree = {
        "split": leaf((2048, 1024), ("embed", "mlp")),
        "small": leaf((1000, 1000), (None, None)),
        "odd": leaf((1025, 1025), (None, None)),
        "layer": {"kernel": leaf((30, 2048, 1024), (None, None, "heads"))},
        "indivisible": leaf((1025, 2048), ("embed", None)),
    }
    found = sharding.left_whole(tree, AbstractMesh((4, 8, 2), sharding.MESH_AXES))
    assert [(one.name, one.axis) for one in found] == [
        ("indivisible", "fsdp"), ("indivisible", "tensor"), ("layer/kernel", "fsdp")
    ]  # fmt: skip
    assert found[2].bytes == 30 * 2048 * 1024 * 4 // 2
    assert not sharding.left_whole(tree, AbstractMesh((64, 1, 1), sharding.MESH_AXES))


def test_eight_devices_compute_what_one_does(one_device: tuple[TrainState, dict], tmp_path: Path) -> None:
    """The same gradient, summed in another order, and of that gradient the update that one device makes."""
    state, metrics, _ = run(mesh_of(2, 2, 2), tmp_path, 1)
    expected, expected_metrics = one_device
    for name in ("loss", "loss_video", "loss_action", "gradient_norm"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-5)
    # 1e-5 are 170 roundings of 2^-24, in sums over 8 samples of some twenty tokens and in the layers behind them.
    assert worst_difference(with_gradient(momentum(state)), with_gradient(momentum(expected))) < 1e-5
    # Updates of two gradients that differ by rounding need not agree: Adam divides an entry by its own size, whatever
    # is left of an entry near its epsilon of 1e-8. So the update is compared with that of the same gradient.
    before, tx = random_params(MODEL), make_optimizer(OPTIMIZER, 10)
    gradient = jax.tree.map(lambda x: x / np.float32(1 - OPTIMIZER.b1), momentum(state))
    updates, _ = tx.update(gradient, tx.init(before), before)
    # Of an update, at most learning_rate in size, 1e-6 is lost on the way from the gradient to the momentum, back, and
    # through a norm of 1; then it is added, which rounds the parameter by 2^-24, here and there.
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=2**-23, atol=1e-6 * OPTIMIZER.learning_rate),
        jax.device_get(state.params), optax.apply_updates(before, updates),
    )  # fmt: skip


def test_accumulated_microbatches_are_averaged(tmp_path: Path) -> None:
    """Four microbatches, the rows i, i + 4, ... of the batch with the i-th key, computed by hand."""
    model, key = AhaWam(MODEL), jax.random.fold_in(jax.random.key(7), 0)
    state, metrics, _ = run(mesh_of(1, 1, 1), tmp_path, 1, accumulate=4)
    fresh, _, _ = run(mesh_of(1, 1, 1), tmp_path / "fresh", 0)

    @jax.jit
    def loss(params: Any, micro: dict[str, jax.Array], index: int) -> jax.Array:
        inputs = encode(micro, BlockTransform())
        noise = sample_noise(jax.random.fold_in(key, index), inputs, model, ObjectiveConfig())
        return joint_loss(model, params, inputs, noise, ObjectiveConfig())[0]

    losses = [loss(fresh.params, {k: v[i::4] for k, v in loader_batch().items()}, i) for i in range(4)]
    assert np.ptp(losses) > 0.01  # they do differ
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    # The average follows with the decay of the first step, 1 / 10.
    expected = jax.tree.map(lambda old, new: 0.1 * old + 0.9 * new, fresh.params, state.params)
    assert worst_difference(state.ema, expected) < 1e-5


@pytest.mark.parametrize("action", [np.nan, 1e19], ids=["loss", "gradient"])  # 1e19: its norm alone is infinite
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(tmp_path: Path, action: float) -> None:
    model, tx, mesh = AhaWam(MODEL), make_optimizer(OPTIMIZER, 10), mesh_of(1, 2, 1)
    state, _, layout = run(mesh, tmp_path, 1)
    step = jax.jit(
        make_train_step(model, tx, ObjectiveConfig(), OPTIMIZER), out_shardings=(layout, sharding.replicated(mesh))
    )
    batch = loader_batch()
    with sharding.activation_rules(mesh):
        good, fine = step(state, sharding.put_batch(batch, mesh), BlockTransform(), jax.random.key(7))
        batch["action"] = batch["action"].copy()  # what was put may be the very memory that a running step reads
        batch["action"][3] = action
        bad, metrics = step(state, sharding.put_batch(batch, mesh), BlockTransform(), jax.random.key(7))
    assert (fine["skipped"], metrics["skipped"]) == (0, 1)
    assert np.isfinite(metrics["loss"]) == (action == 1e19) and not np.isfinite(metrics["gradient_norm"])
    jax.tree.map(np.testing.assert_array_equal, bad, state.replace(step=state.step + 1))
    assert worst_difference(good, state) > 1e-3  # where all is finite, it learns


def test_activations_are_laid_out_by_their_logical_axes() -> None:
    mesh = mesh_of(2, 2, 2)
    x = jnp.zeros((8, 3, 5, 6))
    with sharding.activation_rules(mesh):
        laid_out = jax.jit(lambda x: constrain(x, RESIDUAL_AXES))(x)
        odd = jax.jit(lambda x: constrain(x, RESIDUAL_AXES))(x[:3])
    assert laid_out.sharding.spec == jax.sharding.PartitionSpec(("data", "fsdp"))
    assert odd.sharding.is_fully_replicated  # 3 rows do not divide over 4 devices
    assert constrain(x, RESIDUAL_AXES) is x


def test_schedule_and_weight_decay() -> None:
    cfg = OptimizerConfig(learning_rate=2.0, final_fraction=0.1, warmup_steps=10, weight_decay=0.5, clip_norm=1e9)
    schedule = learning_rate(cfg, 110)
    rates = [float(schedule(step)) for step in (0, 5, 10, 60, 110)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.1, 0.2])
    params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
    tx = make_optimizer(OptimizerConfig(learning_rate=2.0, warmup_steps=0, weight_decay=0.5), 100)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -2.0 * 0.5)  # decayed, though its gradient is zero
    np.testing.assert_array_equal(updates["bias"], 0.0)


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


@dataclass(frozen=True)
class Absent:
    """A device of a machine that is not here."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100"
    process_index: int = 7


def cluster(hosts: int, each: int) -> list[Absent]:
    return [Absent(number, number // each) for number in range(hosts * each)]


@pytest.mark.parametrize("sizes, hosts, each, crossing", [
    ((8, 8, 1), 8, 8, "data between 8 hosts"),
    ((2, 4, 4), 4, 8, "data and fsdp between 4 hosts"),
    ((4, 2, 4), 4, 8, "data between 4 hosts"),
    ((3, 4, 2), 3, 8, "data between 3 hosts"),
    ((1, 64, 1), 8, 8, "fsdp between 8 hosts"),
    ((2, 3, 4), 4, 6, "data and tensor between 4 hosts"),
])  # fmt: skip
def test_inner_axes_stay_inside_a_host(sizes: tuple[int, int, int], hosts: int, each: int, crossing: str) -> None:
    """As far as they fit: along an axis as many neighbours as divide what the axes inside it leave of a host."""
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, sizes, strict=True)), cluster(hosts, each))
    assert sharding.describe_mesh(mesh).endswith(f", {crossing}")
    assert {device.id for device in mesh.devices.flat} == set(range(hosts * each))
    host = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    near = int(np.gcd(sizes[2], each))
    assert all(len(np.unique(line)) == 1 for line in host.reshape(-1, near))


def test_what_minus_one_stands_for() -> None:
    """Split over a host, copied between hosts; over more of them where a host is too small for the state."""
    sizes, gib = dict(data=-1, fsdp=-1, tensor=1), 2**30

    def shape(state: int, memory: int | None, **more: int) -> tuple[int, int, int]:
        return sharding.mesh_shape(sizes | more, 8, 8, state * gib, memory and memory * gib)

    assert shape(82, 80) == (8, 8, 1)  # 10 GiB of 80 a device
    assert shape(82, 16) == (4, 16, 1)  # 10 of 16 are more than half, 5 are not
    assert shape(82, 4) == (1, 64, 1)
    assert shape(10**4, 80) == (1, 64, 1)  # nothing is enough: as little a device as can be
    assert shape(10**4, None) == (8, 8, 1)
    assert shape(82, 16, tensor=2) == (4, 8, 2)
    assert shape(82, 80, tensor=16) == (4, 1, 16)
    assert shape(82, 80, data=2) == (2, 32, 1)
    assert sharding.mesh_shape(sizes, 1, 8, 10**15, 1) == (1, 8, 1)


def test_hosts_of_different_sizes() -> None:
    with pytest.raises(ValueError, match="The hosts have 8, 7 devices"):
        sharding.make_mesh(dict(data=1, fsdp=-1, tensor=1), cluster(2, 8)[:15])


def test_rows_of_a_process_follow_from_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are made of the eight devices, which the mesh holds in another order."""
    devices = np.array(jax.devices())[[0, 4, 1, 5, 2, 6, 3, 7]].reshape(2, 2, 2)
    mesh = jax.sharding.Mesh(devices, sharding.MESH_AXES)
    whole = {"x": np.arange(48).reshape(16, 3)}

    def rows_of(*numbers: int) -> list[int]:
        near = {d: span for d, span in spans.items() if d.id in numbers}
        with monkeypatch.context() as patched:
            patched.setattr(
                jax.sharding.NamedSharding, "addressable_devices_indices_map", lambda self, shape: near
            )
            return sharding.batch_rows(mesh, 16).tolist()

    spans = sharding.batch_sharding(mesh).devices_indices_map((16,))
    assert rows_of(0) == rows_of(4) == [0, 1, 2, 3]  # a pair along tensor
    assert rows_of(1, 3) == [4, 5, 6, 7, 12, 13, 14, 15]
    assert sharding.batch_rows(mesh, 16).tolist() == list(range(16))
    placed = sharding.put_batch(whole, mesh)["x"]
    np.testing.assert_array_equal(placed, whole["x"])
    assert placed.sharding == sharding.batch_sharding(mesh)
    with pytest.raises(ValueError, match="15 rows of x cannot be split over 4 parts"):
        sharding.put_batch({"x": whole["x"][:15]}, mesh)
