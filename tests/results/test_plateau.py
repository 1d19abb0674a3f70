"""How wide the good learning rates are, against numbers worked out by hand."""

import math

import pytest

from etherdiff.results.plateau import find_plateau


def test_between_neighbours_the_score_runs_straight_over_the_logarithm():
    plateau = find_plateau([(1e-4, 0.5), (1e-3, 1.0), (1e-2, 0.95), (1e-1, 0.8), (1.0, 0.1)])
    # 0.9 lies a fifth of the way from 1.0 down to 0.5, and a third of the way from 0.95 down to 0.8
    assert math.log10(plateau.low) == pytest.approx(-3 - 1 / 5)
    assert math.log10(plateau.high) == pytest.approx(-2 + 1 / 3)
    assert plateau.decades == pytest.approx(1 + 1 / 3 + 1 / 5)
    assert not plateau.is_lower_bound


def test_the_grid_need_not_be_even():
    plateau = find_plateau([(1e-3, 0.0), (2e-3, 1.0), (5e-3, 0.0)])
    assert plateau.low == pytest.approx(2e-3 / 2**0.1)
    assert plateau.high == pytest.approx(2e-3 * 2.5**0.1)


@pytest.mark.parametrize(("scores", "low", "high", "is_open"), [
    ((1.0, 0.95, 0.5), 1e-3, 10 ** (-2 + 1 / 9), (True, False)),
    ((0.5, 0.95, 1.0), 10 ** (-2 - 1 / 9), 1e-1, (False, True)),
    ((0.95, 1.0, 0.9), 1e-3, 1e-1, (True, True)),
])  # fmt: skip
def test_an_end_that_is_still_good_is_open(scores, low, high, is_open):
    plateau = find_plateau(list(zip((1e-3, 1e-2, 1e-1), scores, strict=True)))
    assert (plateau.low, plateau.high) == (pytest.approx(low), pytest.approx(high))
    assert (plateau.open_low, plateau.open_high) == is_open
    assert plateau.is_lower_bound


def test_only_what_is_contiguous_with_the_best_counts():
    plateau = find_plateau([(1e-5, 0.99), (1e-4, 0.0), (1e-3, 1.0), (1e-2, 0.0), (1e-1, 0.95)])
    assert plateau.decades == pytest.approx(0.2)
    assert not plateau.is_lower_bound


def test_where_a_run_failed_the_range_ends_at_the_rate_before():
    plateau = find_plateau([(1e-4, None), (1e-3, 0.95), (1e-2, 1.0), (1e-1, None), (1.0, 1.0)])
    assert (plateau.low, plateau.high, plateau.is_lower_bound) == (1e-3, 1e-2, False)


def test_of_scores_of_which_lower_is_better_the_best_over_the_share_is_kept():
    plateau = find_plateau([(1e-3, 30.0), (1e-2, 18.0), (1e-1, 19.0), (1.0, 23.0)], higher_is_better=False)
    # kept is 18 / 0.9 = 20: a sixth of the way from 18 to 30, a quarter of the way from 19 to 23
    assert math.log10(plateau.low) == pytest.approx(-2 - 1 / 6)
    assert math.log10(plateau.high) == pytest.approx(-1 + 1 / 4)


def test_one_rate_alone_has_no_width_and_no_end():
    plateau = find_plateau([(1e-3, 0.6)])
    assert (plateau.decades, plateau.open_low, plateau.open_high) == (0.0, True, True)


@pytest.mark.parametrize("points", [[], [(1e-3, None)], [(1e-3, -0.1), (1e-2, -0.2)], [(1e-3, 0.0)]])
def test_without_a_score_above_zero_there_is_none(points):
    assert find_plateau(points) is None
