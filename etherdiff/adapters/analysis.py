"""The paper's analyses of an adapter: drift from the base, random transformations and hyperspherical energy (section 5.3).

Everything is computed in float64, one layer at a time.

Drift: the transformation distance ‖T - I‖_F, for methods that multiply, W' = T_out W T_in; the weight distance ‖W' - W‖_F, for
all. The model is left as it was.

Random transformations (figure 3): every block T of every layer gets ‖T − I‖_F = distance, on each side that is transformed:

    ETHER   a reflection across a random hyperplane: 2, always
    ETHER+  ‖v̂v̂ᵀ − ûûᵀ‖_F = √2 sin θ, θ the angle between u and v: any distance up to √2
    Naive   I + G, G random and scaled
    OFT     the Cayley transform of t S, S random and skew: any distance below 2 √r, r the rank of S

Each layer declares what it can (`AdapterLayer.reach`, `random_parameters`). The values are stored in the adapter's float32.

Hyperspherical energy: how evenly a layer's neurons point in all directions (Liu et al. 2018; OFT paper, section 3):

    HE(W) = Σ_{i≠j} ‖ŵ_i − ŵ_j‖⁻¹        ŵ_i = w_i / ‖w_i‖, the rows of W: a neuron per output feature

OFT claims that fine-tuning should keep it; the ETHER paper shows that it need not be kept. It does not change where an
orthogonal matrix multiplies the input side, since that turns all neurons alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn

from etherdiff.adapters.layers import AdapterLayer, norm
from etherdiff.adapters.methods import adapter_layers

# --- Drift from the base --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerDrift:
    """The distances of one layer, all at least 0; NaN where the adapter holds NaN."""

    weight: float
    """‖W' - W‖_F."""
    base_norm: float
    """‖W‖_F, which the distance is compared with."""
    input_side: float | None = None
    """‖T_in - I‖_F; None where nothing multiplies on that side."""
    output_side: float | None = None
    """‖T_out - I‖_F; None likewise."""


@torch.no_grad()
def adapter_drift(model: nn.Module, name: str = "default") -> dict[str, LayerDrift]:
    """Return the drift of each layer that the adapter `name` is on, in the model's order, at the scale that was trained.

    model: what `io.load_adapter` or `methods.add_adapter` returned for a method with a PEFT type; nothing merged into it.
    """
    return {key: _layer_drift(layer.in_float64(), name) for key, layer in adapter_layers(model, name).items()}


def full_drift(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, LayerDrift]:
    """Return the drift of every weight matrix and kernel (not of biases and norms) from one state dict to the other.

    KeyError where `after` lacks a name of `before`.
    """
    found = {}
    for name, weight in before.items():
        if weight.ndim > 1:
            base, trained = weight.double(), after[name].to(weight.device).double()
            found[name.removesuffix(".weight")] = LayerDrift(norm(trained - base), norm(base))
    return found


def _layer_drift(layer: AdapterLayer, name: str) -> LayerDrift:
    input_side, output_side = layer.transformations(name)
    base_norm = norm(layer.base_weight())
    return LayerDrift(norm(layer.weight_update(name)), base_norm, input_side, output_side)


# --- Random transformations -----------------------------------------------------------------------------------------


Normal = Callable[[int, tuple[int, ...]], Tensor]
"""Standard normal numbers of a shape; the first argument numbers the tensors of one model."""


@torch.no_grad()
def perturb_adapter(model: nn.Module, distance: float, normal: Normal, name: str = "default") -> None:
    """Make every transformation of the adapter random, in place.

    model: what `methods.add_adapter` returned for ether, ether+, ether+one-sided, oft or naive. ValueError where a layer's
    blocks do not reach the distance.
    """
    number = count()
    problem = distance_problem(model, distance, name)
    if problem:
        raise ValueError(problem)

    def draw(*shape: int) -> Tensor:
        return normal(next(number), shape).double()

    for layer in adapter_layers(model, name).values():
        for parameter, value in layer.random_parameters(name, distance, draw):
            parameter.copy_(value)


def distance_problem(model: nn.Module, distance: float, name: str = "default") -> str | None:
    """Return why the transformations of a model's adapter cannot be at this distance, and which can; None where they can."""
    for key, layer in adapter_layers(model, name).items():
        reach = layer.reach(name)
        if reach is None:
            return f"layer {key!r} has no transformation that could be random at a distance from the identity"
        lowest, highest, included = reach
        fits = lowest <= distance and (distance < highest or (included and distance <= highest))
        if not fits and lowest:
            return f"a reflection is always at {lowest:g} from the identity, not {distance:g}"
        if not fits:
            reached = "up to" if included else "below"
            return f"the blocks of layer {key!r} can be {reached} {highest:.6g} from the identity, not {distance:g}"
    return None


# --- Hyperspherical energy ------------------------------------------------------------------------------------------


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
