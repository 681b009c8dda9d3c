"""Statistics of results: intervals, means, tests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from t3d.common.errors import UserError


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a share of successes (Wilson 1927, JASA 22); the default z gives 95 %.

    Unlike the textbook interval it stays inside [0, 1] and keeps a width at 0 and at n successes. Without trials it is
    (0, 1).
    """
    if n < 0 or not 0 <= successes <= n:
        raise UserError(
            f"wilson_interval: {successes} successes of {n} is impossible; give 0 <= successes <= n", "successes"
        )
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # With no success or only successes, one end is exactly 0 or 1. Rounding must not change it.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def mean_and_sem(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean (sample deviation, n - 1); one value has no standard error: None."""
    if not values:
        raise UserError("mean_and_sem: no values; give at least one", "values")
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return fmean(values), error


# 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom (any table of the distribution)
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def paired_interval(differences: Sequence[float]) -> tuple[float, float | None]:
    """Mean of paired differences and the half-width of its 95 % interval by Student's t (1908); None for one pair.

    For more than ten pairs the quantile of ten is used, so the interval is a little wide.
    """
    mean, error = mean_and_sem(differences)
    return mean, None if error is None else _T[min(len(differences) - 1, len(_T)) - 1] * error


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The probability that at least one of `k` answers is right: 1 - C(n - correct, k) / C(n, k).

    It is an unbiased estimate from `n` answers, of which `correct` are right (Chen et al. 2021, arXiv 2107.03374,
    equation 1).
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise UserError(
            f"pass_at_k: {correct} of {n} right, k={k} is impossible; give 0 <= right <= n, 1 <= k <= n", "k"
        )
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def bootstrap_interval(values: Sequence[float], resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over questions, by drawing questions with replacement (Efron 1979).

    `values` holds one number per question: questions are independent, answers to one question are not. The draws depend
    only on `seed`. Only distinct values matter, so a resample is one multinomial draw over them.
    """
    import numpy as np

    if not len(values):
        raise UserError("bootstrap_interval: no values; give one per question", "values")
    distinct, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    low, high = np.quantile(draws @ distinct / len(values), (0.025, 0.975))
    return float(low), float(high)


def share_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean of shares in [0, 1], one share per question, by the bootstrap.

    If all questions have 0 or all have 1, resampling would claim certainty. Then the interval is Wilson's.
    """
    if all(value == values[0] for value in values) and values[0] in (0, 1):
        return wilson_interval(round(sum(values)), len(values))
    return bootstrap_interval(values)


def difference_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean of paired differences in [-1, 1], one difference per question, by the bootstrap.

    If all questions have the same difference, resampling would claim certainty. Then a share h of the questions may
    have any difference from -1 to 1. h is Wilson's upper bound for 0 successes of n.
    """
    if any(value != values[0] for value in values):
        return bootstrap_interval(values)
    same, otherwise = values[0], wilson_interval(0, len(values))[1]
    return max(-1.0, same - otherwise * (1 + same)), min(1.0, same + otherwise * (1 - same))


def aup(points: Iterable[tuple[float, float]], best: float, alpha: float = 3.0, tolerance: float = 5.0) -> float:
    """Accuracy under parallelism: the weighted area under accuracy (per cent) against tokens per forward.

    Definition and constants are d3LLM's (arXiv 2601.07568; get_aup of its AUP_leaderboard). In order of tokens per
    forward rho_1 < rho_2 < ..., of the points whose accuracy y_i is at least y_1 - `tolerance`:

        rho_1 y_1 + sum_{i > 1} (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2
        W(y) = min(exp(-alpha (1 - y / best)), 1)

    points: (tokens per forward, accuracy in per cent). best: the highest accuracy of all methods compared.
    """
    ordered = sorted(points)
    kept = [(rho, y) for rho, y in ordered if y >= ordered[0][1] - tolerance]
    height = [y * min(math.exp(-alpha * (1 - y / best)), 1.0) if best else 0.0 for _, y in kept]
    steps = ((kept[i][0] - kept[i - 1][0]) * (height[i] + height[i - 1]) / 2 for i in range(1, len(kept)))
    return kept[0][0] * kept[0][1] + math.fsum(steps)


def mcnemar_exact(first_only: int, second_only: int) -> float:
    """Two-sided exact p-value of McNemar's test (1947).

    It tests whether the questions that only one of two models answers correctly split like tosses of a fair coin.
    Without such questions it is 1.
    """
    n, least = first_only + second_only, min(first_only, second_only)
    tail = sum(math.comb(n, i) for i in range(least + 1))
    return min(1.0, 2 * tail / 2**n)  # whole numbers until the last division: exact for any n
