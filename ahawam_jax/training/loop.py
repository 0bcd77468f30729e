"""The training loop, top to bottom: data, state, resume, steps, logs, validation, checkpoints."""

import json
import math
import socket
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ahawam_jax.checkpoint_keep import Keep
from ahawam_jax.checkpoints import Checkpoints, find_step
from ahawam_jax.models.aha_wam import AhaWam
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.towers.building import build_text_tower, build_video_tower
from ahawam_jax.training import hosts, sharding
from ahawam_jax.training.adapters import without_adapters
from ahawam_jax.training.breakdown import names
from ahawam_jax.training.crash import leaves_behind
from ahawam_jax.training.data import Data, open_data
from ahawam_jax.training.distillation import Distillation, executor_of, objective_of, read_teacher
from ahawam_jax.training.goodput import Goodput
from ahawam_jax.training.host_memory import give_back, trim
from ahawam_jax.training.in_order import in_order
from ahawam_jax.training.metrics import PLAIN, Log, Monitoring, Wandb
from ahawam_jax.training.optimizer import OptimizerConfig, join, learning_rate, make_optimizer
from ahawam_jax.training.packing import pays
from ahawam_jax.training.profiling import Profile
from ahawam_jax.training.resuming import check_config, check_length, read_record, steps_of, write_config
from ahawam_jax.training.step import TrainState, create_state, make_train_step
from ahawam_jax.training.stopping import Interrupted, Requests, others_may_be_lost, with_votes
from ahawam_jax.training.validation import ERROR, Validation, describe
from ahawam_jax.training.watch import Watch, tell_skipped
from data_pipelines.loader import make_loader
from data_pipelines.ownership import Owner
from data_pipelines.paths import local_path, refuse_addresses
from data_pipelines.progress import StatusLine, clock, say
from data_pipelines.statistics import describe_losses


def train(
    config: ConfigDict, workdir: str | Path, accept_changed_data: bool = False, monitoring: Monitoring = PLAIN
) -> float:
    """Trains config into workdir, resuming if it holds a checkpoint. Returns the last open-loop error.

    accept_changed_data: go on although the data are not those that the checkpoint was trained on.
    All processes of a job call it together. Raises, in sentences, ValueError for input that does not fit, for
    processes that differ and for a workdir that another job trains in, OSError where it cannot be written;
    FloatingPointError after config.train.max_bad_steps steps in a row that were not finite; Interrupted after SIGINT
    or SIGTERM; LostProcess where another process of the job is gone.
    """
    workdir = local_path(workdir)
    refuse_addresses(config.to_dict(), "config.")
    asked = {"config": json.loads(config.to_json()), "--accept-changed-data": accept_changed_data}
    with others_may_be_lost():
        hosts.agree(hosts.fields(asked) | hosts.environment())
        with hosts.owned_by_first(workdir) as owner:
            with Goodput(workdir / "goodput.json") as goodput:
                return _train(config, workdir, owner, accept_changed_data, monitoring, goodput)


