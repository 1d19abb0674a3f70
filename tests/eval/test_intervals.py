"""Bootstrap intervals: deterministic, right for cases that can be worked out, honest where nothing can be said."""

import numpy as np
import pytest

from etherdiff.eval.intervals import bootstrap_mean, bootstrap_pairs, jackknife


def naive_bootstrap(totals, counts, draws, seed):
    """Loop by loop, with numpy's default generator: another stream, the same distribution."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        chosen = [int(rng.integers(len(totals))) for _ in totals]
        found.append(sum(totals[i] for i in chosen) / sum(counts[i] for i in chosen))
    return np.percentile(found, [2.5, 97.5])


def test_equal_seeds_give_equal_intervals_and_others_do_not():
    totals, counts = np.random.default_rng(0).normal(size=(2, 30)) ** 2
    assert bootstrap_mean(totals, counts, seed=3) == bootstrap_mean(totals, counts, seed=3)
    assert bootstrap_mean(totals, counts, seed=3) != bootstrap_mean(totals, counts, seed=4)


def test_it_is_the_percentile_bootstrap():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, 25)
    totals = counts * rng.normal(0.5, 0.1, 25)
    low, high = bootstrap_mean(totals, counts, draws=4000)
    expected = naive_bootstrap(list(totals), list(counts), 4000, 1)
    assert (low, high) == pytest.approx(tuple(expected), abs=0.004)


def test_it_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for trial in range(200):
        values = np.random.default_rng(trial).normal(0.6, 0.2, 30)
        low, high = bootstrap_mean(values, np.ones(30), seed=trial, draws=500)
        hits += low <= 0.6 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_equal_values_have_no_width_and_a_single_unit_has_no_interval():
    assert bootstrap_mean([2.0, 4.0], [1, 2]) == (2.0, 2.0)
    assert bootstrap_mean([2.0], [1]) is None
    assert bootstrap_mean([2.0, 0.0], [1, 0]) is None
    assert bootstrap_mean([], []) is None


def test_pairs_never_count_a_thing_with_itself():
    values = np.full((4, 4), 0.5)
    np.fill_diagonal(values, 100.0)
    assert bootstrap_pairs([values]) == pytest.approx((0.5, 0.5))


def test_pairs_against_plain_loops():
    rng = np.random.default_rng(1)
    points = rng.normal(size=(12, 2))
    values = np.square(points[:, None] - points[None]).sum(-1)
    found = []
    for _ in range(4000):
        chosen = rng.integers(12, size=12)
        pairs = [values[i, j] for i in chosen for j in chosen if i != j]
        found.append(np.mean(pairs))
    assert bootstrap_pairs([values], draws=4000) == pytest.approx(tuple(np.percentile(found, [2.5, 97.5])), rel=0.07)


def test_two_things_make_one_pair_that_cannot_vary():
    assert bootstrap_pairs([np.zeros((2, 2))]) is None
    assert bootstrap_pairs([]) is None


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(2).normal(5, 1, 20)
    low, high = jackknife(lambda block: float(np.delete(values, block).mean()), 20, float(values.mean()))
    error = values.std(ddof=1) / np.sqrt(20)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), rel=1e-4)
    assert jackknife(lambda block: 0.0, 1, 0.0) is None
