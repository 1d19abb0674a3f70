"""Edges: whether a generated image has its edges where the control image has them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from etherdiff.eval.image_sums import ImageSums, share


def edge_counts(found: Tensor, wanted: Tensor, tolerance: int = 0) -> Tensor:
    """What precision and recall of edge pixels are made of, image by image: int64 (B, 4).

    Found pixels within `tolerance` of a wanted one, found pixels, wanted pixels within `tolerance` of a found one, wanted
    pixels. Distances are chessboard distances: with a tolerance of 1, the eight neighbours count as well.

    Args:
        found, wanted: bool (B, H, W), true on edges.

    Raises:
        ValueError: other shapes or types.
    """
    if found.shape != wanted.shape or found.ndim != 3 or found.dtype != torch.bool or wanted.dtype != torch.bool:
        raise ValueError(f"expected bool (B, H, W) twice, got {tuple(found.shape)} and {tuple(wanted.shape)}")
    hits, covered = found & _grown(wanted, tolerance), wanted & _grown(found, tolerance)
    return torch.stack([pixels.flatten(1).sum(1) for pixels in (hits, found, covered, wanted)], dim=1)


def f1_of_counts(counts: NDArray[Any]) -> NDArray[np.float64]:
    """`edge_counts` (..., 4) to 2 P R / (P + R) (...), in [0, 1]; NaN where neither side has an edge.

    With tolerance 0 it is Dice's coefficient of the two sets of pixels.
    """
    hits, found, covered, wanted = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    precision, recall = hits / np.maximum(found, 1), covered / np.maximum(wanted, 1)
    f1 = np.nan_to_num(share(2 * precision * recall, precision + recall))
    return np.where(found + wanted > 0, f1, np.nan)


class EdgesF1(ImageSums):
    """F1 of edge pixels, precision and recall being over the pixels of all images. In [0, 1]; higher is better."""

    higher_is_better = True
    plot_upper_bound = 1.0
    tolerance = 0
    """Pixels by which an edge may be off."""
    of_sums = staticmethod(f1_of_counts)

    def __init__(self) -> None:
        super().__init__((4,), torch.int64)

    def counts(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Edges of generated images and of their controls, bool (B, H, W), to `edge_counts`."""
        return edge_counts(found, wanted, self.tolerance)


class EdgesF1Within1(EdgesF1):
    """As `EdgesF1`, but an edge that is off by one pixel, diagonally or not, counts as found. In [0, 1]; higher is better."""

    tolerance = 1


def _grown(edges: Tensor, by: int) -> Tensor:
    """Every pixel within `by` of an edge."""
    return F.max_pool2d(edges[:, None].float(), 2 * by + 1, stride=1, padding=by)[:, 0] > 0
