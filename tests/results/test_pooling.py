"""Averages over seeds and subjects, and their intervals, against NumPy, SciPy and `eval.compare`."""

import math

import numpy as np
import pytest
from scipy import stats
from synthetic_runs import change_result, write_run

from etherdiff.eval.compare import combine_subjects
from etherdiff.results.pooling import find_plateau, pool_numbers, pool_scores, scored, t_interval
from etherdiff.results.runs import collect

SUBJECTS = ("ball", "box", "cup", "star", "lamp", "hat")


def runs_of(folder, means, **settings):
    """(subject, seed) -> mean of dino."""
    for (subject, seed), mean in means.items():
        write_run(folder / f"{subject}-{seed}", {"dino": mean}, subject=subject, seed=seed, **settings)
    return scored(collect([folder]).runs)


def test_one_run_has_its_own_interval(tmp_path):
    cell = pool_scores(runs_of(tmp_path, {("ball", 0): 0.6}), "dino")
    assert (cell.mean, cell.low, cell.high, cell.over) == (0.6, 0.59, 0.61, "25 prompts")


def test_seeds_of_one_subject_have_a_t_interval(tmp_path):
    values = [0.60, 0.64, 0.59]
    cell = pool_scores(runs_of(tmp_path, {("ball", seed): value for seed, value in enumerate(values)}), "dino")
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (cell.mean, cell.low, cell.high) == (pytest.approx(np.mean(values)), pytest.approx(low), pytest.approx(high))
    assert cell.over == "3 seeds"
    assert sorted(cell.values.values()) == sorted(values)


def test_the_t_interval_by_hand():
    # mean 2, s = 1, t(0.975, 2) = 4.302653
    assert t_interval([1.0, 2.0, 3.0]) == (pytest.approx(2 - 4.302653 / 3**0.5), pytest.approx(2 + 4.302653 / 3**0.5))
    assert t_interval([1.0]) is None


def test_subjects_are_pooled_as_the_table_over_subjects_is(tmp_path):
    means = dict(zip(SUBJECTS, (0.5, 0.55, 0.6, 0.62, 0.64, 0.7), strict=True))
    runs = runs_of(tmp_path, {(subject, 0): mean for subject, mean in means.items()})
    expected = combine_subjects({subject: result.model_dump() for _, subject, result in runs})["scores"]["dino"]
    cell = pool_scores(runs, "dino")
    assert (cell.mean, cell.low, cell.high) == pytest.approx((expected["mean"], expected["low"], expected["high"]))
    assert cell.mean == pytest.approx(np.mean(list(means.values())))
    assert cell.over == "6 subjects"


def test_seeds_of_a_subject_are_averaged_before_subjects_are(tmp_path):
    means = {(subject, 0): 0.6 for subject in SUBJECTS[1:]} | {("ball", 0): 0.2, ("ball", 1): 0.3, ("ball", 2): 0.4}
    cell = pool_scores(runs_of(tmp_path, means), "dino")
    assert cell.mean == pytest.approx((0.3 + 5 * 0.6) / 6)
    assert len(cell.values) == 8


def test_with_few_subjects_their_prompts_are_drawn_again(tmp_path):
    cell = pool_scores(runs_of(tmp_path, {("ball", 0): 0.6, ("ball", 1): 0.62, ("box", 0): 0.5}), "dino")
    assert cell.mean == pytest.approx((0.61 + 0.5) / 2)
    assert cell.over == "10 prompts"
    assert cell.low < cell.mean < cell.high


def test_fid_is_not_averaged_over_subjects(tmp_path):
    runs = runs_of(tmp_path, {("ball", 0): 0.6, ("box", 0): 0.5})
    for run in runs:
        run.result.scores["fid"] = run.result.scores["dino"]
    assert pool_scores(runs, "fid") is None
    assert pool_scores(runs[:1], "fid") is not None


def test_a_run_without_the_score_is_not_in_it(tmp_path):
    runs = runs_of(tmp_path, {("ball", 0): 0.6, ("ball", 1): 0.7})
    change_result(tmp_path / "ball-1", lambda result: result["scores"].pop("dino"))
    cell = pool_scores(scored(collect([tmp_path]).runs), "dino")
    assert (cell.mean, len(cell.values)) == (0.6, 1)
    assert pool_scores(runs, "clip_t") is None


def test_numbers_without_intervals_of_their_own():
    seeds = pool_numbers({"a": ("ball", 1.0), "b": ("ball", 2.0), "c": ("ball", 3.0)})
    assert (seeds.mean, seeds.low, seeds.over) == (2.0, pytest.approx(2 - 4.302653 / 3**0.5), "3 seeds")
    equal = pool_numbers({"a": ("ball", 5.0), "b": ("box", 5.0)})
    assert (equal.mean, equal.low, equal.over) == (5.0, None, "")
    few = pool_numbers({"a": ("ball", 1.0), "b": ("ball", 3.0), "c": ("box", 4.0)})
    assert (few.mean, few.low) == (3.0, None)
    many = pool_numbers({subject: (subject, float(number)) for number, subject in enumerate(SUBJECTS)})
    assert (many.mean, many.over) == (2.5, "6 subjects")
    assert many.low < 2.5 < many.high
    assert pool_numbers({}) is None


# --- Plateaus ---------------------------------------------------------------------------------------------------------


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
