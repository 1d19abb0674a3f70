"""Normalised errors of landmarks, by hand and point by point."""

import math

import numpy as np
import pytest
import torch

from etherdiff.eval.functional import normalised_error, normaliser
from etherdiff.eval.metrics import METRICS


def face(seed=0, points=68):
    return np.random.default_rng(seed).uniform(0, 64, (points, 2))


def test_68_points_are_measured_by_the_outer_eye_corners():
    wanted = face()
    wanted[36], wanted[45] = (10, 20), (40, 60)
    assert normaliser(wanted) == 50
    assert normalised_error(wanted + np.array((3, 4)), wanted) == pytest.approx(5 / 50)


def test_other_points_are_measured_by_their_boxs_diagonal():
    wanted = np.array([(0.0, 0.0), (30.0, 0.0), (0.0, 40.0)])
    assert normaliser(wanted) == 50
    assert normalised_error(np.array([(0.0, 10.0), (30.0, 0.0), (5.0, 40.0)]), wanted) == pytest.approx((10 + 0 + 5) / 3 / 50)


@pytest.mark.parametrize("points", [5, 68])
def test_the_score_is_the_mean_over_images_whatever_the_batches(points):
    found, wanted = ([face(seed + 10 * side, points) for seed in range(4)] for side in (0, 1))
    expected = []
    for one, other in zip(found, wanted, strict=True):
        apart = [math.dist(a, b) for a, b in zip(one, other, strict=True)]
        expected.append(sum(apart) / len(apart) / normaliser(other))
    whole, parts = METRICS["landmarks_error"].make(), METRICS["landmarks_error"].make()
    whole.update(torch.from_numpy(np.stack(found)), torch.from_numpy(np.stack(wanted)))
    for one, other in zip(found, wanted, strict=True):
        parts.update(torch.from_numpy(one[None]), torch.from_numpy(other[None]))
    assert float(whole.compute()) == pytest.approx(np.mean(expected), abs=1e-12)
    assert float(parts.compute()) == pytest.approx(np.mean(expected), abs=1e-12)
    assert not METRICS["landmarks_error"].higher_is_better


def test_the_same_points_have_no_error_and_moving_or_scaling_both_changes_nothing():
    found, wanted = face(1), face(2)
    assert normalised_error(wanted, wanted) == 0
    assert normalised_error(found * 3 + 7, wanted * 3 + 7) == pytest.approx(normalised_error(found, wanted))


def test_what_are_no_landmarks_is_refused():
    with pytest.raises(ValueError, match="same points"):
        normalised_error(face(points=5), face(points=6))
    with pytest.raises(ValueError, match="one place"):
        normalised_error(face(points=5), np.ones((5, 2)))
    with pytest.raises(ValueError, match="finite"):
        normalised_error(np.full((5, 2), np.nan), face(points=5))
    with pytest.raises(ValueError, match="same points"):
        METRICS["landmarks_error"].make().update(torch.zeros(2, 5, 2), torch.zeros(2, 6, 2))
