"""Randomness without hidden state: numbers depend on what they are for, and on nothing that happened before."""

import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch

from etherdiff.train.randomness import Draw, generator, integer, item_at, normal, uniform

HUGE = 2**63 - 1
PLACES = [
    (seed, draw, step, index) for seed in (0, 1) for draw in (Draw.NOISE, Draw.FLIP) for step in (0, 7) for index in (0, 3)
]


def test_draws_depend_on_their_place_alone():
    first = {place: (normal((5,), *place), integer(1000, *place), uniform(*place)) for place in PLACES}
    torch.manual_seed(123)
    np.random.seed(123)
    for place in reversed(PLACES):
        numbers, whole, share = first[place]
        assert torch.equal(normal((5,), *place), numbers)
        assert (integer(1000, *place), uniform(*place)) == (whole, share)


def test_global_generators_are_left_alone():
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    normal((5,), 0, Draw.NOISE, 0, 0)
    item_at(17, 5, 0, Draw.ORDER)
    assert (np.random.get_state()[1] == before).all()
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_numbers_are_numpys_philox_at_a_jump():
    """The reference reaches the place by advancing one stream instead of by setting its counter."""
    step, index = 5, 3
    bits = np.random.Philox(key=np.array([11, Draw.NOISE], dtype=np.uint64))
    bits.advance((step << 192) + (index << 128))
    expected = np.random.Generator(bits).standard_normal(9, dtype=np.float32)
    assert np.array_equal(normal((9,), 11, Draw.NOISE, step, index).numpy(), expected)


def test_another_process_draws_the_same():
    code = "from etherdiff.train.randomness import *; print(repr(normal((3,), 5, Draw.NOISE, 9, 2).tolist()))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == repr(normal((3,), 5, Draw.NOISE, 9, 2).tolist())


def test_distinct_places_give_distinct_and_uncorrelated_streams():
    around = [(0, Draw.NOISE, 0, 0), (1, Draw.NOISE, 0, 0), (0, Draw.CLASS_NOISE, 0, 0), (0, Draw.NOISE, 1, 0)]
    around += [(0, Draw.NOISE, 0, 1), (0, Draw.NOISE, 1, 1), (0, Draw.NOISE, 2, 1), (0, Draw.NOISE, 1, 2)]
    streams = torch.stack([normal((40_000,), *place) for place in around])
    correlation = torch.corrcoef(streams) - torch.eye(len(around))
    assert correlation.abs().max() < 5 / 200  # five standard errors of 1 / sqrt(n)
    # nor is any stream another one shifted: their values do not meet
    for a, b in combinations(streams, 2):
        assert len(np.intersect1d(a.numpy(), b.numpy())) < 0.01 * len(a)


def test_every_purpose_has_its_own_number():
    assert len({int(draw) for draw in Draw}) == len(Draw)
    assert len({uniform(0, draw, 0, 0) for draw in Draw}) == len(Draw)


def test_neighbouring_samples_and_steps_are_independent():
    table = np.array([[uniform(3, Draw.CAPTION_DROPOUT, step, index) for index in range(40)] for step in range(40)])
    assert abs(table.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / 40
    along_index = np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]
    along_step = np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]
    assert abs(along_index) < 5 / 40
    assert abs(along_step) < 5 / 40


def test_normal_has_the_moments_of_a_standard_normal():
    drawn = normal((4, 250_000), 1, Draw.NOISE, 2, 3)
    assert drawn.dtype == torch.float32
    assert drawn.shape == (4, 250_000)
    x = drawn.double().flatten()
    n = len(x)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean().item() - moment) < 5 * (variance / n) ** 0.5


def test_integers_cover_their_range_evenly():
    drawn = [integer(8, 0, Draw.CROP, step, 0) for step in range(4000)]
    counts = np.bincount(drawn, minlength=8)
    assert len(counts) == 8
    assert ((counts - 500) ** 2 / 500).sum() < 30  # chi-squared with 7 degrees of freedom: p < 1e-4 above
    assert integer(1, 0, Draw.CROP, 0, 0) == 0


@pytest.mark.parametrize("count", [1, 2, 5, 200])
def test_each_item_is_visited_once_per_pass(count):
    order = [item_at(position, count, 0, Draw.ORDER) for position in range(3 * count)]
    passes = [order[start : start + count] for start in range(0, 3 * count, count)]
    assert all(sorted(once) == list(range(count)) for once in passes)
    if count >= 5:
        assert passes[0] != passes[1] != passes[2]
    other = [item_at(position, count, 0, Draw.CLASS_ORDER) for position in range(3 * count)]
    assert count == 1 or other != order


def test_shuffles_reach_every_order():
    orders = {tuple(item_at(3 * epoch + i, 3, 0, Draw.ORDER) for i in range(3)) for epoch in range(100)}
    assert len(orders) == 6


def test_the_order_can_be_asked_for_in_any_order():
    forward = [item_at(position, 7, 2, Draw.ORDER) for position in range(140)]
    assert [item_at(position, 7, 2, Draw.ORDER) for position in reversed(range(140))] == forward[::-1]


def test_the_largest_seeds_and_steps_work():
    places = [(HUGE, Draw.NOISE, HUGE, HUGE), (HUGE, Draw.NOISE, HUGE, 0), (HUGE - 1, Draw.NOISE, HUGE, HUGE)]
    drawn = [tuple(normal((4,), *place).tolist()) for place in places]
    assert len(set(drawn)) == 3
    # float64 cannot tell these seeds apart; numpy's words must
    assert not torch.equal(normal((4,), HUGE, Draw.NOISE, 0, 0), normal((4,), HUGE - 1, Draw.NOISE, 0, 0))
    assert 0 <= item_at(HUGE, 5, HUGE, Draw.ORDER) < 5


@pytest.mark.parametrize("place", [(-1, Draw.NOISE, 0, 0), (0, Draw.NOISE, -1, 0), (2**64, Draw.NOISE, 0, 0)])
def test_places_that_do_not_exist_are_refused(place):
    with pytest.raises((OverflowError, ValueError)):
        generator(*place)
