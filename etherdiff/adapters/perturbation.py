"""Random transformations at a given distance from the identity, as in the paper's study of perturbations (figure 3).

Every block T of every layer, on each side that the method transforms, gets ‖T − I‖_F = distance:

    ETHER   a reflection across a random hyperplane: 2, always
    ETHER+  ‖v̂v̂ᵀ − ûûᵀ‖_F = √2 sin θ, θ the angle between u and v: any distance up to √2
    Naive   I + G, G random and scaled
    OFT     the Cayley transform of t S, S random and skew: any distance below 2 √r, r the rank of S

Each layer declares what it can (`AdapterLayer.reach`, `random_parameters`). Everything is computed in float64 and stored in the
adapter's float32.
"""

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor, nn

from etherdiff.adapters.methods import adapter_layers

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