def _train(
    config: ConfigDict, workdir: Path, owner: Owner | None, accept_changed_data: bool, monitoring: Monitoring,
    goodput: Goodput,
) -> float:  # fmt: skip
    model = AhaWam(ModelConfig.create(config.model))
    objective, optimizer = objective_of(config), OptimizerConfig(**config.optimizer)
    distilled = isinstance(objective, Distillation)
    with hosts.together():
        # On one host -1 needs no size.
        size = state_bytes(model, optimizer, distilled) if jax.process_count() > 1 else 0
        mesh = sharding.make_mesh(config.mesh, state_bytes=size)
        sharding.check_batch(config.data.batch_size, mesh, optimizer.accumulate)
        tower = build_video_tower(config.towers, model.config, sharding.replicated(mesh))
        checkpoints = Checkpoints(workdir, Keep(config.train.keep, config.train.keep_every, config.train.keep_best))
        before = read_record(checkpoints)
        if before:
            check_config(before, config, workdir)
        text_tower = build_text_tower(config.towers, model.config)
        teacher = read_teacher(config) if distilled and not before else None
        data = open_data(config, model.config, text_tower, tower, before, accept_changed_data, teacher)
        asked = json.loads(config.to_json())
        config = config.copy_and_resolve_references()
        windows = sum(source.rows for source in data.train)
        config.train.steps = steps_of(config.train, windows, config.data.batch_size, optimizer)
        if before:
            check_length(before, config.train.steps, optimizer)
        write_config(workdir, asked, checkpoints.safe)
    found = {"mesh": sharding.describe_mesh(mesh), "newest checkpoint": checkpoints.latest, **data.sums}
    hosts.agree({"steps": config.train.steps, **found})

    tx = make_optimizer(optimizer, config.train.steps)
    key = jax.random.key(config.seed)
    ema = optimizer.ema_decay > 0
    state, layout = initial_state(model, tx, key, ema, mesh, checkpoints, config.init, optimizer, distilled)
    start = int(state.step)
    run = {"config": asked, "steps": config.train.steps, **data.record}
    one_step = make_train_step(model, tx, objective, optimizer, data.robots, pays(list(mesh.devices.flat)))
    step_fn = jax.jit(
        in_order(with_votes(one_step)), donate_argnums=0,
        out_shardings=(layout, sharding.replicated(mesh), sharding.replicated(mesh)),
    )  # fmt: skip
    validate = Validation(model, objective, config, data, mesh, tower)
    places = sharding.batch_rows(mesh, config.data.batch_size)
    loader = make_loader(
        data.train, data.windows, config.data.batch_size, config.seed, places, start, config.data.workers, data.augment
    )
    schedule = learning_rate(optimizer, config.train.steps)
    first = jax.process_index() == 0
    boards = [Wandb(monitoring.wandb, workdir, asked)] if monitoring.wandb and first else []
    log, error = Log(workdir, start, checkpoints, names(data.robots), boards), float("nan")
    _banner(config, model, data, mesh, start)
    shortest = _shortest_step(monitoring.work(config), mesh.size) if first else None
    facts = {"config": asked, "mesh": sharding.describe_mesh(mesh), "hosts": hosts.gather(socket.gethostname())}

    def save(error: float | None, last: bool) -> None:
        log.flush()
        if owner is not None:
            owner.check()
        position = {"batches": int(state.step), "seed": config.seed}
        checkpoints.save(state, run | {"data_position": position, "open_loop_error": error}, last)

    line = StatusLine()

    def tell(step: int) -> None:
        batch_size, seed = config.data.batch_size, config.seed
        tell_skipped(workdir, step, data.train, data.windows, batch_size, seed, checkpoints.safe)

    watch, to_save = Watch(config.train.max_bad_steps, tell), False

    def finish() -> None:
        with goodput.spent("checkpoint"):
            checkpoints.close()
        goodput.write(checkpoints.safe)
        say(goodput.describe())

    goodput.started(start)
    with (
        leaves_behind(workdir, facts, log), Profile(monitoring.profile, workdir / "profile", goodput) as profile,
        sharding.activation_rules(mesh), Requests(config.train.checkpoint_minutes) as requests,
    ):  # fmt: skip
        if start == config.train.steps:  # nothing left to train: a demo that was stopped later still reports it
            error = validate(state)[ERROR]
        for step in range(start + 1, config.train.steps + 1):
            last = step == config.train.steps
            profile.before(step)
            batch = data.put(next(loader), mesh)
            checkpoints.check()
            goodput.batch(batch)
            with goodput.spent("compile") if step == start + 1 else nullcontext():
                votes = requests.votes(mesh)
                if step == start + 1:
                    give_back()  # of all that the start has compiled
                    step_fn = hosts.compile_together(step_fn, state, batch, tower, key, votes)
                    give_back()
                state, metrics, request = step_fn(state, batch, tower, key, votes)
            goodput.step(metrics)
            profile.after(step, metrics)
            log.add(step, metrics)
            watch.add(step, request, metrics["skipped"])
            if step % config.train.log_every == 0 or last:
                with goodput.spent("log"):
                    means = log.flush()
                seconds, waited = goodput.rate(step)
                rates = {"step_seconds": seconds, "data_wait": waited}
                rates |= {} if shortest is None else {"mfu": shortest / seconds}
                log.scalars(step, {"learning_rate": float(schedule(step)), **rates})
                line.show(_progress(step, config, means, rates), last)
            validated = step % config.train.validate_every == 0 or last
            if validated:
                with goodput.spent("validation"):
                    scores = validate(state)
                    trim()  # what compiling it left, the first time
                log.scalars(step, scores)
                say(f"step {step}: {describe(scores)}")
                error = scores[ERROR]
            to_save |= step % config.train.checkpoint_every == 0 or last or watch.stop or watch.save
            if to_save:
                watch.catch_up()
            if to_save and (not watch.skipped or last or watch.stop):  # else after the first step that is finite again
                with goodput.spent("checkpoint"):
                    save(error if validated and math.isfinite(error) else None, last)
                goodput.write(checkpoints.safe)
                requests.saved()
                to_save = watch.save = False
            if watch.stop and not last:
                finish()
                raise Interrupted(f"Stopped at step {step}; the same command resumes there.")
        finish()
    return error


