"""Landmarks: how far the points of a generated face are from where the control wanted them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etherdiff.eval.image_sums import ImageSums, share

IBUG_POINTS = 68
OUTER_EYE_CORNERS = (36, 45)
"""Of iBUG's 68 points, counted from 0: the distance between them is what 300-W normalises by."""


def normaliser(points: NDArray[np.floating]) -> float:
    """What a distance in pixels is divided by: between the outer eye corners of 68 points, else the points' box's diagonal.

    Raises:
        ValueError: it is 0, so the points are no face.
    """
    if len(points) == IBUG_POINTS:
        one, other = points[list(OUTER_EYE_CORNERS)].astype(np.float64)
    else:
        one, other = points.min(0).astype(np.float64), points.max(0).astype(np.float64)
    length = float(np.linalg.norm(one - other))
    if not length > 0:
        raise ValueError("landmarks that all lie in one place")
    return length


def normalised_error(found: NDArray[np.floating], wanted: NDArray[np.floating]) -> float:
    """Normalised mean error (Sagonas et al. 2013): the points' mean distance over the `normaliser` of the wanted ones.

    Args:
        found, wanted: (P, 2), x and y in pixels, point by point the same ones.

    Raises:
        ValueError: other shapes, or points that are not finite.
    """
    if found.shape != wanted.shape or found.ndim != 2 or found.shape[1] != 2 or not len(found):
        raise ValueError(f"expected the same points (P, 2), got {found.shape} and {wanted.shape}")
    if not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        raise ValueError("landmarks that are not finite")
    distances = np.linalg.norm(found.astype(np.float64) - wanted.astype(np.float64), axis=1)
    return float(distances.mean()) / normaliser(wanted)


def mean_error(sums: NDArray[Any]) -> NDArray[np.float64]:
    """Sums of errors and of images (..., 2) to the mean error (...); NaN without an image."""
    return share(sums[..., 0], sums[..., 1])


class LandmarksError(ImageSums):
    """Mean `normalised_error` over images. At least 0; lower is better. Images without a detected face are not in it."""

    higher_is_better = False
    of_sums = staticmethod(mean_error)

    def __init__(self) -> None:
        super().__init__((2,), torch.float64)

    def counts(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Points of generated faces and of their controls, (B, P, 2) in pixels, to the error and 1 for each: (B, 2)."""
        if found.shape != wanted.shape or found.ndim != 3:
            raise ValueError(f"expected the same points (B, P, 2), got {tuple(found.shape)} and {tuple(wanted.shape)}")
        both = zip(found.cpu().numpy(), wanted.cpu().numpy(), strict=True)
        return torch.tensor([[normalised_error(one, other), 1.0] for one, other in both], dtype=torch.float64)
