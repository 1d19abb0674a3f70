"""LPIPS as a squared distance between vectors, so that a network runs once per image and not once per pair.

LPIPS of two images is the sum over layers of the mean over places of Σ_c w_c (â_c - b̂_c)², with â and b̂ of unit length
over the channels (Zhang et al. 2018, equation 1). Scaling â_c by sqrt(w_c / places) makes that ‖φ(a) - φ(b)‖².
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_EPSILON = 1e-10  # as in the package lpips


def unit_channels(layers: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> Tensor:
    """φ of a batch.

    Args:
        layers: features (B, C, H, W) of each layer.
        weights: (C,) of each layer, none negative; None: all 1, the package's `lpips=False`.

    Returns:
        float32 (B, Σ C H W).
    """
    parts = []
    for index, layer in enumerate(layers):
        unit = layer / (layer.square().sum(1, keepdim=True).sqrt() + _EPSILON)
        if weights is not None:
            unit = unit * weights[index].sqrt().view(1, -1, 1, 1)
        parts.append((unit / (layer.shape[2] * layer.shape[3]) ** 0.5).flatten(1))
    return torch.cat(parts, 1)


def lpips_distances(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Distances of every pair: N and M vectors (D,) to float64 (N, M) on the CPU, at least 0, exactly 0 for the same image.

    Pair by pair, because the vectors are long (2.6 million for AlexNet at 512 px); differences first, so nothing cancels.
    """
    if not len(one) or not len(other):
        return torch.zeros(len(one), len(other), dtype=torch.float64)
    rows = [torch.stack([(a - b).square().sum() for b in other]) for a in one]
    return torch.stack(rows).cpu().double()
