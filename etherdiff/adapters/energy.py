"""Hyperspherical energy: how evenly a layer's neurons point in all directions (Liu et al. 2018; OFT paper, section 3).

    HE(W) = Σ_{i≠j} ‖ŵ_i − ŵ_j‖⁻¹        ŵ_i = w_i / ‖w_i‖, the rows of W: a neuron per output feature

OFT's claim is that fine-tuning should keep it; the ETHER paper (section 5.3) shows that it need not be kept. It does not change
where an orthogonal matrix multiplies the input side, since that turns all neurons alike. Everything is computed in float64.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

MAX_NEURONS = 1024
"""Neurons of a layer that `energy_differences` looks at by default: the work grows with their square."""
NEAREST = 1e-6
"""Neurons nearer than this count as so far apart: below it float64's rounding in ŵ_i · ŵ_j shows."""
CHUNK = 2**22
"""Pairs at once: 32 MiB of distances."""


@torch.no_grad()
def hyperspherical_energy(weight: Tensor, half_space: bool = False, neurons: int | None = None, seed: int = 0) -> float:
    """Return HE(W) of a layer, over ordered pairs; 0 for fewer than two neurons, NaN where the weight holds NaN.

    Args:
        weight: (out, in), or a kernel (out, in, height, width), each of whose outputs is one neuron. A row of zeros has no
            direction and is left out.
        half_space: the half-space variant: every ŵ_i is joined by −ŵ_i, so that opposite neurons are as near as equal ones.
        neurons: look at so many of them, drawn from `seed` and their number alone; None: at all of them.
    """
    rows = _chosen(weight.detach().flatten(1).double(), neurons, seed)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit = (rows / length)[length[:, 0] != 0]
    step = max(1, CHUNK // max(1, len(unit)))
    total = sum(_energy_of(unit, start, min(start + step, len(unit)), half_space) for start in range(0, len(unit), step))
    return float(total)


def energy_differences(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    half_space: bool = False,
    neurons: int | None = MAX_NEURONS,
    seed: int = 0,
) -> dict[str, float]:
    """Return |HE(W') − HE(W)| / HE(W) of every weight matrix and kernel (not of biases and norms, nor where HE(W) is 0).

    before, after: state dicts, or any weights by name; the same neurons of both are looked at. KeyError where `after` lacks a
    name of `before`.
    """
    found = {}
    for name, weight in before.items():
        if weight.ndim < 2:
            continue
        energy, trained = (hyperspherical_energy(one, half_space, neurons, seed) for one in (weight, after[name]))
        if energy:
            found[name.removesuffix(".weight")] = abs(trained - energy) / energy
    return found


def energy_difference(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    half_space: bool = False,
    neurons: int | None = MAX_NEURONS,
    seed: int = 0,
) -> float:
    """Return the mean of `energy_differences` over the layers; ValueError where there is none to look at."""
    found = energy_differences(before, after, half_space, neurons, seed)
    if not found:
        raise ValueError("there is no layer with two neurons or more")
    return sum(found.values()) / len(found)


def _chosen(rows: Tensor, neurons: int | None, seed: int) -> Tensor:
    if neurons is None or len(rows) <= neurons:
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:neurons].sort().values.to(rows.device)]


def _energy_of(unit: Tensor, start: int, end: int, half_space: bool) -> float:
    """Return what the neurons from `start` to `end` add to the energy; ‖a − b‖² = 2 − 2 a·b for unit vectors."""
    products = unit[start:end] @ unit.T
    inverse = _inverse_distance(products)
    inverse.diagonal(start).zero_()  # no neuron is a pair with itself
    if not half_space:
        return float(inverse.sum())
    # of the doubled set, half the pairs are of one sign and half of opposite signs, a neuron's with its own opposite included
    return 2 * float(inverse.sum() + _inverse_distance(-products).sum())


def _inverse_distance(products: Tensor) -> Tensor:
    return (2 - 2 * products).clamp_min(NEAREST**2).rsqrt()
