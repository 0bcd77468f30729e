"""Weights held in the compute dtype, and functions traced ahead of time, change nothing."""

import json
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from ahawam_jax.checkpoints import save_params
from ahawam_jax.commands import compile_policy
from ahawam_jax.inference import programs
from ahawam_jax.inference.policy import Policy, PolicyConfig, load_run
from ahawam_jax.models.aha_wam import AhaWam, abstract_params, resident_params
from ahawam_jax.models.attention import ABSENT_GPU, attention_of
from ahawam_jax.models.config import ModelConfig
from ahawam_jax.weights.convert import flatten
from configs import robotwin
from data_pipelines.statistics import to_lists
from tests.conftest import REPOSITORY
from tests.inference.test_policy import STATISTICS, observation
from tests.tiny_config import get_config
from tests.tiny_model import random_params

CONFIG = get_config()
CONFIG.model.dtype = "bfloat16"
MODEL = ModelConfig.create(CONFIG.model)
WORDS = ["open the drawer", "close the drawer"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    record = {"config": json.loads(CONFIG.to_json()), "statistics": to_lists({"": STATISTICS}), "instructions": WORDS}
    save_params(folder, jax.tree.map(jnp.asarray, random_params(MODEL)), record)
    return folder


def drive(policy: Policy, episodes: int = 2) -> np.ndarray:
    state, out = policy.start(WORDS[:episodes]), []
    for call in range(4):
        images, robot_state = observation(call)
        actions, state = policy({name: x[:episodes] for name, x in images.items()}, robot_state[:episodes], state)
        out.append(actions)
    return np.stack(out)


def test_products_and_sums_are_not_handed_to_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where it would cost a chunk half its speed; an XLA that has no such option goes its own way."""
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((16, 288), np.float32), rng.standard_normal((288, 96), np.float32)
    given = jax.jit(lambda x, weights: (x @ weights, jnp.abs(x).sum(-1))).lower(x, weights)
    if options := programs.compiler_options():  # a later XLA may have none
        own = given.compile(compiler_options=options)
        assert "ynn" not in own.as_text()
        wide = x.astype(np.float64)
        at_most = 288 * 2**-24  # roundings of as many terms, relative to the sum of their sizes
        product, total = map(np.asarray, own(x, weights))
        assert (np.abs(product - wide @ weights) <= at_most * (np.abs(wide) @ np.abs(weights))).all()
        assert (np.abs(total - np.abs(wide).sum(-1)) <= at_most * np.abs(wide).sum(-1)).all()
    monkeypatch.setattr(programs, "_WITHOUT_LIBRARY", {"xla_option_of_tomorrow": "true"})
    assert programs.compiler_options.__wrapped__() == {}


def test_weights_lie_in_the_dtype_they_are_used_in(run: Path) -> None:
    """Bit for bit the same actions: what is held in bfloat16 was rounded to it before every use anyway."""
    _, params, _ = load_run(run)
    assert {name: x.dtype for name, x in flatten(params).items()} == {
        name: x.dtype for name, x in flatten(resident_params(MODEL)).items()
    }
    precise = Policy(AhaWam(MODEL), random_params(MODEL), CONFIG, STATISTICS, PolicyConfig(**CONFIG.policy.to_dict()))
    np.testing.assert_array_equal(drive(Policy.load(run)), drive(precise))


def test_what_is_held_in_which_dtype() -> None:
    held, whole = flatten(resident_params(MODEL)), flatten(nn.unbox(abstract_params(MODEL)))
    assert {name: x.shape for name, x in held.items()} == {name: x.shape for name, x in whole.items()}
    for name in ("executor/blocks/q/kernel", "router/layers/delta/out/bias", "branch_embedding"):
        assert held[name].dtype == jnp.bfloat16
    for name in (
        "executor/head/kernel", "planner/time_embedding/modulation/kernel", "planner/blocks/modulation",
        "executor/blocks/cross_norm/bias", "executor/blocks/q_norm", "router/layers/gate",
    ):  # fmt: skip
        assert held[name].dtype == jnp.float32
    small = flatten(resident_params(ModelConfig.create(get_config().model)))
    assert {str(x.dtype) for x in small.values()} == {"float32"}
    full = flatten(resident_params(ModelConfig.create(robotwin.get_config().model))).values()
    assert sum(x.size for x in full if x.dtype == jnp.bfloat16) > 0.98 * sum(x.size for x in full)


@pytest.fixture(scope="module")
def compiled(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compiled") / "two"
    assert compile_policy.main([str(run), "--out", str(out), "--episodes", "2"]) == 0
    return out


def test_traced_ahead_of_time(run: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy.load(run, compiled_in=compiled)
    expected = drive(Policy.load(run))
    with monkeypatch.context() as patch:
        patch.setattr(AhaWam, "apply", None)  # the model is not traced again
        np.testing.assert_array_equal(drive(policy), expected)


def test_with_the_attention_of_gpus(run: Path, tmp_path: Path) -> None:
    with attention_of(ABSENT_GPU):
        policy = Policy.load(run)
        policy.save_compiled(tmp_path)
        expected = drive(policy, 1)
    assert b"LayoutConstraint" in (tmp_path / "act.jaxexport").read_bytes()
    np.testing.assert_array_equal(drive(Policy.load(run, compiled_in=tmp_path), 1), expected)


def test_in_another_process(run: Path, compiled: Path) -> None:
    code = (
        "import sys; from ahawam_jax.inference.policy import Policy; from tests.inference.test_compiled import drive\n"
        "print(drive(Policy.load(sys.argv[1], compiled_in=sys.argv[2])).tobytes().hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), str(compiled)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert bytes.fromhex(done.stdout) == drive(Policy.load(run)).tobytes()


def test_other_policies_are_refused(run: Path, compiled: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was compiled for another policy \\(policy: .*\"steps\": 2.*\"steps\": 3"):
        Policy.load(run, compiled_in=compiled, steps=3)
    with pytest.raises(ValueError, match="holds no compiled policy, about.json is missing; write it again"):
        Policy.load(run, compiled_in=tmp_path)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in compiled.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "act.jaxexport").write_bytes(b"x" + (damaged / "act.jaxexport").read_bytes()[1:])
    with pytest.raises(ValueError, match="act.jaxexport is damaged or of another policy"):
        Policy.load(run, compiled_in=damaged)


@pytest.mark.parametrize("by", ["JAX 0.9.1, jaxlib 0.9.1", None])
def test_another_jax_is_refused(run: Path, compiled: Path, tmp_path: Path, by: str | None) -> None:
    """Also by a folder from before versions were recorded."""
    for path in compiled.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    record = json.loads((tmp_path / "about.json").read_text())
    assert record.pop("traced by") == f"JAX {jax.__version__}, jaxlib {jaxlib.__version__}"
    (tmp_path / "about.json").write_text(json.dumps(record | ({"traced by": by} if by else {})))
    said = f"compiled with {by or 'a JAX that it does not name'}, and this is JAX {jax.__version__}.*write it again"
    with pytest.raises(ValueError, match=said):
        Policy.load(run, compiled_in=tmp_path)


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert compile_policy.main([str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert jax.devices()[0].platform == "cpu"
