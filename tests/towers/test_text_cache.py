"""The text cache: its files are the release's, it never mixes encoders, and a stopped run goes on where it ended."""

import dataclasses
import errno
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahawam_jax.commands import encode_text
from ahawam_jax.commands.encode_text import encode_prompts
from ahawam_jax.models.partitioning import constraints
from ahawam_jax.towers.text_cache import CachedText, Tokenizer, clean, fingerprint, open_entry, prompt, write_entry
from ahawam_jax.towers.text_encoder import TextEncoder, abstract_text_encoder_params
from ahawam_jax.training.sharding import make_mesh, shardings
from ahawam_jax.weights.torch_file import write_torch
from data_pipelines.disk import DiskError
from tests.data_pipelines import disguises
from tests.data_pipelines.tiny_dataset import INSTRUCTIONS, write_dataset
from tests.tiny_model import assert_close
from tests.tiny_text_encoder import CONFIG, random_params, write_tokenizer

LENGTH = 12
PARAMS = random_params()
EXACT = "a" * (LENGTH - 2)  # with the mark of a word's beginning and the end token, LENGTH tokens
ODD = (
    "",
    "pick  the\tcube \n",
    "&amp;lt;robot&amp;gt; &quot;pick&quot;",
    "pick the robot’s “cube”…",
    "é Ã© ｐｉｃｋ",
    "pick the cube " * 20,
    "</s> the robot </s>",
    EXACT,
    EXACT + "a",
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path / "tokenizer"), LENGTH)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def mesh(devices: int = 8) -> jax.sharding.Mesh:
    return make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.devices()[:devices])


class Stopped(Exception):
    """Ends a run at a chosen place."""


class Loader:
    """Hands out the tiny encoder and counts how often it was asked."""

    def __init__(self, params: Any = PARAMS, config: Any = CONFIG) -> None:
        self.params, self.config, self.calls = params, config, 0

    def __call__(self, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
        self.calls += 1
        return self.config, self.params


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --------------------------------------------------------------------------------------------------- tokenizer
def test_tokens_are_those_of_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """transformers 5.23.0."""
    transformers = pytest.importorskip("transformers")
    file = str(tmp_path / "tokenizer" / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=file, eos_token="</s>", pad_token="<pad>")
    cleaned = [clean(text) for text in ODD]
    want = theirs(cleaned, padding="max_length", truncation=True, max_length=LENGTH)
    ids, mask = tokenizer(ODD)
    assert ids.dtype == np.int32 and mask.dtype == bool
    np.testing.assert_array_equal(ids, want["input_ids"])
    np.testing.assert_array_equal(mask, np.array(want["attention_mask"], bool))
    assert tokenizer.sizes(ODD) == [len(row) for row in theirs(cleaned)["input_ids"]]
    assert max(tokenizer.sizes(ODD)) > LENGTH and ids[5, -1] == ids[8, -1] == theirs.eos_token_id


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("  pick \t the\n\ncube ", "pick the cube"),
        ("a &amp;lt; b", "a < b"),
        ("a < b &amp;amp; c", "a < b & c"),  # ftfy leaves entities alone where it sees a tag
        ("&nbsp;it&amp;#39;s&nbsp; it", "it's it"),
        ("“pick” the robotâ€™s cube", '"pick" the robot\'s cube'),
        ("ＡＢ ﬁt", "AB fit"),
    ],
)
def test_text_is_cleaned_as_wan_does(text: str, want: str) -> None:
    assert clean(text) == want


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json does not exist.* google/umt5-xxl"):
        Tokenizer(tmp_path / "tokenizer.json", LENGTH)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/tokenizer.json does not exist"):
        Tokenizer(tmp_path, LENGTH)
    for name, tokens in (("end", {"end": "</end>"}), ("pad", {"pad": "<blank>"})):
        with pytest.raises(ValueError, match="is not umT5's tokenizer"):
            Tokenizer(write_tokenizer(tmp_path / name, **tokens), LENGTH)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a readable tokenizer"):
        Tokenizer(tmp_path, LENGTH)
    for name in ("lfs", "web page", "nothing"):
        says = disguises.put(tmp_path / "tokenizer.json", name)
        with pytest.raises(ValueError, match=f"tokenizer.json {says}"):
            Tokenizer(tmp_path, LENGTH)


