"""The update rule with small parameters end to end is the same rule."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.towers.stand_ins import BlockTransform
from ahawam_jax.training import packing
from ahawam_jax.training.objective import ObjectiveConfig
from ahawam_jax.training.optimizer import OptimizerConfig, make_optimizer
from ahawam_jax.training.step import TrainState, make_train_step
from tests.tiny_model import CONFIG, differs, random_batch, random_params

SETTINGS = dict(
    learning_rate=3e-3, warmup_steps=0, weight_decay=0.3, clip_norm=0.01, ema_decay=0.9, freeze="planner/head"
)


def arrays(*shapes: tuple[int, ...]) -> list[jax.Array]:
    """Numbers that are all different."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    ends = np.cumsum(sizes)
    return [jnp.arange(end - size, end).reshape(shape) for end, size, shape in zip(ends, sizes, shapes, strict=True)]


def test_what_was_packed_comes_back() -> None:
    bias, kernel, deep, large, other, alone = arrays((3,), (2, 4), (2, 3, 5), (130, 130), (7,), (2, 3))
    tree = {
        "executor": {"a": {"bias": bias, "kernel": kernel}, "b": {"kernel": deep}, "c": {"kernel": large}},
        "planner": {"scale": other}, "branch": alone,
    }  # fmt: skip
    packed = packing.pack(tree)
    shapes = jax.tree.map(jnp.shape, packed)
    assert shapes == {
        "executor": {"c": {"kernel": (130, 130)}, "small_kernel": (2 * 4 + 2 * 3 * 5,), "small_others": (3,)},
        "planner": {"small_others": (7,)}, "branch": (2, 3),
    }  # fmt: skip
    back = packing.unpack(packed, tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def steps(packed: bool) -> tuple[TrainState, Any]:
    """A state of random parameters, and the compiled step (state, batch) -> (state, metrics)."""
    model, optimizer, params = AhaWam(CONFIG), OptimizerConfig(**SETTINGS), random_params()
    tx = make_optimizer(optimizer, 100)
    step = jax.jit(make_train_step(model, tx, ObjectiveConfig(), optimizer, packed=packed))
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), params)
    return state, lambda state, batch: step(state, batch, BlockTransform(), jax.random.key(0))


def test_a_step_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped, decayed, averaged, partly frozen; and skipped where it is not finite."""
    monkeypatch.setattr(packing, "LARGE", 300)  # of the tiny model, too, some stay by themselves
    state, packed = steps(True)
    assert 10 < len(jax.tree.leaves(packing.pack(state.params))) < len(jax.tree.leaves(state.params)) / 2
    _, plain = steps(False)
    batch = random_batch()
    after, metrics = packed(state, batch)
    expected, numbers = plain(state, batch)
    assert differs(after.params["executor"]["head"]["kernel"], state.params["executor"]["head"]["kernel"])
    # Float32: the sum of squares under the clipping factor is added up in another order, within 1e-6.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-7), after, expected)
    for name in ("loss", "gradient_norm", "parts"):
        np.testing.assert_allclose(metrics[name], numbers[name], rtol=2e-6)
    batch["action"] = np.full_like(batch["action"], np.nan)
    skipped, metrics = packed(after, batch)
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, skipped, after.replace(step=after.step + 1))


def test_where_it_is_done() -> None:
    assert packing.pays(jax.devices()[:1]) and not packing.pays(jax.devices())
