"""The towers without weights: the block transform and the hashed words."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.fft import idctn

from ahawam_jax.towers.stand_ins import COLOUR_AXES, BlockTransform, HashedWords

TOWER = BlockTransform()
PICK = 0.3988349  # first number of the word "pick" at width 64


def smooth_clip(frames: int, seed: int = 0) -> np.ndarray:
    """A clip [1, frames, 32, 48, 3] of the four lowest cosine coefficients of each 16x16 block and colour."""
    rng = np.random.default_rng(seed)
    coefficients = np.zeros((1, frames, 2, 3, 16, 16, 3))
    coefficients[..., :2, :2, :] = 0.3 * rng.standard_normal((1, frames, 2, 3, 2, 2, 3))
    blocks = idctn(coefficients, axes=(4, 5), norm="ortho") @ COLOUR_AXES
    return blocks.transpose(0, 1, 2, 4, 3, 5, 6).reshape(1, frames, 32, 48, 3).astype(np.float32)


def test_smooth_images_survive_encoding() -> None:
    """scipy's inverse transform made the blocks, so this also says which coefficients are kept."""
    clip = smooth_clip(1)
    assert np.abs(clip).max() < 1  # nothing is clipped
    latents = TOWER.encode(jnp.asarray(clip))
    assert latents.shape == (1, 48, 1, 2, 3)
    np.testing.assert_allclose(TOWER.decode(latents), clip, atol=2e-6)


def test_later_frames_are_coded_in_groups_of_four() -> None:
    clip = smooth_clip(9)
    latents = np.asarray(TOWER.encode(jnp.asarray(clip)))
    assert latents.shape == (1, 48, 3, 2, 3)
    np.testing.assert_array_equal(latents[:, :, :1], TOWER.encode(jnp.asarray(clip[:, :1])))
    single = [np.asarray(TOWER.encode(jnp.asarray(clip[:, i : i + 1])))[:, :, 0] for i in range(5, 9)]
    np.testing.assert_allclose(latents[:, :, 2], np.mean(single, 0), atol=1e-5)


def test_blocks_may_say_where_they_are() -> None:
    """Two of 48 channels; the others and what is decoded of them are as without."""
    clip, tower = jnp.asarray(smooth_clip(5)), BlockTransform(places=True)
    plain, placed = TOWER.encode(clip), tower.encode(clip)
    np.testing.assert_array_equal(placed[:, :-2], plain[:, :-2])
    for frame in np.asarray(placed)[0].swapaxes(0, 1):  # 2 rows, 3 columns of blocks
        np.testing.assert_allclose(frame[-2], [[-1 / 2] * 3, [1 / 2] * 3], atol=1e-7)
        np.testing.assert_allclose(frame[-1], [[-2 / 3, 0, 2 / 3]] * 2, atol=1e-7)
    np.testing.assert_array_equal(tower.decode(placed), TOWER.decode(plain.at[:, -2:].set(0)))


@pytest.mark.parametrize("shape", [(1, 4, 32, 48, 3), (1, 5, 30, 48, 3), (1, 1, 32, 40, 3)])
def test_other_sizes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected 1 \\+ 4n frames whose sides are multiples of 16"):
        TOWER.encode(jnp.zeros(shape))


def test_words_are_the_same_everywhere_and_padding_is_zero() -> None:
    tower = HashedWords(dim=64, length=6)
    tokens, mask = tower.tokens("Pick up the CUBE")
    assert mask.tolist() == [True] * 4 + [False] * 2 and not tokens[4:].any()
    again, _ = tower.tokens("cube the pick")
    np.testing.assert_array_equal(again[:3], tokens[[3, 2, 0]])
    # Drawn from the hash of the word, not from Python's salted one: this number may never change.
    assert tokens[0, 0] == pytest.approx(PICK, abs=1e-6)
    with pytest.raises(ValueError, match="has 7 words; expected 1 to 6"):
        tower.tokens("a b c d e f g")
    with pytest.raises(ValueError, match="has 0 words"):
        tower.tokens("")
