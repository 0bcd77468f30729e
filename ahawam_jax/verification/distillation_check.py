"""Check of `ahawam verify` for the executor's distillation: the teacher's rollout, the loss, sampling in few steps."""

import jax
import numpy as np

from ahawam_jax import flow_matching
from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.sampling import denoise
from ahawam_jax.training.distillation import Distillation, Start, distillation_loss, executor_of
from ahawam_jax.training.observing import observe
from ahawam_jax.verification.fixtures import ROLLOUT_TOLERANCE, Fixture, Suite
from ahawam_jax.verification.model_checks import compare_context, network, training_batch


def check_distillation(suite: Suite, f: Fixture) -> None:
    """The student learns in the teacher's context, and is sampled in its own."""
    model, teacher = network(suite)
    _, student = network(suite, "d_student_weights")
    rules, shift = suite.config["distill"], suite.config["flow"]["shift"]
    cfg = Distillation(teacher_steps=rules["teacher_steps"], anchors=rules["capture_steps"], shift=shift)
    batch = training_batch(suite, f)
    chunks = batch["obs_latents"].shape[1]
    stored = f["in.noise"]  # [B, C*T, d]
    start = Start(stored.reshape(len(stored), chunks, model.config.chunk, -1), f["in.anchor_index"])

    loss, parts = jax.jit(lambda params, reference: distillation_loss(model, params, reference, batch, start, cfg))(
        teacher | executor_of(student), executor_of(teacher)
    )

    def compare(name: str, x: jax.Array, tolerance: float = ROLLOUT_TOLERANCE) -> None:
        f.compare(f"out.{name}", np.asarray(x).reshape(stored.shape), tolerance)

    compare_context(f, "out.editor{}.", parts["observed"].routed)
    f.compare("out.teacher_timesteps", 1000 * cfg.levels[:-1])
    for step, states in zip(cfg.anchors, parts["states"], strict=True):
        compare(f"captured{step}", states)
    compare("teacher_final", parts["goal"])
    compare("student_noisy", parts["start"])
    f.compare("out.student_t", parts["times"])
    compare("student_flow", parts["velocity"])
    compare("student_pred_action", parts["reached"])
    f.compare("out.loss", loss, ROLLOUT_TOLERANCE)

    own = jax.jit(lambda params: observe(model, params, batch))(student)
    for count, path in rules["student_paths"].items():
        levels = cfg.levels[np.array(path)]
        act = own.actor(model, student)
        compare(f"student_{count}step_final", jax.jit(
            lambda noise, act=act, levels=levels: flow_matching.euler(act, noise, levels, model.config.prediction)[0]
        )(start.noise))  # fmt: skip
        if np.allclose(levels, flow_matching.noise_levels(int(count), shift), rtol=0, atol=1e-12):
            compare(f"student_{count}step_final", _deploy(model, student, start.noise, own, int(count), shift))


def _deploy(model: AhaWam, params, noise, own, steps: int, shift: float) -> jax.Array:
    """As a policy samples where config.policy.steps is `steps`."""
    given = own.positions, own.text, own.text_mask, own.states, own.routed
    return jax.jit(lambda noise: denoise(model, params, noise, *given, steps, shift))(noise)


CHECKS = {"d_ode_distill": check_distillation}
