"""The umT5 encoder against the reference fixture and against transformers."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file

from ahawam_jax.towers.text_encoder import (
    TextEncoder,
    TextEncoderConfig,
    abstract_text_encoder_params,
    distance_bucket,
)
from ahawam_jax.towers.text_encoder_names import RENAMES_TRANSFORMERS, REPEATED_TRANSFORMERS
from ahawam_jax.training.sharding import make_mesh, shardings
from tests.tiny_model import assert_close, differs
from tests.tiny_text_encoder import CONFIG, from_original, random_params

LENGTH = 12
# transformers 5.23.0 computed what these tests compare with.
TRANSFORMERS = dict(
    vocab_size=50, d_model=20, d_kv=7, num_heads=3, d_ff=28, num_layers=3, relative_attention_num_buckets=32,
    relative_attention_max_distance=128, dropout_rate=0.0,
)  # fmt: skip
OURS = TextEncoderConfig(
    vocab=50, dim=20, dim_attn=21, dim_ffn=28, num_heads=3, num_layers=3, num_buckets=32, max_distance=128,
    dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def run() -> Callable[..., np.ndarray]:
    """(ids, mask[, params]) -> tokens of the tiny encoder, compiled once."""
    apply, random = jax.jit(TextEncoder(CONFIG).apply), random_params()
    return lambda ids, mask, params=random: np.asarray(apply({"params": params}, ids, mask))


def random_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 50, shape).astype(np.int32)


def offsets(length: int) -> np.ndarray:
    """Key position - query position, [length, length]."""
    return np.arange(length)[None] - np.arange(length)[:, None]


def test_reference_fixture(shared_dir: Path) -> None:
    folder = shared_dir / "reference"
    config = TextEncoderConfig(**json.loads((folder / "config.json").read_text())["umt5"], dtype="float32")
    stored = load_file(folder / "umt5_golden.safetensors")
    buckets = distance_bucket(offsets(300), config.num_buckets, config.max_distance)
    np.testing.assert_array_equal(buckets, stored["rel_buckets_300"])
    params = from_original(load_file(folder / "umt5_weights.safetensors"), config)
    out = jax.jit(TextEncoder(config).apply)({"params": params}, stored["ids"], stored["mask"])
    assert out.dtype == jnp.float32
    assert_close(out, stored["out"])
    assert_close(np.where(stored["mask"][..., None], out, 0), stored["out_padding_zeroed"])


@pytest.mark.parametrize("buckets", [8, 16, 20, 32, 64])
@pytest.mark.parametrize("max_distance", [17, 32, 100, 128, 512])
def test_buckets_are_those_of_transformers(buckets: int, max_distance: int) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.UMT5Config(
        d_model=4, d_kv=2, num_heads=1, relative_attention_num_buckets=buckets,
        relative_attention_max_distance=max_distance,
    )  # fmt: skip
    attention = transformers.models.umt5.modeling_umt5.UMT5Attention(config, has_relative_attention_bias=True)
    offset = np.arange(-511, 512)
    want = attention._relative_position_bucket(torch.from_numpy(offset)).numpy()
    np.testing.assert_array_equal(distance_bucket(offset, buckets, max_distance), want)


def test_encoder_is_that_of_transformers() -> None:
    """512 tokens, so that distances beyond max_distance occur; padding at the end, at the front and in the middle."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.UMT5EncoderModel(transformers.UMT5Config(**TRANSFORMERS)).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            is_scale = name.endswith("layer_norm.weight")
            x.copy_(torch.from_numpy(is_scale + 0.2 * rng.standard_normal(x.shape)))
    tensors = {}
    for name, x in theirs.state_dict().items():
        if name not in REPEATED_TRANSFORMERS:
            (original,) = (re.sub(old, new, name) for old, new in RENAMES_TRANSFORMERS if re.fullmatch(old, name))
            tensors[original] = x.numpy()
    ids = random_ids(3, 512)
    mask = np.ones(ids.shape, bool)
    mask[0, 140:] = mask[1, :9] = mask[2, 100:300] = False
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids).long(), torch.from_numpy(mask).long()).last_hidden_state.numpy()
    got = jax.jit(TextEncoder(OURS).apply)({"params": from_original(tensors, OURS)}, ids, mask)
    assert_close(got, want)


def test_padding_is_never_read(run) -> None:
    ids = random_ids(2, LENGTH)
    mask = np.arange(LENGTH) < np.array([[5], [LENGTH]])
    want = run(ids, mask)
    other = np.where(mask, ids, 7)
    assert_close(run(other, mask)[mask], want[mask], 1e-6)
    assert differs(run(other, np.ones_like(mask))[mask], want[mask])


def test_a_row_of_padding_only_is_finite(run) -> None:
    mask = np.array([[False] * LENGTH, [True] * LENGTH])
    assert np.isfinite(run(random_ids(2, LENGTH), mask)).all()


def test_bfloat16_stays_close_and_norms_stay_float32(run) -> None:
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    params = random_params(config)
    matrices = {"token_embedding", "kernel"}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        assert x.dtype == (jnp.bfloat16 if path[-1].key in matrices else jnp.float32), path
    ids, mask = random_ids(2, LENGTH), np.ones((2, LENGTH), bool)
    got = jax.jit(TextEncoder(config).apply)({"params": params}, ids, mask)
    assert got.dtype == jnp.float32
    want = run(ids, mask, jax.tree.map(np.float32, params))
    assert differs(got, want)
    assert_close(got, want, 5e-2)  # unscaled scores near 10, rounded to 2^-9


def test_every_matrix_of_the_full_size_is_spread_over_the_devices() -> None:
    abstract = abstract_text_encoder_params(TextEncoderConfig())
    placed = shardings(abstract, make_mesh({"data": 1, "fsdp": -1, "tensor": 2}))
    for (path, x), sharding in zip(
        jax.tree_util.tree_leaves_with_path(nn.unbox(abstract)), jax.tree.leaves(placed), strict=True
    ):
        assert isinstance(x, jax.ShapeDtypeStruct)  # nothing is allocated
        parts = x.size // np.prod(sharding.shard_shape(x.shape))
        assert parts == {"kernel": 8, "position_bias": 2}.get(path[-1].key, 4), path


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_heads", 7, "multiple of num_heads 7"),
        ("num_buckets", 9, "num_buckets 9"),
        ("num_buckets", 2, "num_buckets 2"),
        ("max_distance", 2, "max_distance 2"),
    ],
)
def test_impossible_sizes_are_refused(field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **{field: value})
