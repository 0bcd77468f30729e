"""Text tokens of batches: those of the cache bit for bit, read for each batch and never all at once."""

import subprocess
import sys
import weakref
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ahawam_jax.models.config import ModelConfig
from ahawam_jax.towers.stand_ins import BlockTransform, HashedWords
from ahawam_jax.towers.text_cache import CachedText, prompt, write_entry
from ahawam_jax.training.data import Data, open_data
from data_pipelines.augmentation import PICTURES
from tests.conftest import REPOSITORY
from tests.data_pipelines import tiny_dataset
from tests.tiny_config import get_config

LENGTH, DIM = 256, 1024  # 512 KiB a prompt


def data_of(texts: list[str], cache: Path) -> Data:
    """Of which only the text is there."""
    return Data([], [], None, {}, {}, texts, CachedText(cache, DIM, LENGTH), np.zeros(len(texts), int), [])


def test_a_batch_gets_the_tokens_of_its_instructions_bit_for_bit(tmp_path: Path) -> None:
    rng, texts, expected = np.random.default_rng(0), ["stir", "pick", "pour", "pick"], {}
    for text in {*texts}:
        tokens, mask = rng.standard_normal((LENGTH, DIM)).astype(jnp.bfloat16), rng.random(LENGTH) < 0.2
        write_entry(tmp_path, prompt(text), tokens, mask)
        tokens[~mask] = 0
        expected[text] = tokens.view(np.uint16)
    data, batch = data_of(texts, tmp_path), np.array([2, 1, 3, 0, 2], np.int32)
    for _ in range(2):  # the second time from what is remembered
        got = data.context(batch)
        assert got["context"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(got["context"].view(np.uint16), np.stack([expected[texts[i]] for i in batch]))
        assert got["context_mask"].shape == (5, LENGTH) and got["context_mask"].all()


GROWTH = """
import sys, tracemalloc
import numpy as np
import pytest
from tests.training.test_data import data_of

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def use(data):
    for start in range(0, len(data.texts), 5):
        data.context(np.arange(start, start + 5))

data = data_of([str(number) for number in range(100)], sys.argv[1])
few = data_of(data.texts[:10], sys.argv[1])
use(few)
before = resident()
tracemalloc.start()
use(data)
print(resident() - before, tracemalloc.get_traced_memory()[1])
"""


def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path: Path) -> None:
    """In a process of its own: a hundred prompts of half a MiB are read in batches of five."""
    for number in range(100):
        write_entry(tmp_path, prompt(str(number)), np.ones((LENGTH, DIM)), np.arange(LENGTH) < 128)
    command = [sys.executable, "-c", GROWTH, str(tmp_path)]
    resident, peak = map(int, subprocess.check_output(command, cwd=REPOSITORY, text=True).split())
    assert peak < 10 * 2**20  # of a batch: five entries, stacked, and one as it is checked
    assert resident < 10 * 2**20  # all of them: 50 MiB


def test_the_sums_of_the_record_are_taken_one_at_a_time(tmp_path: Path) -> None:
    class Tower:
        read: list[weakref.ref] = []

        def tokens(self, text: str) -> tuple[np.ndarray, np.ndarray]:
            assert all(ref() is None for ref in self.read)
            tokens = np.full((4, 2), len(text), np.float32)
            self.read.append(weakref.ref(tokens))
            return tokens, np.ones(4, bool)

    config = get_config()
    config.data.update(path=str(tiny_dataset.write_dataset(tmp_path)), cache="")
    record = open_data(config, ModelConfig.create(config.model), Tower(), BlockTransform()).record
    sums = record["towers"]["text"]
    assert len(Tower.read) == len(sums) == 2 and len({*sums.values()}) == 2


def test_augmentation_is_for_pictures_alone(tmp_path: Path) -> None:
    config = get_config()
    config.data.update(path=str(tiny_dataset.write_dataset(tmp_path)), cache="")
    model, towers = ModelConfig.create(config.model), (HashedWords(config.towers.text_length, 16), BlockTransform())
    assert open_data(config, model, *towers).augment is None
    config.data.augmentation.crop = 0.1
    picture = np.random.default_rng(0).integers(0, 256, (1, 1, 96, 64, 3), np.uint8)
    batch = {name: picture.copy() for name in PICTURES} | {"video_history_valid_len": np.ones(1, int)}
    open_data(config, model, *towers).augment(batch, [(0,)])
    assert all((batch[name] != picture).mean() > 0.5 for name in PICTURES)
    config.data.latents = "latents"
    with pytest.raises(ValueError, match="config.data.latents, latents, holds what unchanged pictures were"):
        open_data(config, model, *towers)
