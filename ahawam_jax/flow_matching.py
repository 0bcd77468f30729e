"""Flow matching: noise times, interpolation, targets, loss weights and the Euler sampler (Eq. 4-5).

A time t runs from 0 (data) to 1000 (noise); its level is t / 1000. x_t = (1 - level) * data + level * noise and
the velocity is noise - data.
"""

import functools
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import numpy as np

NUM_TRAIN_TIMES = 1000
TIME_LAWS = ("shifted_uniform", "logit_normal")
LOSS_WEIGHTS = ("bell", "uniform")


def shift_level(u, shift: float):
    """Warps levels in [0, 1] towards noise: shift * u / (1 + (shift - 1) * u)."""
    return shift * u / (1 + (shift - 1) * u)


def noise_levels(steps: int, shift: float) -> np.ndarray:
    """Levels of an n-step Euler sampler, from 1 down to 0. float64 [steps + 1]."""
    return shift_level(np.linspace(1.0, 0.0, steps + 1), shift)


def sample_times(key: jax.Array, shape: tuple[int, ...], law: str, shift: float) -> jax.Array:
    """Training times in (0, 1000], float32.

    "shifted_uniform" is the release's law: level = shift_level(u), u uniform. "logit_normal" is the paper's:
    the level's logit is standard normal. Another name is a ValueError.
    """
    if law == "shifted_uniform":
        level = shift_level(1.0 - jax.random.uniform(key, shape), shift)  # u in (0, 1]: never exactly clean
    elif law == "logit_normal":
        level = jax.nn.sigmoid(jax.random.normal(key, shape))
    else:
        raise ValueError(f"Unknown noise-time law {law!r}; expected one of {', '.join(TIME_LAWS)}.")
    return NUM_TRAIN_TIMES * level


def mix(data: jax.Array, noise: jax.Array, times: jax.Array) -> jax.Array:
    """x_t of Eq. 4; `times` has the leading axes of data."""
    level = (times / NUM_TRAIN_TIMES).reshape(times.shape + (1,) * (data.ndim - times.ndim))
    return (1 - level) * data + level * noise


def _bell(times):
    return np.exp(-2 * np.square((times - NUM_TRAIN_TIMES / 2) / NUM_TRAIN_TIMES))


@functools.cache
def weight_constants(shift: float) -> tuple[float, float]:
    """Lowest value of the bell on the 1000-step grid and its mean height above that."""
    heights = _bell(NUM_TRAIN_TIMES * noise_levels(NUM_TRAIN_TIMES, shift)[:-1])
    lowest = heights.min()
    return float(lowest), float((heights - lowest).mean())


def loss_weight(times: jax.Array, shift: float, kind: str = "bell") -> jax.Array:
    """Weight of the squared error at each time: the release's bell (mean 1 over its grid) or 1."""
    if kind == "uniform":
        return jnp.ones_like(times)
    if kind != "bell":
        raise ValueError(f"Unknown loss weight {kind!r}; expected one of {', '.join(LOSS_WEIGHTS)}.")
    lowest, mean = weight_constants(shift)
    # exp(a) - lowest near the ends cancels in float32; expm1 around the lowest value does not.
    exponent = -2 * jnp.square((times - NUM_TRAIN_TIMES / 2) / NUM_TRAIN_TIMES)
    return lowest * jnp.expm1(exponent - np.log(lowest)) / (mean + 1e-10)


def to_velocity(prediction: jax.Array, x: jax.Array, level: jax.Array, kind: str) -> jax.Array:
    """Velocity from what the executor predicts. `level` broadcasts against x and is positive.

    "velocity" is returned as it is; a clean "sample" y gives (x - y) / level, since x = y + level * velocity.
    """
    return prediction if kind == "velocity" else (x - prediction) / level


def euler_step(prediction: jax.Array, x: jax.Array, level: jax.Array, delta: jax.Array, kind: str) -> tuple:
    """x after one step of the level by delta (negative), and the velocity used."""
    velocity = to_velocity(prediction, x, level, kind)
    return x + velocity * delta, velocity


@flax.struct.dataclass
class Guide:
    """Where the clean estimate is pulled while sampling: real-time chunking as inpainting (arXiv 2506.07339)."""

    target: jax.Array  # like x
    weight: jax.Array  # broadcasts against x: 1 where the target holds, 0 where nothing is wanted
    limit: jax.Array  # float32, of the factor
    jacobian: bool = flax.struct.field(pytree_node=False, default=True)


def guidance(level: jax.Array, limit: jax.Array) -> jax.Array:
    """Factor of the pull: min(c / r^2, limit), c = level / (1 - level), r^2 = level^2 / (level^2 + (1 - level)^2).

    r^2 is the variance of data given x where data has variance 1; the authors' t is 1 - level.
    """
    return jnp.minimum((jnp.square(level) + jnp.square(1 - level)) / (level * (1 - level)), limit)


def guided_step(
    predict: Callable[[jax.Array], jax.Array], x: jax.Array, level: jax.Array, delta: jax.Array, kind: str,
    guide: Guide,
) -> jax.Array:  # fmt: skip
    """`euler_step` with the velocity less guidance * J^T ((target - estimate) * weight).

    predict(x) -> prediction. estimate = x - level * velocity is what x is believed to become, J its
    Jacobian, which without `guide.jacobian` is taken for the identity.
    """

    def estimate(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        velocity = to_velocity(predict(x), x, level, kind)
        return x - level * velocity, velocity

    if guide.jacobian:
        clean, pull, velocity = jax.vjp(estimate, x, has_aux=True)
        (change,) = pull((guide.target - clean) * guide.weight)
    else:
        clean, velocity = estimate(x)
        change = (guide.target - clean) * guide.weight
    return x + (velocity - guidance(level, guide.limit) * change) * delta


def euler(
    predict: Callable[[jax.Array, jax.Array], jax.Array], noise: jax.Array, levels: np.ndarray, kind: str,
    fix: Callable[[jax.Array], jax.Array] = lambda x: x,
):  # fmt: skip
    """Integrates from noise to data along `levels` (Eq. 5).

    `predict(x, time)` takes x shaped like noise and a scalar time. `fix(x)`: x with what is given put in its place,
    before and after every step. Returns the final x and, stacked over the steps, x before each step and the velocity
    used: (x, (x_before, velocity)).
    """

    def body(x, at):
        after, velocity = euler_step(predict(x, NUM_TRAIN_TIMES * at[0]), x, *at, kind)
        return fix(after), (x, velocity)

    return jax.lax.scan(body, fix(noise), euler_schedule(levels))


def euler_times(levels: np.ndarray) -> np.ndarray:
    """Time before every step, float32 [n], rounded as `euler` rounds it."""
    return np.float32(NUM_TRAIN_TIMES) * np.float32(levels[:-1])


def euler_schedule(levels: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Level before every step and its change, float32 [n] each."""
    return jnp.asarray(levels[:-1], jnp.float32), jnp.asarray(np.diff(levels), jnp.float32)
