"""Scores of counts that are summed over images: the torchmetrics class that the scores of controllable generation share."""

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric


class ImageSums(Metric):
    """What a generated image was found to show is counted against what its control wanted, and the counts are summed.

    `compute` gives a float64 scalar; it raises ValueError where there is nothing to count.
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    sums: Tensor

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    @abstractmethod
    def counts(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Of each image of a batch (B, …), what it adds to the sums: (B, *shape). Raises ValueError for other batches."""

    @staticmethod
    @abstractmethod
    def of_sums(sums: NDArray[Any], /) -> NDArray[np.float64]:
        """Sums (..., *shape) to scores (...); NaN where the sums are of nothing."""

    def update(self, found: Tensor, wanted: Tensor) -> None:
        """What the generated images show (B, …), and what their controls wanted. Raises ValueError, as `counts`."""
        self.sums += self.counts(found, wanted).sum(0).to(self.sums.device)

    def compute(self) -> Tensor:
        value = float(self.of_sums(self.sums.cpu().numpy()))
        if np.isnan(value):
            raise ValueError("nothing to score")
        return torch.tensor(value, dtype=torch.float64)


def share(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """part / whole, elementwise; NaN where the whole is 0."""
    part = np.asarray(part, np.float64)
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=np.asarray(whole) > 0)
