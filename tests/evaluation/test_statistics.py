import math

import pytest

from t3d.common.errors import UserError
from t3d.evaluation.statistics import (
    aup,
    bootstrap_interval,
    difference_interval,
    mcnemar_exact,
    mean_and_sem,
    paired_interval,
    pass_at_k,
    share_interval,
    wilson_interval,
)
from tests.conftest import raises_key


def test_wilson_against_hand_computed_values():
    # 8 of 10, z = 2: centre (0.8 + 0.2) / 1.4, half-width 2 / 1.4 * sqrt(0.016 + 0.01)
    low, high = wilson_interval(8, 10, z=2.0)
    assert low == pytest.approx(0.48393549, abs=1e-7)
    assert high == pytest.approx(0.94463594, abs=1e-7)
    # The known 95 % interval for 15 of 148.
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)


def test_wilson_at_the_ends():
    low, high = wilson_interval(0, 10)
    assert low == 0.0 and high == pytest.approx(3.841459 / 13.841459, abs=1e-5)  # z^2 / (n + z^2)
    assert wilson_interval(10, 10)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, -1)])
def test_wilson_refuses_impossible_counts(successes, n):
    with raises_key("successes"):
        wilson_interval(successes, n)


def test_mean_and_standard_error():
    mean, sem = mean_and_sem([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0
    assert sem == pytest.approx((14 / 3 / 4) ** 0.5)
    assert mean_and_sem([0.5]) == (0.5, None)
    with pytest.raises(UserError):
        mean_and_sem([])


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    from itertools import combinations

    for n, correct in ((5, 2), (6, 0), (6, 6), (7, 1)):
        answers = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            subsets = list(combinations(answers, k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for n, correct, k in ((4, 5, 1), (4, 2, 5), (4, 2, 0)):
        with raises_key("k"):
            pass_at_k(n, correct, k)


def test_the_bootstrap_finds_the_standard_error():
    values = [0.0, 0.25, 0.5, 1.0] * 50
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values[::-1]) != bootstrap_interval(values, seed=1)
    mean = sum(values) / 200
    error = (sum((value - mean) ** 2 for value in values) / 200 / 200) ** 0.5
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    with raises_key("values"):
        bootstrap_interval([])


def test_certainty_is_not_claimed_where_all_questions_agree():
    assert share_interval([1.0] * 10) == wilson_interval(10, 10)
    assert share_interval([0.0] * 10) == wilson_interval(0, 10)
    assert share_interval([0.0, 1.0] * 10) == bootstrap_interval([0.0, 1.0] * 10)


def test_equal_answers_do_not_prove_equal_models():
    """No discordant pair among 10: Wilson's bound is z^2 / (10 + z^2) = .2775, either way."""
    assert difference_interval([0.0] * 10) == (pytest.approx(-0.27753, abs=1e-4), pytest.approx(0.27753, abs=1e-4))
    low, high = difference_interval([1.0] * 10)
    assert low == pytest.approx(1 - 2 * 0.27753, abs=1e-4) and high == 1.0
    values = [0.0] * 9 + [1.0]
    assert difference_interval(values) == bootstrap_interval(values)


def test_aup_is_a_weighted_area():
    """Points out of order; the third falls by more than 5 points and does not count; the best of all methods is 90."""
    points = [(2.0, 78.0), (1.0, 80.0), (3.0, 74.0), (4.0, 76.0)]
    at = {y: y * math.exp(-3 * (1 - y / 90)) for y in (80.0, 78.0, 76.0)}
    expected = 80 + (at[80.0] + at[78.0]) / 2 + 2 * (at[78.0] + at[76.0]) / 2
    assert aup(points, best=90.0) == pytest.approx(expected)
    assert aup([(1.0, 50.0), (3.0, 50.0)], best=50.0) == pytest.approx(150.0), "no loss at all: tokens x accuracy"
    assert aup([(1.5, 0.0), (2.0, 0.0)], best=0.0) == 0.0


def test_mcnemar_against_hand_computed_values():
    assert mcnemar_exact(0, 0) == mcnemar_exact(3, 3) == 1.0
    assert mcnemar_exact(1, 5) == mcnemar_exact(5, 1) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar_exact(0, 10) == pytest.approx(2 / 1024)
    assert 0 < mcnemar_exact(400, 600) < 1e-9  # no overflow


def test_paired_interval():
    """1 and 3: mean 2, standard error 1, and 12.706 of them; three pairs: 4.303. One pair tells no interval."""
    assert paired_interval([1.0, 3.0]) == (2.0, pytest.approx(12.706))
    assert paired_interval([0.0, 3.0, 6.0]) == (3.0, pytest.approx(4.303 * 3 / 3**0.5))
    assert paired_interval([1.0]) == (1.0, None)
    assert paired_interval([0.0, 1.0] * 10)[1] == pytest.approx(2.262 * mean_and_sem([0.0, 1.0] * 10)[1])
