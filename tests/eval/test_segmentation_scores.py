"""mIoU and accuracies against plain loops, numbers worked out by hand, and torchmetrics' own."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from etherdiff.eval.functional import (
    IGNORED,
    class_accuracies,
    class_areas,
    class_ious,
    mean_accuracy,
    mean_iou,
    pixel_accuracy,
)
from etherdiff.eval.intervals import bootstrap_sums
from etherdiff.eval.metrics import METRICS

CLASSES = 4


def maps(seed, count=3, side=5, classes=CLASSES, ignored=0.2):
    """Predicted and wanted classes (count, side, side), some of them ignored, class 0 wanted nowhere."""
    rng = np.random.default_rng(seed)
    predicted, target = rng.integers(0, classes, (count, side, side)), rng.integers(1, classes, (count, side, side))
    target[rng.random(target.shape) < ignored] = IGNORED
    return torch.from_numpy(predicted), torch.from_numpy(target)


def by_loops(predicted, target, classes=CLASSES):
    """mIoU, accuracy, mean accuracy and the IoU of each class, pixel by pixel."""
    pairs = [(int(p), int(t)) for p, t in zip(predicted.flatten(), target.flatten(), strict=True) if int(t) != IGNORED]
    ious, accuracies = [], []
    for c in range(classes):
        both = sum(p == t == c for p, t in pairs)
        either, wanted = sum(c in (p, t) for p, t in pairs), sum(t == c for _, t in pairs)
        ious.append(both / either if either else None)
        accuracies.append(both / wanted if wanted else None)
    known, told = [v for v in ious if v is not None], [v for v in accuracies if v is not None]
    right = sum(p == t for p, t in pairs)
    return sum(known) / len(known), right / len(pairs), sum(told) / len(told), ious


def computed(name, predicted, target, classes=CLASSES):
    return float(METRICS[name].make(classes)(predicted, target))


def units_of(predicted, target):
    return METRICS["miou"].count(predicted, target, size=CLASSES)


@pytest.mark.parametrize("seed", range(5))
def test_against_plain_loops(seed):
    predicted, target = maps(seed)
    miou, accuracy, mean, ious = by_loops(predicted, target)
    assert computed("miou", predicted, target) == pytest.approx(miou, abs=1e-12)
    assert computed("accuracy", predicted, target) == pytest.approx(accuracy, abs=1e-12)
    assert computed("mean_accuracy", predicted, target) == pytest.approx(mean, abs=1e-12)
    found = class_ious(class_areas(predicted, target, CLASSES).numpy())
    assert [None if math.isnan(value) else pytest.approx(value) for value in found] == ious


def test_against_torchmetrics():
    predicted, target = maps(7, count=6)
    kept = target != IGNORED
    jaccard = multiclass_jaccard_index(predicted[kept], target[kept], CLASSES, average="none")
    assert computed("miou", predicted, target) == pytest.approx(float(jaccard.mean()), abs=1e-6)
    micro = multiclass_accuracy(predicted[kept], target[kept], CLASSES, average="micro")
    assert computed("accuracy", predicted, target) == pytest.approx(float(micro), abs=1e-6)


def test_worked_out_by_hand():
    """0: 1 right of 2 wanted, nothing else found; 1: 2 right, 1 found too many; 2: occurs nowhere; 3: found once, wrong."""
    target = torch.tensor([[[0, 0, 1, 1, IGNORED, 1]]])
    predicted = torch.tensor([[[0, 1, 1, 1, 2, 3]]])
    areas = class_areas(predicted, target, CLASSES)
    assert areas.tolist() == [[1, 2, 0, 0], [1, 3, 0, 1], [2, 3, 0, 0]]
    ious = class_ious(areas.numpy())
    assert ious[[0, 1, 3]].tolist() == [1 / 2, 2 / 4, 0]
    assert math.isnan(ious[2])
    assert float(mean_iou(areas.numpy())) == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert float(pixel_accuracy(areas.numpy())) == pytest.approx(3 / 5)
    assert float(mean_accuracy(areas.numpy())) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert [math.isnan(value) for value in class_accuracies(areas.numpy())] == [False, False, True, True]


def test_areas_are_summed_over_images_before_they_are_divided():
    """A mean over images would be (1 + 0.25) / 2."""
    predicted = torch.tensor([[[1, 1, 1, 1]], [[1, 0, 0, 0]]])
    target = torch.tensor([[[1, 1, 1, 1]], [[1, 1, 1, 1]]])
    ious = class_ious(class_areas(predicted, target, 2).numpy())
    assert ious.tolist() == [0, 5 / 8]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 6))
def test_what_has_to_hold_for_all(seed, count, classes):
    predicted, target = maps(seed, count, 4, classes, ignored=0.1)
    perfect = torch.where(target == IGNORED, 0, target)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    for name in ("miou", "accuracy", "mean_accuracy"):
        value = computed(name, predicted, target, classes)
        assert 0 <= value <= 1
        assert computed(name, perfect, target, classes) == 1
        assert computed(name, predicted[order], target[order], classes) == pytest.approx(value, abs=1e-12)
        changed = torch.where(target == IGNORED, (predicted + 1) % classes, predicted)
        assert computed(name, changed, target, classes) == pytest.approx(value, abs=1e-12)
        assert METRICS[name].higher_is_better


def test_image_by_image_it_is_the_same_sum():
    predicted, target = maps(3)
    assert units_of(predicted, target).sum(0).tolist() == class_areas(predicted, target, CLASSES).tolist()


@pytest.mark.parametrize(
    ("predicted", "target", "why"),
    [
        (torch.full((1, 2, 2), CLASSES), torch.zeros(1, 2, 2, dtype=torch.int64), "there are 4"),
        (torch.zeros(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), CLASSES), "there are 4"),
        (torch.full((1, 2, 2), -1), torch.zeros(1, 2, 2, dtype=torch.int64), "from -1"),
        (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64), "integers"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 2, 2, dtype=torch.int64), "expected classes"),
    ],
)
def test_what_are_no_classes_is_refused(predicted, target, why):
    with pytest.raises(ValueError, match=why):
        units_of(predicted, target)


def test_where_everything_is_ignored_there_is_no_score():
    metric = METRICS["miou"].make(CLASSES)
    metric.update(torch.zeros(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), IGNORED))
    with pytest.raises(ValueError, match="nothing to score"):
        metric.compute()


# --- Intervals over images -------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_images_drawn_again_one_by_one():
    predicted, target = maps(11, count=12)
    units = units_of(predicted, target).numpy()
    low, high = bootstrap_sums(units, mean_iou, seed=3, draws=400)
    rng = np.random.default_rng(5)
    values = [float(mean_iou(units[rng.integers(len(units), size=len(units))].sum(0))) for _ in range(400)]
    assert (low, high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), abs=0.02)
    assert low < float(mean_iou(units.sum(0))) < high
    assert bootstrap_sums(units, mean_iou, seed=3, draws=400) == (low, high)


def test_one_image_has_no_interval_and_equal_images_have_none_of_width():
    predicted, target = maps(0, count=1)
    units = units_of(predicted, target).numpy()
    assert bootstrap_sums(units, mean_iou) is None
    low, high = bootstrap_sums(np.repeat(units, 5, axis=0), mean_iou, draws=50)
    assert low == high == pytest.approx(float(mean_iou(units.sum(0))))


def test_draws_without_a_score_are_left_out():
    nothing, something = np.zeros((3, CLASSES)), np.ones((3, CLASSES))
    assert bootstrap_sums(np.stack([nothing, nothing]), mean_iou, draws=20) is None
    assert bootstrap_sums(np.stack([nothing, something]), mean_iou, draws=200) == (1.0, 1.0)
