"""Small, honest statistics for results."""

from __future__ import annotations

import math
from collections.abc import Sequence

from t3d.errors import UserError


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a share of successes (Wilson 1927, JASA 22); the default z gives 95 %.

    Unlike the textbook interval it stays inside [0, 1] and keeps a width at 0 and at n successes. Without trials
    nothing is known: (0, 1).
    """
    if n < 0 or not 0 <= successes <= n:
        raise UserError(f"wilson_interval: {successes} successes of {n} is impossible; give 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the interval touches 0 or 1 exactly; rounding must not say otherwise.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def mean_and_sem(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean (sample deviation, n - 1); one value has no standard error: None."""
    if not values:
        raise UserError("mean_and_sem: no values; give at least one")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
