"""mIoU and accuracy: whether the classes that a segmenter sees in a generated image are where the map wanted them.

Both come from three areas per class, summed over all images, as in mmsegmentation's `IoUMetric`: pixels that are of the class
in prediction and target (the diagonal of the confusion matrix), in the prediction (its columns' sums) and in the target (its
rows' sums). Pixels that the target ignores are in none of them.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etherdiff.eval.image_sums import ImageSums, share

IGNORED = 255
"""The target's value of a pixel that is of no class: it is not looked at, whatever is predicted there."""
AGREED, PREDICTED, WANTED = range(3)


def class_areas(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """Pixels of each class: int64 (3, `classes`), its rows `AGREED`, `PREDICTED` and `WANTED`.

    Args:
        predicted: class indices, 0 to `classes` - 1, of any shape.
        target: the same, or `IGNORED`.

    Raises:
        ValueError: shapes that differ, values that are no integers, or a class that there is not.
    """
    if predicted.shape != target.shape:
        raise ValueError(f"{tuple(predicted.shape)} predicted pixels and {tuple(target.shape)} wanted ones")
    if predicted.is_floating_point() or target.is_floating_point():
        raise ValueError("class indices must be integers")
    looked_at = target != IGNORED
    ours, theirs = predicted[looked_at].long(), target[looked_at].long()
    for name, values in (("predicted", ours), ("wanted", theirs)):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < classes:
            raise ValueError(f"{name}: classes from {int(values.min())} to {int(values.max())}, but there are {classes}")
    found = (ours[ours == theirs], ours, theirs)
    return torch.stack([torch.bincount(values, minlength=classes) for values in found])


def class_ious(areas: NDArray[Any]) -> NDArray[np.float64]:
    """Areas (..., 3, C) to |predicted ∩ wanted| / |predicted ∪ wanted| (..., C); NaN for classes that are in neither."""
    agreed = areas[..., AGREED, :]
    return share(agreed, areas[..., PREDICTED, :] + areas[..., WANTED, :] - agreed)


def class_accuracies(areas: NDArray[Any]) -> NDArray[np.float64]:
    """Areas (..., 3, C) to |predicted ∩ wanted| / |wanted| (..., C); NaN for classes that no target has."""
    return share(areas[..., AGREED, :], areas[..., WANTED, :])


def mean_iou(areas: NDArray[Any]) -> NDArray[np.float64]:
    """Areas (..., 3, C) to the mean of `class_ious` over the classes that occur (...); NaN where none does."""
    ious = class_ious(areas)
    occur = ~np.isnan(ious)
    return share(np.where(occur, ious, 0.0).sum(-1), occur.sum(-1))


def mean_accuracy(areas: NDArray[Any]) -> NDArray[np.float64]:
    """Areas (..., 3, C) to the mean of `class_accuracies` over the classes that targets have (...); NaN where none does."""
    accuracies = class_accuracies(areas)
    occur = ~np.isnan(accuracies)
    return share(np.where(occur, accuracies, 0.0).sum(-1), occur.sum(-1))


def pixel_accuracy(areas: NDArray[Any]) -> NDArray[np.float64]:
    """Areas (..., 3, C) to the share of pixels whose class is the one wanted (...); NaN without any pixel."""
    return share(areas[..., AGREED, :].sum(-1), areas[..., WANTED, :].sum(-1))


class _OfAreas(ImageSums):
    """A score of the areas of classes."""

    higher_is_better = True
    plot_upper_bound = 1.0

    def __init__(self, classes: int) -> None:
        super().__init__((3, classes), torch.int64)
        self.classes = classes

    def counts(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Class indices (B, H, W), `IGNORED` in what is wanted, to `class_areas` (B, 3, C)."""
        if found.shape != wanted.shape or found.ndim != 3:
            raise ValueError(f"expected classes (B, H, W) twice, got {tuple(found.shape)} and {tuple(wanted.shape)}")
        return torch.stack([class_areas(one, other, self.classes) for one, other in zip(found, wanted, strict=True)])


class MeanIoU(_OfAreas):
    """mIoU: the mean over classes of intersection / union, each summed over all images; classes in neither do not count.

    In [0, 1]; higher is better.
    """

    of_sums = staticmethod(mean_iou)


class PixelAccuracy(_OfAreas):
    """The share of all pixels whose class is the one wanted (aAcc). In [0, 1]; higher is better."""

    of_sums = staticmethod(pixel_accuracy)


class MeanAccuracy(_OfAreas):
    """mAcc: the mean over the wanted classes of the share of their pixels that are found so. In [0, 1]; higher is better."""

    of_sums = staticmethod(mean_accuracy)
