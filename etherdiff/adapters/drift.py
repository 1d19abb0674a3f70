"""How far an adapter moves its base: distances per layer, as in the paper's analysis (section 5.3).

Transformation distance ‖T - I‖_F, for methods that multiply: W' = T_out W T_in. Weight distance ‖W' - W‖_F, for all.
Everything is computed in float64, one layer at a time; the model is left as it was.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.boft import BOFTLayer
from peft.tuners.hra import HRALayer
from peft.tuners.oft import OFTLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from etherdiff.adapters.ether import EtherLayer
from etherdiff.adapters.magnitude import MagnitudeLayer
from etherdiff.adapters.naive import NaiveLayer
from etherdiff.adapters.reflection import left_right, normalise
from etherdiff.adapters.tuner import UpdateLayer


@dataclass(frozen=True)
class LayerDrift:
    """The distances of one layer, all at least 0; NaN where the adapter holds NaN."""

    weight: float
    """‖W' - W‖_F."""
    base_norm: float
    """‖W‖_F, to see the distance beside."""
    input_side: float | None = None
    """‖T_in - I‖_F; None where nothing multiplies on that side."""
    output_side: float | None = None
    """‖T_out - I‖_F; None likewise."""


@torch.no_grad()
def adapter_drift(model: nn.Module, name: str = "default") -> dict[str, LayerDrift]:
    """The drift of each layer that the adapter `name` is on, in the model's order, at the scale that was trained.

    model: what `io.load_adapter` or `methods.add_adapter` returned for a method with a PEFT type; nothing merged into it.
    """
    plain = getattr(model, "get_base_model", lambda: model)()
    layers = {key: layer for key, layer in plain.named_modules() if isinstance(layer, BaseTunerLayer)}
    return {key: _layer_drift(layer, name) for key, layer in layers.items() if _holds(layer, name)}


def full_drift(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, LayerDrift]:
    """The drift of every weight matrix and kernel (not of biases and norms) from one state dict to the other.

    KeyError where `after` lacks a name of `before`.
    """
    found = {}
    for name, weight in before.items():
        if weight.ndim > 1:
            base, trained = weight.double(), after[name].to(weight.device).double()
            found[name.removesuffix(".weight")] = LayerDrift(_norm(trained - base), _norm(base))
    return found


def _holds(layer: Any, name: str) -> bool:
    return any(name in getattr(layer, names) for names in layer.adapter_layer_names)


def _layer_drift(layer: Any, name: str) -> LayerDrift:
    exact = copy.deepcopy(layer).double()
    input_side, output_side = _transformations(exact, name)
    base = exact.get_base_layer().weight.clone()
    return LayerDrift(_norm(_update(exact, name)), _norm(base), input_side, output_side)


def _update(layer: Any, name: str) -> Tensor:
    """W' - W in the layer's precision; the layer is of no more use."""
    if isinstance(layer, UpdateLayer):  # its merge works in float32
        product, *rest = layer.update_matrices(name, layer.linear_weight())
        for matrix in rest:
            product = product @ matrix
        return product
    base = layer.get_base_layer().weight.clone()
    layer.merge(adapter_names=[name])
    return layer.get_base_layer().weight - base


def _transformations(layer: Any, name: str) -> tuple[float | None, float | None]:
    """‖T - I‖_F on the input and on the output side; None for what only adds."""
    if isinstance(layer, EtherLayer):
        u, v, u_out, v_out = (getattr(layer, key).get(name, None) for key in layer.adapter_layer_names)
        return _reflection(u, v), None if u_out is None else _reflection(u_out, v_out)
    if isinstance(layer, NaiveLayer):
        matrix = layer.naive_matrix[name]
        return _norm(matrix - torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)), None
    if isinstance(layer, MagnitudeLayer):
        return None, _norm(layer.magnitude_factor[name] - 1)
    if isinstance(layer, BOFTLayer):
        rotation, scale = _rotation(layer, name)
        return _from_identity(rotation), _norm(scale - 1)
    if isinstance(layer, OFTLayer | HRALayer):
        return _from_identity(_rotation(layer, name)), None
    return None, None


def _rotation(layer: Any, name: str) -> Any:
    """The matrix itself, whatever PEFT calls it; for BOFT also the scale of each output."""
    return layer.get_delta_weight(name)


def _reflection(u: Tensor, v: Tensor | None) -> float:
    """‖Lᵀ R‖_F of H = I + Lᵀ R, by the k x k products of its factors; H is not built."""
    left, right = left_right(normalise(u, v), u.dtype)
    return math.sqrt(max(0.0, float(((left @ left.T) * (right @ right.T)).sum())))


def _from_identity(matrix: Tensor) -> float:
    return _norm(matrix - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix))
