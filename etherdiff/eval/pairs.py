"""Means over pairs: cosine similarity of features, and the torchmetrics class that the scores over pairs share."""

import torch
from torch import Tensor
from torchmetrics import Metric


def cosine_pairs(rows: Tensor, columns: Tensor) -> Tensor:
    """Cosine similarity of every pair: (N, D) and (M, D) to float64 (N, M), in [-1, 1].

    Raises:
        ValueError: other shapes, or features that are not finite or all zero, which have no direction.
    """
    return (_directions(rows) @ _directions(columns).T).clamp(-1, 1)


def cosine_rows(one: Tensor, other: Tensor) -> Tensor:
    """Cosine similarity row by row: twice (N, D) to float64 (N,), in [-1, 1]. Raises ValueError, as `cosine_pairs`."""
    if one.shape != other.shape:
        raise ValueError(f"rows do not match: {tuple(one.shape)} and {tuple(other.shape)}")
    return (_directions(one) * _directions(other)).sum(1).clamp(-1, 1)


def upper_pairs(values: Tensor) -> Tensor:
    """Each unordered pair of a symmetric (N, N) once: (N (N - 1) / 2,)."""
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise ValueError(f"expected a square of pairs, got {tuple(values.shape)}")
    row, column = torch.triu_indices(len(values), len(values), offset=1)
    return values[row, column]


class PairMean(Metric):
    """The mean of a value over pairs, each pair counting the same, however the updates are cut.

    `compute` gives a float64 scalar; it raises ValueError without any pair.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    pairs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        if not self.pairs:
            raise ValueError("no pairs to average")
        return self.total / self.pairs

    def _add(self, values: Tensor) -> None:
        """Count the pairs' values in. Raises ValueError for any that is not finite, rather than average it in."""
        if not torch.isfinite(values).all():
            raise ValueError("values of pairs that are not finite")
        self.total += values.sum(dtype=torch.float64).to(self.total.device)
        self.pairs += values.numel()


def _directions(features: Tensor) -> Tensor:
    if features.ndim != 2:
        raise ValueError(f"expected features (N, D), got {tuple(features.shape)}")
    wide = features.double()
    lengths = wide.norm(dim=1, keepdim=True)
    if not (torch.isfinite(lengths) & (lengths > 0)).all():
        raise ValueError("features that are not finite, or zero")
    return wide / lengths
