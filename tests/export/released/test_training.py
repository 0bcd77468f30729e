"""What the benchmark takes for the released training step must compute what ours does, and what the release did."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch

from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.training.objective import Noise, ObjectiveConfig, joint_loss
from ahawam_jax.training.optimizer import OptimizerConfig, make_optimizer
from ahawam_jax.verification.fixtures import Suite
from ahawam_jax.verification.model_checks import compare_gradients, model_config, training_inputs
from ahawam_jax.weights.release import to_release
from export.released import training
from export.released.training import ReleasedTraining, Trainer
from tests.tiny_model import CONFIG, FRAMES, Batch, assert_close, random_batch, random_noise, random_params

TOLERANCE = 2e-5  # float32 on both sides, sums in another order
STEPS = 4
MODEL, PARAMS = AhaWam(CONFIG), random_params()
differentiate = jax.jit(jax.value_and_grad(lambda *args: joint_loss(MODEL, *args, ObjectiveConfig())[0]))


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """Copies, which PyTorch may keep."""
    return {name: torch.from_numpy(np.array(x)) for name, x in batch.items()}


def as_noise(noise: Noise) -> training.Noise:
    """The only draw."""
    video, times, action, action_times = (
        torch.from_numpy(np.array(x)) for x in (noise.video, noise.video_times, noise.action[0], noise.action_times[0])
    )
    return training.Noise(video, times, action, action_times)


def gradients(model: ReleasedTraining) -> dict[str, np.ndarray]:
    """By release name."""
    names = ReleasedTraining.names(model.config)
    return {names[name]: x.grad.numpy() for name, x in model.named_parameters()}


def short_history(batch: Batch) -> Batch:
    """One frame in the first sample, none in the second: the longest of the batch is shorter than the memory."""
    return batch | {"video_history_valid_len": np.array([1, 0], np.int32)}


def no_history(batch: Batch) -> Batch:
    return batch | {"video_history_valid_len": np.array([0, 0], np.int32)}


def padded(batch: Batch) -> Batch:
    """The end of an episode: half of the images are gone in one sample, some actions in one, all in the other."""
    images, actions = batch["image_is_pad"].copy(), batch["action_is_pad"].copy()
    images[0, 1 + 2 * (FRAMES - 1) :] = True
    actions[0, 3:], actions[1] = True, True
    return batch | {"image_is_pad": images, "action_is_pad": actions}


@pytest.mark.parametrize("change", [lambda batch: batch, short_history, no_history, padded])
def test_loss_and_all_gradients_are_ours(change: Any) -> None:
    batch, noise = change(random_batch()), random_noise()
    want, gradient = differentiate(PARAMS, batch, noise)
    model = ReleasedTraining.load(tensors(to_release(PARAMS)), CONFIG)
    loss = sum(model(tensors(batch), as_noise(noise)))
    loss.backward()
    assert_close(loss.item(), want, TOLERANCE)
    got, want = gradients(model), to_release(gradient)
    assert got.keys() == want.keys()
    assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize("warmup", [0, 2])
def test_steps_are_ours(warmup: int) -> None:
    """Clipping, rates, both kinds of weight decay: what a few steps leave of the loss."""
    cfg = OptimizerConfig(learning_rate=1e-2, warmup_steps=warmup, clip_norm=0.5, weight_decay=0.3)
    trainer = Trainer(ReleasedTraining.load(tensors(to_release(PARAMS)), CONFIG), cfg, STEPS)
    tx = make_optimizer(cfg, STEPS)
    params, state = PARAMS, tx.init(PARAMS)
    for seed in range(STEPS + 2):
        batch, noise = random_batch(seed), random_noise(seed)
        loss, gradient = differentiate(params, batch, noise)
        assert_close(trainer.step(tensors(batch), as_noise(noise)), loss, 20 * TOLERANCE)  # each step adds to it
        updates, state = jax.jit(tx.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)


# -------------------------------------------------------------------------------------------------- released fixtures
@pytest.fixture
def suite(shared_dir: Path) -> Suite:
    return Suite(shared_dir / "reference")


@pytest.mark.parametrize("name", ["b_train_loss", "b2_train_loss_nohist", "b3_train_loss_offset"])
def test_losses_of_the_release(suite: Suite, name: str) -> None:
    fixture = suite.load(name)
    batch, noise = training_inputs(suite, fixture)
    model = ReleasedTraining.load(tensors(suite.weights()), model_config(suite))
    video, action = (x.item() for x in model(tensors(batch), as_noise(noise)))
    for part, value in (("video", video), ("action", action), ("total", video + action)):
        fixture.compare(f"out.loss_{part}", value, TOLERANCE)
    assert not fixture.problems


def test_gradients_of_the_release(suite: Suite) -> None:
    batch, noise = training_inputs(suite, suite.load("b_train_loss"))
    model = ReleasedTraining.load(tensors(suite.weights()), model_config(suite))
    sum(model(tensors(batch), as_noise(noise))).backward()
    fixture = suite.load("b_train_grads")
    compare_gradients(fixture, gradients(model))
    assert fixture.compared == len(ReleasedTraining.names(model.config)) and not fixture.problems