def state_bytes(model: AhaWam, optimizer: OptimizerConfig, distilled: bool = False) -> int:
    """Of a whole train state."""
    tx, key, ema = make_optimizer(optimizer, 1), jax.random.key(0), optimizer.ema_decay > 0
    return sharding.state_size(jax.eval_shape(lambda: create_state(model, tx, key, ema, optimizer, distilled)))


def initial_state(
    model: AhaWam, tx: Any, key: jax.Array, ema: bool, mesh: jax.sharding.Mesh, checkpoints: Checkpoints,
    start_from: str = "", lora: OptimizerConfig | None = None, distilled: bool = False,
) -> tuple[TrainState, Any]:  # fmt: skip
    """The newest checkpoint's state, or a fresh one, made sharded; and its shardings.

    start_from: a workdir or checkpoint step whose deployed parameters a fresh state begins with (config.init).
    lora: where adapters are described, if at all.  distilled: keeps the executor that it starts with, as teacher.
    """

    def create() -> TrainState:  # one function, which JAX traces once
        return create_state(model, tx, key, ema, lora, distilled)

    boxed = jax.eval_shape(create)
    layout, like = sharding.shardings(boxed, mesh), sharding.abstract(boxed, mesh)
    if checkpoints.latest is not None:
        return checkpoints.restore_state(checkpoints.latest, like), layout
    state = nn.unbox(jax.jit(create, out_shardings=layout)())
    give_back()  # the program that made it, in whose place others then come
    if start_from:
        _, adapters = without_adapters(state.params)
        state = state.replace(params=None, ema=None, teacher=None)  # their memory is needed
        workdir, step = find_step(start_from)
        source = Checkpoints(workdir)
        own = source.restore_params(step, without_adapters(like.params)[0])
        params = join(own, adapters)
        source.close()

        def copied(tree: Any, shardings: Any) -> Any:
            return jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=shardings)(tree)

        state = state.replace(
            params=params, ema=copied(params, layout.ema) if ema else None,
            teacher=copied(executor_of(own), layout.teacher) if distilled else None,
        )  # fmt: skip
    return state, layout


def _shortest_step(work: tuple[float, float] | None, devices: int) -> float | None:
    """Seconds that a step takes where MFU is 1, said with what they follow from."""
    if work is None:
        return None
    operations, most = work
    shortest = operations / most / devices
    say(
        f"a step is {operations:.4g} operations, of which {devices} devices do {devices * most:.4g} a second at most: "
        f"MFU is {shortest:.3g} s by the seconds of a step"
    )
    return shortest


def _progress(step: int, config: ConfigDict, means: dict[str, float], rates: dict[str, float]) -> str:
    seconds, mfu = rates["step_seconds"], f"  MFU {rates['mfu']:.1%}" if "mfu" in rates else ""
    parts = ", ".join(f"{name} {means[f'loss_{name}']:.4f}" for name in ("video", "action") if f"loss_{name}" in means)
    return (
        f"step {step}/{config.train.steps}  loss {means['loss']:.4f}{parts and f' ({parts})'}  "
        f"{config.data.batch_size / seconds:.0f} samples/s{mfu}  "
        f"data wait {rates['data_wait']:.0%}  ETA {clock(seconds * (config.train.steps - step))}"
    )


def _banner(config: ConfigDict, model: AhaWam, data: Data, mesh: jax.sharding.Mesh, start: int) -> None:
    datasets = [source.dataset for source in data.train]
    stores = data.train[0].latents
    cached = "" if stores is None else ", all latents cached" if stores.clips else ", latents of single frames cached"
    begin = f"resuming at step {start}" if start else "starting"
    print(
        f"{begin}: {sum(len(d.lengths) for d in datasets)} episodes of {len(datasets)} datasets, "
        f"{sum(source.rows for source in data.train)} rows to train, {datasets[0].fps:.5g} a second{cached}; batch "
        f"{config.data.batch_size}; mesh {sharding.describe_mesh(mesh)}, {mesh.size} x "
        f"{jax.devices()[0].device_kind} in {jax.process_count()} processes; compute {model.config.dtype}",
        flush=True,
    )
    for sentence in describe_losses(datasets, data.statistics):
        say(f"warning: {sentence}")
