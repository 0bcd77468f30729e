"""How sure a rate of success is."""

import math


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % score interval of a binomial proportion."""
    z = 1.959964
    p, n = successes / trials, trials
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
