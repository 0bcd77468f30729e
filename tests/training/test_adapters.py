"""Adapters beside kernels: what they change, what they leave, and that what is deployed is an ordinary model."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ahawam_jax.checkpoints import Checkpoints
from ahawam_jax.models.aha_wam import AhaWam, abstract_params, init
from ahawam_jax.towers.stand_ins import BlockTransform
from ahawam_jax.training import sharding
from ahawam_jax.training.adapters import A, B, add_adapters, merged, without_adapters
from ahawam_jax.training.loop import initial_state
from ahawam_jax.training.objective import ObjectiveConfig
from ahawam_jax.training.optimizer import OptimizerConfig, make_optimizer, split
from ahawam_jax.training.step import TrainState, create_state, make_train_step
from tests.tiny_model import CONFIG, assert_close, differs, random_batch, random_params

TARGETS, RANK = "(planner|executor)/blocks/(q|o|ffn_in)|router/layers/delta/out|state_encoder", 2
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, warmup_steps=0, freeze="planner", lora_targets=TARGETS, lora_rank=RANK, lora_alpha=6.0
)
MODEL = AhaWam(CONFIG)


def fresh() -> TrainState:
    tx = make_optimizer(OPTIMIZER, 10)
    return nn.unbox(create_state(MODEL, tx, jax.random.key(0), False, OPTIMIZER))


def test_adapters_begin_as_nothing_and_add_products() -> None:
    params = fresh().params
    own, beside = without_adapters(params)
    jax.tree.map(np.testing.assert_array_equal, merged(params, 3.0), own)
    assert jax.tree.structure(own) == jax.tree.structure(nn.unbox(abstract_params(CONFIG)))
    rng = np.random.default_rng(0)
    beside = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), beside)
    q, o = (beside["planner"]["blocks"][name] for name in ("q", "o"))
    assert q[A].shape == (2, CONFIG.planner_dim, RANK) and q[B].shape == (2, RANK, 2, 12)
    assert o[A].shape == (2, 2, 12, RANK) and o[B].shape == (2, RANK, CONFIG.planner_dim)
    assert beside["state_encoder"][A].shape == (CONFIG.state_dim, RANK)
    blocks = own["planner"]["blocks"]
    whole = {"q": blocks["q"] | q, "o": blocks["o"] | o}
    got = merged(whole, 3.0)
    for layer in range(CONFIG.num_layers):
        change = np.einsum("dr,rnh->dnh", q[A][layer], q[B][layer])
        assert_close(got["q"]["kernel"][layer], blocks["q"]["kernel"][layer] + 3 * change, 2e-6)
        change = np.einsum("nhr,rd->nhd", o[A][layer], o[B][layer])
        assert_close(got["o"]["kernel"][layer], blocks["o"]["kernel"][layer] + 3 * change, 2e-6)


def test_kernels_with_adapters_are_frozen_and_adapters_never() -> None:
    trained, frozen = split(fresh().params, OPTIMIZER.freeze)
    assert set(trained["planner"]["blocks"]) == {"q", "o", "ffn_in"}
    assert set(trained["planner"]["blocks"]["q"]) == {A, B}
    assert set(trained["executor"]["blocks"]["q"]) == {A, B, "bias"} and "kernel" in trained["executor"]["blocks"]["v"]
    assert set(frozen["executor"]["blocks"]) == {"q", "o", "ffn_in"}


def test_training_and_what_is_deployed(tmp_path: Path) -> None:
    tx = make_optimizer(OPTIMIZER, 10)
    mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    start = random_params()
    source = Checkpoints(tmp_path / "source")
    source.save(TrainState(jnp.asarray(3), start, {}, None), {"config": {}})
    source.close()
    checkpoints = Checkpoints(tmp_path / "run")
    key = jax.random.key(0)
    state, layout = initial_state(MODEL, tx, key, False, mesh, checkpoints, str(tmp_path / "source"), OPTIMIZER)
    jax.tree.map(np.testing.assert_array_equal, state.deploy, start)
    step = jax.jit(make_train_step(MODEL, tx, ObjectiveConfig(), OPTIMIZER))
    losses = []
    for _ in range(5):
        state, metrics = step(state, random_batch(), BlockTransform(), key)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    own, _ = without_adapters(state.params)
    jax.tree.map(np.testing.assert_array_equal, own["planner"], start["planner"])
    deployed = state.deploy
    assert differs(deployed["planner"]["blocks"]["q"]["kernel"], start["planner"]["blocks"]["q"]["kernel"])
    checkpoints.save(state, {"config": {}})
    checkpoints.wait()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), deployed)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_params(5, like), deployed)
    again, _ = initial_state(MODEL, tx, key, False, mesh, checkpoints, "", OPTIMIZER)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    checkpoints.close()


def test_axes_of_adapters() -> None:
    params = jax.eval_shape(lambda: add_adapters(init(MODEL, jax.random.key(0)), TARGETS, RANK, jax.random.key(0)))
    o = params["planner"]["blocks"]["o"]
    assert o[A].names == ("layers", "heads", "head_dim", None) and o[B].names == ("layers", None, "embed")


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="lora_targets 'blocks' matches no kernel's path"):
        create_state(MODEL, make_optimizer(OptimizerConfig(), 1), jax.random.key(0), False,
                     OptimizerConfig(lora_targets="blocks"))  # fmt: skip
    with pytest.raises(ValueError, match="ema_decay is 0.9 with lora_targets"):
        OptimizerConfig(lora_targets="planner", ema_decay=0.9)
    with pytest.raises(ValueError, match="lora_rank is 0"):
        OptimizerConfig(lora_rank=0)
