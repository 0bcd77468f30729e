"""One check per fixture of `ahawam verify`: which inputs it uses, what it recomputes, what it compares."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ahawam_jax import flow_matching
from ahawam_jax.models.aha_wam import AhaWam, empty_memory
from ahawam_jax.models.attention import rotary_angles_3d
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.models.deployment import Words, by_layer, deploy, give
from ahawam_jax.models.dit import Block, Condition, SmallNet, sinusoid
from ahawam_jax.models.memory import PlannerContext
from ahawam_jax.models.planner import Head, frame_causal_mask
from ahawam_jax.models.router import QueryEncoder, Router
from ahawam_jax.sampling import denoise_deployed
from ahawam_jax.training.objective import Noise, ObjectiveConfig, joint_loss
from ahawam_jax.verification.fixtures import ROLLOUT_TOLERANCE, Fixture, Suite
from ahawam_jax.weights.files import open_weights
from ahawam_jax.weights.release import from_release, to_release


def model_config(suite: Suite) -> ModelConfig:
    """The sizes in config.json, in our names."""
    m = suite.config["model"]
    if m["patch_size"] != [1, 2, 2] or m["obs_downsample"] != 1 or m["video_frames_per_latent"] != 4:
        raise ValueError(
            f"config.json asks for patch_size {m['patch_size']}, obs_downsample {m['obs_downsample']} and "
            f"video_frames_per_latent {m['video_frames_per_latent']}; only [1, 2, 2], 1 and 4 exist."
        )
    return ModelConfig(
        num_layers=m["num_layers"], num_heads=m["num_heads"], head_dim=m["head_dim"],
        planner_dim=m["video_hidden"], planner_ffn_dim=m["video_ffn"],
        executor_dim=m["action_hidden"], executor_ffn_dim=m["action_ffn"],
        latent_channels=m["latent_channels"], text_dim=m["text_dim"], freq_dim=m["freq_dim"],
        action_dim=m["action_dim"], state_dim=m["proprio_dim"], num_queries=m["num_queries"],
        chunk=m["action_chunk_size"], horizon=m["action_horizon"], memory_frames=m["num_history_frames"],
        video_ratio=m["video_rope_frame_stride"], norm_eps=m["norm_eps"], dtype="float32",
    )  # fmt: skip


def network(suite: Suite, weights: str = "tiny_weights") -> tuple[AhaWam, Any]:
    config = model_config(suite)
    params = from_release(suite.weights(weights), config)
    return AhaWam(config), jax.tree.map(jnp.asarray, params)


def compare_context(fixture: Fixture, prefix: str, context: PlannerContext) -> None:
    """Per layer, k and v [L, B, ..., N, H] against stored [B, ..., N*H]."""
    for layer in range(context.k.shape[0]):
        for name in ("k", "v"):
            value = getattr(context, name)[layer]
            fixture.compare(f"{prefix.format(layer)}{name}", value.reshape(*value.shape[:-2], -1))


def tokens_of(context: PlannerContext) -> PlannerContext:
    """Merges the F and S axes."""
    return PlannerContext(*(x.reshape(*x.shape[:2], -1, *x.shape[4:]) for x in (context.k, context.v)))


# ------------------------------------------------------------------------------------------------ weights, tables
def check_weights(suite: Suite, f: Fixture) -> None:
    config = model_config(suite)
    for name, value in to_release(from_release(f.stored, config)).items():
        f.compare(name, value, tolerance=0.0)
    released = suite.folder / "tiny_checkpoint.pt"
    if released.is_file():  # the same tensors, laid out as the release saves them
        for name, x in open_weights(released).tensors.items():
            f.compare(name, np.asarray(x), tolerance=0.0)


def check_scheduler(suite: Suite, f: Fixture) -> None:
    shift = suite.config["examples"]["table_shift"]
    lowest, mean = flow_matching.weight_constants(shift)
    f.compare("y_min", lowest)
    f.compare("norm_const", mean)
    times = flow_matching.NUM_TRAIN_TIMES * flow_matching.shift_level(f["u"], shift)
    f.compare("t_of_u", times)
    f.compare("weight_of_t", flow_matching.loss_weight(jnp.asarray(times), shift))
    names = [name for name in f.stored if name.startswith("timesteps") and name.endswith(".f32")]
    if not names:
        raise ValueError("no timesteps<N>.f32 is stored; the fixture is incomplete, copy it again.")
    for steps in (int(name.removeprefix("timesteps").removesuffix(".f32")) for name in names):
        levels = flow_matching.noise_levels(steps, shift)
        f.compare(f"timesteps{steps}.f32", 1000 * levels[:-1])
        f.compare(f"deltas{steps}.f32", np.diff(levels))
        # The release's bfloat16 tables are rounded from float32 arithmetic, so that is what is rounded here.
        single = flow_matching.shift_level(np.linspace(1, 0, steps + 1, dtype=np.float32), np.float32(shift))
        f.compare(f"timesteps{steps}.bf16", (np.float32(1000) * single[:-1]).astype(jnp.bfloat16))
        f.compare(f"deltas{steps}.bf16", np.diff(single).astype(jnp.bfloat16))


# ------------------------------------------------------------------------------------------------ single modules
def check_small_probes(suite: Suite, f: Fixture) -> None:
    config, weights = model_config(suite), suite.weights()
    for name in f.stored:
        if name.startswith("block.w."):
            weights["mot/mixtures.video.blocks.0." + name.removeprefix("block.w.")] = f[name]
    params = from_release(weights, config)
    look, ask = params["observation_queries"]["projection"], params["observation_queries"]["encoder"]
    projection = SmallNet(config.text_dim, config.text_dim, jnp.float32)
    f.compare("proj.out", projection.apply({"params": look}, f["proj.in"]))
    encoder = QueryEncoder(config.num_queries, config.text_dim, jnp.float32)
    f.compare("query.out", encoder.apply({"params": ask}, f["query.in"]))

    frame = [
        jnp.broadcast_to(
            x.reshape(1, x.shape[0], 1, x.shape[1], config.num_heads, config.head_dim),
            (config.num_layers, x.shape[0], 1, x.shape[1], config.num_heads, config.head_dim),
        )
        for x in (f["editor.k"], f["editor.v"])
    ]
    routed = Router(config).apply({"params": params["router"]}, f["editor.q"], PlannerContext(*frame))
    for layer in range(config.num_layers):
        for name, value in (("k", routed.k[layer]), ("v", routed.v[layer])):
            f.compare(f"editor.out_{name}{layer}", value.reshape(*value.shape[:-2], -1))

    x = f["block.x"]  # [B, S, D]: every token its own group, because the probe has a time per token
    block = Block(
        dim=config.planner_dim, ffn_dim=config.planner_ffn_dim, num_heads=config.num_heads, head_dim=config.head_dim,
        eps=config.norm_eps, dtype=jnp.float32, fused=False, across_groups=True,
    )  # fmt: skip
    condition = Condition(
        modulation=f["block.t_mod"],
        angles=np.arctan2(f["block.rope_angle_sin"], f["block.rope_angle_cos"])[None],
        text=f["block.ctx"],
        text_mask=np.ones((x.shape[0], 1, f["block.ctx"].shape[1]), bool),
    )
    first = jax.tree.map(lambda w: w[0], params["planner"]["blocks"])
    out, *_ = block.apply({"params": first}, x[:, :, None], None, condition)
    f.compare("block.out", out[:, :, 0])
    out = Head(f["head.out"].shape[-1], config.norm_eps).apply(
        {"params": params["planner"]["head"]}, f["head.x"][:, :, None], f["head.t"]
    )
    f.compare("head.out", out[:, :, 0])


def check_video_dit(suite: Suite, f: Fixture) -> None:
    model, params = network(suite)
    x = f["x"]
    batch, _, frames, height, width = x.shape
    tokens = height * width // 4
    times = f["timestep"][:, None] * (np.arange(frames) > 0)
    positions = np.broadcast_to(np.arange(frames), (batch, frames))
    text, text_mask = f["context"], f["context_mask"]
    out, state = model.apply(
        {"params": params}, x, times, positions, text, text_mask, method="plan", mutable="intermediates"
    )
    seen = state["intermediates"]["planner"]
    condition = seen["condition"][0]

    def per_token(y):
        return np.repeat(y, tokens, 1)

    f.compare("attn_mask", frame_causal_mask(frames, tokens)[0])
    f.compare("sinus", sinusoid(jnp.asarray(suite.config["examples"]["sinus_times"]), model.config.freq_dim))
    angles = rotary_angles_3d(positions[:1], height // 2, width // 2, model.config.head_dim)
    f.compare("rope_cos", np.cos(angles).reshape(frames * tokens, 1, -1))
    f.compare("rope_sin", np.sin(angles).reshape(frames * tokens, 1, -1))
    f.compare("tokens", seen["tokens"][0].reshape(batch, frames * tokens, -1))
    f.compare("t", per_token(seen["time"][0]))
    f.compare("t_mod", per_token(condition.modulation))
    f.compare("context_emb", condition.text)
    for layer, value in enumerate(seen["blocks"]["x"][0]):
        f.compare(f"block{layer}", value.reshape(batch, frames * tokens, -1))
    f.compare("out", out.velocity)


# ------------------------------------------------------------------------------------------------ joint training
def training_batch(suite: Suite, f: Fixture) -> dict[str, np.ndarray]:
    """The stored batch in the layout of `joint_loss`."""
    config = model_config(suite)
    f.ignore("in.video_current_frame_index")  # already contained in video_temporal_position_ids
    names = ["action", "action_is_pad", "context", "context_mask", "image_is_pad", "input_latents", "proprio",
             "video_temporal_position_ids", "video_history_valid_len", "video_history_frame_indices"]  # fmt: skip
    batch = {name: f[f"in.{name}"] for name in names}
    if "in.action_offset" in f:
        f.ignore("in.obs_latents_from_video")  # the offset variant looks at the shifted chunk starts instead
        batch |= {"obs_latents": f["in.obs_latents_offset"], "action_offset": f["in.action_offset"]}
    else:
        size = len(batch["action"])
        batch |= {"obs_latents": f["in.obs_latents_from_video"], "action_offset": np.zeros(size, np.int32)}
    if "in.history_latents" in f:
        stored = f["in.history_latents"]
        missing = config.memory_frames - stored.shape[1]
        batch["history_latents"] = np.pad(stored, [(0, 0), (missing, 0)] + [(0, 0)] * (stored.ndim - 2))
    return batch


def training_inputs(suite: Suite, f: Fixture) -> tuple[dict[str, np.ndarray], Noise]:
    """The stored batch and noise in the layout of `joint_loss`."""
    config, batch = model_config(suite), training_batch(suite, f)
    size, chunks = batch["obs_latents"].shape[:2]
    return batch, Noise(
        video=f["in.noise_video"],
        video_times=f["in.timestep_video"],
        action=f["in.noise_action"].reshape(1, size, chunks, config.chunk, config.action_dim),
        action_times=f["in.timestep_action_per_chunk"][None],
    )


def objective(suite: Suite) -> ObjectiveConfig:
    flow = suite.config["flow"]
    return ObjectiveConfig(
        shift=flow["shift"], video_weight=flow["loss_lambda_video"], action_weight=flow["loss_lambda_action"]
    )


def run_loss(suite: Suite, f: Fixture) -> dict[str, Any]:
    model, params = network(suite)
    batch, noise = training_inputs(suite, f)
    run = jax.jit(lambda p, b, n: joint_loss(model, p, b, n, objective(suite), capture=True))
    loss, parts = run(params, batch, noise)
    f.compare("out.loss_total", loss)
    f.compare("out.loss_video", parts["loss_video"])
    f.compare("out.loss_action", parts["loss_action"])
    f.compare("out.pred_video", parts["pred_video"])
    f.compare("out.pred_action", parts["pred_action"][0].reshape(len(batch["action"]), -1, model.config.action_dim))
    return parts


def check_loss_without_history(suite: Suite, f: Fixture) -> None:
    run_loss(suite, f)


def check_offset_loss(suite: Suite, f: Fixture) -> None:
    parts = run_loss(suite, f)
    f.compare("out.chunk_queries", queries_of(parts["intermediates"]["route"]))


def queries_of(recorded: Any) -> jax.Array:
    return recorded["observation_queries"]["encoder"]["queries"][0]


def check_training_loss(suite: Suite, f: Fixture) -> None:
    parts = run_loss(suite, f)
    config, shift = model_config(suite), suite.config["flow"]["shift"]
    seen, routed = parts["intermediates"], parts["routed"]
    batch = len(f["in.action"])
    f.compare("out.chunk_queries", queries_of(seen["route"]))
    f.compare("out.loss_video_per_sample_unweighted", parts["loss_video_per_sample_unweighted"])
    f.compare("out.weight_video", flow_matching.loss_weight(f["in.timestep_video"], shift))
    weights = flow_matching.loss_weight(f["in.timestep_action_per_chunk"].reshape(-1), shift)
    f.compare("out.weight_action_per_chunk", weights)

    # Recorded twice where there is a history: the history's first, then the clip's.
    planner, condition = seen["plan"]["planner"], seen["plan"]["planner"]["condition"][-1]
    tokens = planner["tokens"][-1].shape[2]

    def flat(x):
        return x.reshape(batch, -1, x.shape[-1])

    f.compare("out.video_tokens_in", flat(planner["tokens"][-1]))
    f.compare("out.video_tokens_out", flat(planner["blocks"]["x"][-1][-1]))
    f.compare("out.video_t_mod", np.repeat(condition.modulation, tokens, 1))

    # The release trims the history to the longest one in the batch; ours always has W frames, the front ones hidden.
    past = f["out.history_attention_mask"].shape[-1]
    f.compare("out.history_attention_mask", planner["condition"][0].mask[:, -past:, -past:])
    f.compare("out.video_attention_mask", condition.mask[:, :, -f["out.video_attention_mask"].shape[-1] :])
    remembered = tokens_of(PlannerContext(*planner["blocks"]["kv"][0]))
    compare_context(f, "out.history{}.", PlannerContext(remembered.k[:, :, -past:], remembered.v[:, :, -past:]))

    executor = seen["act"]["executor"]
    condition = executor["condition"][0]
    f.compare("out.action_tokens_in", flat(executor["tokens"][0]))
    f.compare("out.action_tokens_out", flat(executor["x"][0]))
    f.compare("out.action_t_mod", np.repeat(condition.modulation, config.chunk, 1))
    f.compare("out.action_context_emb", condition.text)
    f.compare("out.action_context_mask", np.repeat(condition.text_mask, config.chunk, 1))

    compare_context(f, "out.editor{}.", routed)
    first = tokens_of(parts["planned"].context.frame(0))
    compare_context(f, "out.editor{}.first_", first)
    delta_k, delta_v = seen["route"]["router"]["layers"]["change"][0]
    compare_context(f, "out.editor{}.delta_", PlannerContext(delta_k, delta_v))


def check_gradients(suite: Suite, f: Fixture) -> None:
    model, params = network(suite)
    batch, noise = training_inputs(suite, suite.load("b_train_loss"))
    gradient = jax.jit(jax.grad(lambda p, b, n: joint_loss(model, p, b, n, objective(suite))[0]))
    gradients = to_release(gradient(params, batch, noise))
    compare_gradients(f, gradients)


def compare_gradients(f: Fixture, gradients: Mapping[str, np.ndarray]) -> None:
    """By release name, all that are stored."""
    for name in f.stored:
        floor = 0.0
        if name.startswith("chunk_obs_query_encoder/obs_key_proj") and name.endswith(".bias"):
            # Softmax ignores a constant added to all keys, so the exact gradient is 0 and what is stored is the
            # rounding of a cancelling sum; its terms are as large as those of the weight beside it.
            floor = float(np.abs(f.stored[name.replace("bias", "weight")]).max())
        f.compare(name, gradients[name], floor=floor)


# ------------------------------------------------------------------------------------------------ deployment
def check_inference(suite: Suite, f: Fixture) -> None:
    """Planner refreshes, then chunks: all after the last refresh, or after each one (in.prefill1.chunk0...).

    Plans and actions are compared in both forms of the parameters.
    """
    model, params = network(suite)
    config, shift = model.config, suite.config["flow"]["shift"]
    text, text_mask = f["in.context"], f["in.context_mask"]
    levels = flow_matching.noise_levels(len(f["timesteps"]), shift)
    f.compare("timesteps", 1000 * levels[:-1])
    f.compare("deltas", np.diff(levels))

    @jax.jit
    def refresh(latents, position, memory):
        return model.apply({"params": params}, latents, position, text, text_mask, memory, method="refresh")

    @jax.jit
    def chunk(context, observation, state, noise, positions):
        routed, seen = model.apply(
            {"params": params}, context, observation, method="route", mutable="intermediates"
        )

        def predict(x, time):
            times = jnp.full((x.shape[0], 1), time)
            return model.apply(
                {"params": params}, x, times, positions, text, text_mask, state, routed, method="act"
            )

        actions, trace = flow_matching.euler(predict, noise, levels, config.prediction)
        return actions, trace, routed, queries_of(seen["intermediates"])

    deployed, held = AhaWam(config, deployed=True), deploy(config, params, flow_matching.euler_times(levels))

    def apply(method, *inputs):
        return deployed.apply({"params": held.params}, *inputs, method=method)

    words = Words(*(by_layer(*kv) for kv in apply("read", text)), text_mask)

    @jax.jit
    def refresh_deployed(latents, position, memory):
        given = give(held.planner_rows[0], words.planner)
        return apply("refresh", latents, position, None, text_mask, memory, given)

    @jax.jit
    def chunk_deployed(context, observation, state, noise, positions):
        routed = apply("route", context, observation)
        return denoise_deployed(deployed, held, noise, positions, words, state, routed, shift)

    flat = "in.start_latents" in f
    refreshes = sum(name.startswith("in.") and name.endswith(".latent") for name in f.stored)
    memory = None
    for number in range(refreshes):
        latents = f[f"in.prefill{number}.latent"]
        noise = f["in.start_latents" if flat else f"in.prefill{number}.start_latents"]
        if memory is None:
            tokens = latents.shape[3] * latents.shape[4] // 4
            memory = memory_deployed = empty_memory(config, latents.shape[0], tokens)
        step = noise.shape[1] // config.video_ratio  # latent-frame positions between two refreshes
        position = np.full(len(latents), number * step, np.int32)
        context, memory = refresh(latents, position, memory)
        context_deployed, memory_deployed = refresh_deployed(latents, position, memory_deployed)
        for made in (context, context_deployed):
            compare_context(f, f"out.prefill{number}.layer{{}}.", tokens_of(made))
        f.compare(f"out.prefill{number}.next_frame_index", (number + 1) * step)
        prefix = "" if flat else f"prefill{number}."
        after = noise.copy()
        index = 0
        while (not flat or number == refreshes - 1) and f"in.{prefix}chunk{index}.obs_latent" in f:
            key = f"{prefix}chunk{index}"
            part = slice(index * config.chunk, (index + 1) * config.chunk)
            positions = np.arange(part.start, part.stop)[None]
            observed = f[f"in.{key}.obs_latent"][:, None], f[f"in.{key}.proprio"][:, None]
            observed += noise[:, None, part], positions
            actions, (before, velocity), routed, queries = chunk(context, *observed)
            after[:, part] = actions[:, 0]
            f.compare(f"out.{key}.chunk_queries", queries)
            compare_context(f, f"out.{key}.layer{{}}.", tokens_of(routed))
            for made in (actions, chunk_deployed(context_deployed, *observed)):
                f.compare(f"out.{key}.action", made[0, 0], ROLLOUT_TOLERANCE)
            f.compare(f"out.{key}.x_before_step", before[:, :, 0], ROLLOUT_TOLERANCE)
            f.compare(f"out.{key}.v_pred", velocity[:, :, 0], ROLLOUT_TOLERANCE)
            index += 1
        if index:
            f.compare(f"out.{prefix}start_latents_after", after, ROLLOUT_TOLERANCE)


CHECKS = {
    "tiny_weights": check_weights,
    "s_scheduler": check_scheduler,
    "m_small_probes": check_small_probes,
    "a_video_dit": check_video_dit,
    "b_train_loss": check_training_loss,
    "b_train_grads": check_gradients,
    "b2_train_loss_nohist": check_loss_without_history,
    "b3_train_loss_offset": check_offset_loss,
    "c_inference": check_inference,
    "c2_inference_interleaved": check_inference,
}
