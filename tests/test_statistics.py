import pytest

from t3d.errors import UserError
from t3d.statistics import mean_and_sem, wilson_interval


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
    with pytest.raises(UserError, match="impossible"):
        wilson_interval(successes, n)


def test_mean_and_standard_error():
    mean, sem = mean_and_sem([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0
    assert sem == pytest.approx((14 / 3 / 4) ** 0.5)
    assert mean_and_sem([0.5]) == (0.5, None)
    with pytest.raises(UserError):
        mean_and_sem([])
