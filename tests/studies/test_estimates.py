import pytest

from studies.storymath.estimates import Estimate, at_speed, best, by_method, difference, dynamic, estimate, signed
from tests.conftest import raises_key

from .figures import METHODS, RUNS, SPLITS, run

TEST = SPLITS[0]


def test_over_seeds_the_error_is_that_of_the_seeds():
    """.60 and .70: deviation .0707, over the root of 2: 5 points."""
    two = [run("t3d", 1, (0.9, 0.8, 0.6)), run("t3d", 2, (0.9, 0.9, 0.7))]
    found = estimate(two, at_speed(TEST, 4.0))
    assert (found.mean, found.error, found.seeds, found.interval) == (pytest.approx(65), pytest.approx(5), 2, None)
    assert found.text() == "65.0 ± 5.0" and found.bars() == pytest.approx((5, 5))
    both = estimate(two, at_speed(TEST, 2.0, 4.0))  # .70 and .80
    assert both.text() == "75.0 ± 5.0"


def test_of_one_seed_the_interval_is_that_of_its_questions():
    one = estimate([run("t3d", 1, (0.9, 0.8, 0.6))], at_speed(TEST, 4.0))
    assert one.text() == "60.0 (58.0–62.0)" and one.bars() == pytest.approx((2, 2))
    assert one.error == pytest.approx(2 / 1.959964)
    mean = estimate([run("t3d", 1, (0.9, 0.8, 0.6))], at_speed(TEST, 2.0, 4.0))
    assert mean.text() == "70.0" and mean.interval is None
    assert mean.error == pytest.approx(2 / 1.959964), "the two speeds answer the same questions"
    speed = estimate([run("t3d", 1, (0.9, 0.8, 0.6))], dynamic, "measured_tokens_per_step")
    assert speed.text(2) == "2.00" and speed.error is None


def test_the_best_is_told_only_beyond_the_error_of_the_difference():
    low, near = Estimate(50.0, 3.0, 3), Estimate(54.9, 4.0, 3)  # 5 apart would be their error
    assert best([low, near]) is None
    assert best([low, Estimate(55.1, 4.0, 3)]) == 1
    assert best([Estimate(99.0, 0.1, 3), low, near]) == 0, "the third does not matter"
    assert best([low]) is None and best([low, Estimate(90.0, None, 1)]) is None
    assert best([low, low]) is None
    assert best([low, Estimate(90.0, 1.0, 1)]) is None, "errors of two kinds"


def test_differences_pair_seeds():
    """t3d less original at 4 tokens per step: seed 1 .6 - .2, seed 3 .7 - .25: 42.5 +- 12.706 * 2.5."""
    runs = by_method(RUNS, 4, list(METHODS))
    found = difference(runs["t3d"], runs["original"], at_speed(TEST, 4.0))
    assert (found.mean, found.half, found.pairs) == (pytest.approx(42.5), pytest.approx(31.765), 2)
    assert found.text() == "+42.5 ± 31.8" and found.other == pytest.approx(22.5)
    one = difference(runs["t3d"][:1], runs["original"], at_speed(TEST, 4.0))
    assert one.text() == "+40.0" and one.pairs == 1
    assert difference(runs["t3d"][:1], runs["original"][1:], at_speed(TEST, 4.0)) is None


def test_signs():
    assert [signed(points) for points in (0.04, -0.04, -0.06, 2)] == ["+0.0", "+0.0", "-0.1", "+2.0"]


def test_runs_stand_in_the_order_of_the_names_and_seeds():
    found = by_method([*RUNS[::-1]], 4, list(METHODS))
    assert list(found) == ["original", "redi", "t3d"] and [run["seed"] for run in found["original"]] == [1, 2, 3]
    assert list(by_method(RUNS, 8, list(METHODS))) == ["original", "t3d"]


def test_a_figure_that_is_missing_or_doubled_is_told():
    broken = run("t3d", 3, (0.9, 0.8))
    with raises_key("rows", "t3d, block 4, seed 3: 0 figures", "StoryMath_test"):
        estimate([broken], at_speed(TEST, 4.0))
    doubled = broken | {"rows": broken["rows"] * 2}
    with raises_key("rows", "2 figures"):
        estimate([doubled], dynamic)
