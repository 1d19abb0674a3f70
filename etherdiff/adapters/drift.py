"""How far an adapter moves its base: distances per layer, as in the paper's analysis (section 5.3).

Transformation distance ‖T - I‖_F, for methods that multiply: W' = T_out W T_in. Weight distance ‖W' - W‖_F, for all.
Everything is computed in float64, one layer at a time; the model is left as it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etherdiff.adapters.layers import AdapterLayer, norm
from etherdiff.adapters.methods import adapter_layers


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
