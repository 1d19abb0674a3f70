"""F1 of edges against plain loops, and what the tolerance forgives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etherdiff.eval.functional import edge_counts
from etherdiff.eval.metrics import METRICS


def lines(seed, count=2, side=7, share=0.3):
    return torch.from_numpy(np.random.default_rng(seed).random((count, side, side)) < share)


def by_loops(found, wanted, tolerance):
    """Precision and recall over the pixels of all images, pixel by pixel."""

    def near(pixel, edges):
        return any(max(abs(pixel[0] - y), abs(pixel[1] - x)) <= tolerance for y, x in edges)

    hits = total = covered = asked = 0
    for one, other in zip(found.tolist(), wanted.tolist(), strict=True):
        ours, theirs = ([(y, x) for y, row in enumerate(m) for x, on in enumerate(row) if on] for m in (one, other))
        hits, total = hits + sum(near(p, theirs) for p in ours), total + len(ours)
        covered, asked = covered + sum(near(p, ours) for p in theirs), asked + len(theirs)
    precision, recall = hits / total if total else 0, covered / asked if asked else 0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def computed(name, found, wanted):
    return float(METRICS[name].make()(found, wanted))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.02, 0.9))
def test_against_plain_loops(seed, share):
    found, wanted = lines(seed, share=share), lines(seed + 1)
    exact, near = computed("edges_f1", found, wanted), computed("edges_f1_within_1", found, wanted)
    assert exact == pytest.approx(by_loops(found, wanted, 0), abs=1e-12)
    assert near == pytest.approx(by_loops(found, wanted, 1), abs=1e-12)
    assert 0 <= exact <= near <= 1
    assert computed("edges_f1", wanted, wanted) == computed("edges_f1_within_1", wanted, wanted) == 1
    assert computed("edges_f1", found.flip(0), wanted.flip(0)) == pytest.approx(exact, abs=1e-12)
    assert computed("edges_f1", wanted, found) == pytest.approx(exact, abs=1e-12)


def test_exactly_it_is_dices_coefficient():
    found, wanted = lines(1), lines(2)
    dice = 2 * int((found & wanted).sum()) / (int(found.sum()) + int(wanted.sum()))
    assert computed("edges_f1", found, wanted) == pytest.approx(dice, abs=1e-12)


def test_a_line_that_is_off_by_one_is_found_within_one_and_not_off_by_two():
    wanted = torch.zeros(1, 8, 8, dtype=torch.bool)
    wanted[0, :, 3] = True
    assert computed("edges_f1", wanted.roll(1, 2), wanted) == 0
    assert computed("edges_f1_within_1", wanted.roll(1, 2), wanted) == 1
    assert computed("edges_f1_within_1", wanted.roll(2, 2), wanted) == 0


def test_no_edge_found_is_0_and_none_on_either_side_is_no_score():
    nothing, something = torch.zeros(1, 4, 4, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool)
    assert computed("edges_f1", nothing, something) == computed("edges_f1", something, nothing) == 0
    with pytest.raises(ValueError, match="nothing to score"):
        computed("edges_f1", nothing, nothing)


def test_what_are_no_edges_is_refused():
    with pytest.raises(ValueError, match="bool"):
        edge_counts(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool"):
        edge_counts(lines(0, side=4), lines(0, side=5))