# ----------------------------------------------------------------------------------------------------- entries
def test_entries_are_the_release_s(cache: Path, tokenizer: Tokenizer) -> None:
    """Name, keys, dtypes and shapes; the numbers are the encoder's. torch reads them."""
    torch = pytest.importorskip("torch")
    text = "A video recorded from a robot's point of view executing the following instruction: pick the cube"
    assert encode_prompts([prompt("pick the cube")], cache, tokenizer, Loader(), mesh(1), batch=1) == 1
    name = f"{hashlib.sha256(text.encode()).hexdigest()}.t5_len{LENGTH}.wan22ti2v5b.pt"
    assert sorted(files(cache)) == sorted([name, "encoder.json"])
    entry = torch.load(cache / name, weights_only=True)
    assert list(entry) == ["context", "mask"]
    assert entry["context"].dtype == torch.bfloat16 and entry["context"].shape == (LENGTH, CONFIG.dim)
    assert entry["mask"].dtype == torch.bool and entry["mask"].shape == (LENGTH,)
    ids, mask = tokenizer([text])
    np.testing.assert_array_equal(entry["mask"].numpy(), mask[0])
    want = TextEncoder(CONFIG).apply({"params": PARAMS}, ids, mask)[0]
    assert_close(entry["context"].float().numpy(), want, 2**-8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_entries_of_torch_are_read(cache: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    context = torch.randn(LENGTH, 6).to(getattr(torch, dtype))
    cache.mkdir()
    name = f"{hashlib.sha256(prompt('pick').encode()).hexdigest()}.t5_len{LENGTH}.wan22ti2v5b.pt"
    torch.save({"context": context, "mask": torch.arange(LENGTH) < 5}, cache / name)
    entry = open_entry(cache, prompt("pick"), LENGTH)
    tokens, mask = entry.read(), entry.mask
    assert str(tokens.dtype) == dtype
    np.testing.assert_array_equal(tokens[:5], context[:5].float().numpy())
    assert not tokens[5:].any() and mask.tolist() == [True] * 5 + [False] * 7
    again, handed = CachedText(cache, context.shape[1], LENGTH).tokens("pick")
    np.testing.assert_array_equal(again, tokens)
    assert handed.dtype == bool and handed.shape == (LENGTH,) and handed.all()
    with pytest.raises(ValueError, match=rf"of width {context.shape[1]}, the model reads 7 \(config.model.text_dim\)"):
        CachedText(cache, 7, LENGTH).tokens("pick")


def test_a_missing_entry_says_how_to_write_it(cache: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        CachedText(cache, CONFIG.dim, LENGTH).tokens("pick")
    for part in (str(cache), repr(prompt("pick")), f"ahawam encode-text --cache {cache} --length 12"):
        assert part in str(error.value)


GOOD = {"context": np.ones((LENGTH, 6), np.float32), "mask": np.ones(LENGTH, bool)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": np.full((LENGTH, 6), np.nan, np.float32)}, "holds NaN"),
        ({"context": np.ones((LENGTH - 1, 6), np.float32)}, r"context \[11, 6\]"),
        ({"context": np.ones(LENGTH, np.float32)}, r"context \[12\]"),
        ({"mask": np.ones(LENGTH - 1, bool)}, r"mask \[11\]"),
        ({"mask": np.ones(LENGTH, np.int64)}, r"\[12\] int64"),
        ({"mask": {}}, "must hold context and mask"),
    ],
)
def test_damaged_entries_are_refused(cache: Path, change: dict[str, Any], message: str) -> None:
    cache.mkdir()
    path = cache / f"{hashlib.sha256(b'pick').hexdigest()}.t5_len{LENGTH}.wan22ti2v5b.pt"
    write_torch(path, GOOD | change)
    with pytest.raises(ValueError, match=message):
        open_entry(cache, "pick", LENGTH)


def test_other_files_are_refused(cache: Path) -> None:
    cache.mkdir()
    path = cache / f"{hashlib.sha256(b'pick').hexdigest()}.t5_len{LENGTH}.wan22ti2v5b.pt"
    write_torch(path, {"context": GOOD["context"]})
    with pytest.raises(ValueError, match="must hold context and mask"):
        open_entry(cache, "pick", LENGTH)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cut off"):
        open_entry(cache, "pick", LENGTH)


def test_nan_is_never_written(cache: Path) -> None:
    cache.mkdir()
    tokens = GOOD["context"].copy()
    tokens[3, 2] = 3.4e38  # finite in float32 only
    with pytest.raises(ValueError, match="NaN or infinity for the prompt 'pick'"):
        write_entry(cache, "pick", tokens, GOOD["mask"])
    assert not files(cache)


# ---------------------------------------------------------------------------------------------------- encoding
def test_devices_batches_and_neighbours_change_nothing(cache: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Eleven prompts in batches of 8 on eight devices, and in one of 11 on one device; weights come as they lie."""
    prompts = [prompt(f"pick the cube {i}") for i in range(11)] + [prompt("pick the cube 3")]
    long = Tokenizer(tmp_path / "tokenizer", 80)
    elsewhere = Loader(jax.device_put(PARAMS, jax.devices()[3]))
    assert encode_prompts(prompts, cache, long, elsewhere, mesh(8), batch=5) == 11
    encode_prompts(reversed(prompts), tmp_path / "other", long, Loader(), mesh(1), batch=11)
    got, want = files(cache), files(tmp_path / "other")
    assert got.keys() == want.keys() and got["encoder.json"] == want["encoder.json"]
    for text in prompts:
        a, b = (open_entry(folder, text, 80) for folder in (cache, tmp_path / "other"))
        assert 1 < a.mask.sum() < 80
        assert_close(a.read(), b.read(), 2**-8)


def test_jobs_share_the_prompts(cache: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prompts = [prompt(f"pick the cube {i}") for i in range(7)]
    long = Tokenizer(tmp_path / "tokenizer", 80)
    counts = [encode_prompts(prompts, cache, long, Loader(), mesh(1), 4, f"{part}/3") for part in (2, 0, 1)]
    assert counts == [2, 3, 2]
    encode_prompts(prompts, tmp_path / "alone", long, Loader(), mesh(1), 4)
    assert files(cache).keys() == files(tmp_path / "alone").keys()
    with pytest.raises(ValueError, match="--shard is '3/3', expected I/N"):
        encode_prompts(prompts, cache, long, Loader(), mesh(1), 4, "3/3")


def test_activations_are_laid_out_by_the_mesh(cache: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(
        encode_text, "activation_rules", lambda mesh: constraints(lambda x, axes: seen.append((x.shape, axes)) or x)
    )
    encode_prompts(["pick"], cache, tokenizer, Loader(), mesh(8), batch=8)
    assert len(seen) >= 2  # before the blocks and after each
    assert set(seen) == {((8, LENGTH, CONFIG.dim), ("batch", None, "activation_embed"))}


def test_a_full_disk_keeps_the_prompts_before(cache: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    """Of the entries, and of the mark of the cache."""
    prompts, written = [f"pick {i}" for i in range(5)], []

    def full(folder: Path, text: str, *rest: Any) -> None:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(text)
        write_entry(folder, text, *rest)

    monkeypatch.setattr(encode_text, "write_entry", full)
    words = "cannot be written: its disk is full; .*The prompts before are kept; the same command goes on with those"
    with pytest.raises(DiskError, match=words):
        encode_prompts(prompts, cache, tokenizer, Loader(), mesh(1), batch=4)
    monkeypatch.setattr(encode_text, "write_entry", write_entry)
    assert encode_prompts(prompts, cache, tokenizer, Loader(), mesh(1), batch=4) == 2
    monkeypatch.setattr("data_pipelines.disk.os.fsync", throw_read_only)
    with pytest.raises(DiskError, match="new.* cannot be written: its file system is read-only; choose another"):
        encode_prompts(prompts, cache.with_name("new"), tokenizer, Loader(), mesh(1), batch=4)


def throw_read_only(_: int) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def test_a_stopped_run_goes_on_where_it_ended(cache: Path, tokenizer: Tokenizer, monkeypatch, capsys) -> None:
    prompts, written = [f"pick {i}" for i in range(10)], []

    def counted(folder: Path, text: str, *rest: Any) -> None:
        if len(written) == 6:
            raise Stopped
        written.append(text)
        write_entry(folder, text, *rest)

    monkeypatch.setattr(encode_text, "write_entry", counted)
    with pytest.raises(Stopped):
        encode_prompts(prompts, cache, tokenizer, Loader(), mesh(1), batch=4)
    assert written == prompts[:6]
    before = files(cache)
    assert len(before) == 7
    written.clear()
    assert encode_prompts(prompts, cache, tokenizer, Loader(), mesh(1), batch=4) == 4
    assert written == prompts[6:]
    after = files(cache)
    assert len(after) == 11 and all(after[name] == content for name, content in before.items())
    output = capsys.readouterr().out
    assert "10 distinct prompts, 6 of them" in output and "4 of 4 prompts" in output and "wrote 4 entries" in output

    idle = Loader()
    assert encode_prompts(prompts, cache, tokenizer, idle, mesh(1)) == 0
    assert idle.calls == 0


def changed_weight(name: str, place: Any) -> Any:
    params = jax.tree.map(np.copy, PARAMS)
    leaf = params["blocks"][name] if name == "position_bias" else params["blocks"][name]["kernel"]
    leaf[place] += 1
    return params


@pytest.mark.parametrize("other", ["weights", "sizes", "tokenizer"])
def test_entries_of_two_encoders_never_mix(cache: Path, tokenizer: Tokenizer, tmp_path: Path, other: str) -> None:
    encode_prompts(["pick"], cache, tokenizer, Loader(), mesh(1), batch=1)
    before, loader = files(cache), Loader()
    if other == "weights":
        loader.params = changed_weight("o", np.s_[1, 0, 0, 4])
    elif other == "sizes":
        loader.config = dataclasses.replace(CONFIG, max_distance=11)
    else:
        file = tmp_path / "tokenizer" / "tokenizer.json"
        file.write_text(file.read_text() + "\n")
        tokenizer = Tokenizer(file, LENGTH)
    with pytest.raises(ValueError, match=f"another encoder: {other} in encoder.json differ"):
        encode_prompts(["pick", "cube"], cache, tokenizer, loader, mesh(1), batch=1)
    assert files(cache) == before
    (cache / "encoder.json").write_text("[1")
    with pytest.raises(ValueError, match="encoder.json is not valid JSON"):
        encode_prompts(["cube"], cache, tokenizer, Loader(), mesh(1), batch=1)


def test_fingerprint_does_not_depend_on_where_the_weights_lie(tokenizer: Tokenizer) -> None:
    placed = jax.device_put(PARAMS, shardings(abstract_text_encoder_params(CONFIG), mesh(8)))
    want = fingerprint(CONFIG, PARAMS, tokenizer)
    assert fingerprint(CONFIG, placed, tokenizer) == want
    for place in (np.s_[0, 0], np.s_[1, 4], np.s_[1, 6]):
        assert fingerprint(CONFIG, changed_weight("position_bias", place), tokenizer) != want
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    assert fingerprint(CONFIG, rounded, tokenizer) != want


def test_a_released_cache_is_read_but_not_extended(cache: Path, tokenizer: Tokenizer) -> None:
    cache.mkdir()
    write_entry(cache, "pick", GOOD["context"], GOOD["mask"])
    before, idle = files(cache), Loader()
    assert encode_prompts(["pick"], cache, tokenizer, idle, mesh(1)) == idle.calls == 0
    with pytest.raises(ValueError, match="nobody knows which encoder wrote them"):
        encode_prompts(["pick", "cube"], cache, tokenizer, Loader(), mesh(1))
    assert files(cache) == before


def test_only_what_is_really_cut_is_reported(cache: Path, tokenizer: Tokenizer, capsys) -> None:
    exact, long = EXACT, EXACT + "a"
    assert tokenizer.sizes([exact, long]) == [LENGTH, LENGTH + 1]
    encode_prompts([exact], cache, tokenizer, Loader(), mesh(1), batch=1)
    output = capsys.readouterr().out
    assert "lost" not in output and "cut: 0" in output
    encode_prompts([long], cache, tokenizer, Loader(), mesh(1), batch=1)
    output = capsys.readouterr().out
    assert f"longer than {LENGTH} tokens, so their tails are lost: 1, for example {long!r}" in output
    assert "cut: 1" in output


def test_a_tokenizer_with_too_many_ids_is_refused(cache: Path, tokenizer: Tokenizer) -> None:
    config = dataclasses.replace(CONFIG, vocab=5)
    with pytest.raises(ValueError, match=r"ids up to \d+, the encoder knows 5"):
        encode_prompts(["pick"], cache, tokenizer, Loader(random_params(config), config), mesh(1))


# ----------------------------------------------------------------------------------------------------- command
@pytest.fixture
def command(cache: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch) -> Callable[..., int]:
    """Runs the command with the tiny encoder in place of stored weights."""

    def load(path: Path, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
        assert path == Path("weights.pth")
        return CONFIG, PARAMS

    monkeypatch.setattr(encode_text, "load_text_encoder", load)
    common = ["--weights", "weights.pth", "--tokenizer", str(tmp_path / "tokenizer"), "--cache", str(cache)]
    return lambda *argv: encode_text.main([*common, *map(str, argv)])


def test_command_encodes_datasets_and_single_instructions(command, cache: Path, tmp_path: Path, capsys) -> None:
    dataset = write_dataset(tmp_path / "dataset")
    task = INSTRUCTIONS[0]
    assert command("--dataset", dataset, dataset, "--prompt", task, "pick the cube", "--length", 20, "--batch", 4) == 0
    output = capsys.readouterr().out
    assert "3 distinct prompts, 0 of them" in output and "3 of 3 prompts" in output
    assert "longer than 20 tokens, so their tails are lost: 3" in output and "wrote 3 entries of 20 tokens" in output
    for instruction in (*INSTRUCTIONS, "pick the cube"):
        tokens, mask = CachedText(cache, CONFIG.dim, 20).tokens(instruction)
        assert tokens.shape == (20, CONFIG.dim) and np.abs(tokens).min(1).all() and mask.all()
    assert set(json.loads((cache / "encoder.json").read_text())) == {"sizes", "weights", "tokenizer"}
    assert len([name for name in files(cache) if name.endswith(".t5_len20.wan22ti2v5b.pt")]) == 3


def test_command_reports_mistakes_in_a_sentence(command, tmp_path: Path, capsys) -> None:
    for argv, message in (
        ([], "give --dataset, --prompt or both"),
        (["--prompt", "pick", "--batch", 0], "--batch at least 1"),
        (["--prompt", "pick", "--length", 1], "--length must be at least 2"),
    ):
        with pytest.raises(SystemExit):
            command(*argv)
        assert message in capsys.readouterr().err
    assert command("--dataset", tmp_path) == 1
    assert "error: " in capsys.readouterr().err
