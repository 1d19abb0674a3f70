"""Random transformations at a given distance from the identity, as in the paper's study of perturbations (figure 3).

Every block T of every layer, on each side that the method transforms, gets ‖T − I‖_F = distance:

    ETHER   a reflection across a random hyperplane: 2, always
    ETHER+  ‖v̂v̂ᵀ − ûûᵀ‖_F = √2 sin θ, θ the angle between u and v: any distance up to √2
    Naive   I + G, G random and scaled
    OFT     the Cayley transform of t S, S random and skew: where ±iσ are the eigenvalues of S, its own are
            2 tσ / √(1 + t²σ²) from 1, so that any distance below 2 √r can be reached, r the rank of S

Everything is computed in float64 and stored in the adapter's float32.
"""

import math
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from peft.tuners.oft import OFTLayer
from torch import Tensor, nn

from etherdiff.adapters.ether import EtherLayer
from etherdiff.adapters.naive import NaiveLayer

ETHER_DISTANCE = 2.0
BISECTIONS = 100
Normal = Callable[[int, tuple[int, ...]], Tensor]
"""Standard normal numbers of a shape; the first argument tells the tensors of one model apart."""


@torch.no_grad()
def perturb_adapter(model: nn.Module, distance: float, normal: Normal) -> None:
    """Make every transformation of the adapter random, in place.

    model: what `methods.add_adapter` returned for ether, ether+, ether+one-sided, oft or naive. ValueError where a layer's
    blocks do not reach the distance.
    """
    number = count()
    problem = distance_problem(model, distance)
    if problem:
        raise ValueError(problem)

    def draw(*shape: int) -> Tensor:
        return normal(next(number), shape).double()

    for layer in _layers(model).values():
        for parameter, value in _random_parameters(layer, distance, draw):
            parameter.copy_(value)


def distance_problem(model: nn.Module, distance: float) -> str | None:
    """Why the transformations of a model's adapter cannot be at this distance, and which can; None where they can."""
    for name, layer in _layers(model).items():
        lowest, highest, included = _reach(layer)
        fits = lowest <= distance and (distance < highest or (included and distance <= highest))
        if not fits and lowest:
            return f"a reflection is always at {lowest:g} from the identity, not {distance:g}"
        if not fits:
            reached = "up to" if included else "below"
            return f"the blocks of layer {name!r} can be {reached} {highest:.6g} from the identity, not {distance:g}"
    return None


def _layers(model: nn.Module) -> dict[str, Any]:
    plain = getattr(model, "get_base_model", lambda: model)()
    return {name: layer for name, layer in plain.named_modules() if isinstance(layer, EtherLayer | NaiveLayer | OFTLayer)}


def _reach(layer: Any) -> tuple[float, float, bool]:
    """Smallest and largest distance of a block, and whether the largest itself can be reached."""
    if isinstance(layer, NaiveLayer):
        return 0.0, math.inf, False
    if isinstance(layer, OFTLayer):
        rotation: Any = layer.oft_R["default"]
        size = rotation.block_size
        return 0.0, 2 * math.sqrt(size - size % 2), False
    sizes = [u.shape[-1] for u, _ in _sides(layer)]
    if "default" not in layer.ether_v:
        return ETHER_DISTANCE, ETHER_DISTANCE, True
    return 0.0, math.sqrt(2) if min(sizes) > 1 else 0.0, True


def _sides(layer: Any) -> Iterator[tuple[nn.Parameter, nn.Parameter | None]]:
    """u and, where there is one, v of the input side and of the output side."""
    for side in ("", "_out"):
        us, vs = getattr(layer, f"ether_u{side}"), getattr(layer, f"ether_v{side}")
        if "default" in us:
            yield us["default"], vs.get("default", None)


def _random_parameters(layer: Any, distance: float, draw: Callable[..., Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    if isinstance(layer, NaiveLayer):
        matrix = layer.naive_matrix["default"]
        yield matrix, away_from_identity(draw(*matrix.shape), distance)
    elif isinstance(layer, OFTLayer):
        rotation: Any = layer.oft_R["default"]
        yield rotation.weight, scaled_skew(draw(*rotation.weight.shape), rotation.block_size, distance)
    else:
        for u, v in _sides(layer):
            yield u, (chosen := draw(*u.shape))
            if v is not None:
                yield v, at_angle(chosen, draw(*u.shape), math.asin(min(1.0, distance / math.sqrt(2))))


def at_angle(u: Tensor, other: Tensor, angle: float) -> Tensor:
    """v, each row at `angle` from the line of u's, towards `other`; all (n, size). At 0 it is −û, as where ETHER+ starts."""
    unit = u / torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    if angle == 0:
        return -unit
    across = other - (other * unit).sum(-1, keepdim=True) * unit
    across /= torch.linalg.vector_norm(across, dim=-1, keepdim=True)
    return -(math.cos(angle) * unit + math.sin(angle) * across)


def away_from_identity(departure: Tensor, distance: float) -> Tensor:
    """I + G with each ‖G‖_F = distance; departure, G's direction: (n, size, size)."""
    length = torch.linalg.matrix_norm(departure, keepdim=True)
    return torch.eye(departure.shape[-1], dtype=departure.dtype) + distance * departure / length


def scaled_skew(entries: Tensor, size: int, distance: float) -> Tensor:
    """The entries (n, size (size - 1) / 2) above the diagonal of skew matrices, each scaled so that its Cayley transform is
    at `distance` from the identity."""
    skew = torch.zeros(len(entries), size, size, dtype=entries.dtype)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = entries
    sigma = torch.linalg.svdvals(skew - skew.mT)
    return entries * torch.stack([_cayley_scale(values, distance) for values in sigma])[:, None]


def _cayley_scale(sigma: Tensor, distance: float) -> Tensor:
    """The t at which Σ 4 t²σ² / (1 + t²σ²), which grows with t, is distance²; by bisection."""

    def reached(t: Tensor) -> bool:
        squares = (t * sigma).square()
        return float((4 * squares / (1 + squares)).sum()) >= distance**2

    if distance == 0:
        return torch.zeros((), dtype=sigma.dtype)
    low = distance / (2 * torch.linalg.vector_norm(sigma))  # too small: 1 + t²σ² is more than 1
    high = 2 * low
    while not reached(high):
        high = 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return low
