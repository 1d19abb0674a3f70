"""What the paper compares with: the "Naive" baseline, and OFT's magnitude re-fitting.

Naive (section 5) is a multiplicative block-diagonal matrix without any constraint. Re-fitting (OFT paper, section 3.4; ETHER
paper, table 3) learns one factor per output neuron: OFT keeps the norm of every neuron, and a last epoch may re-fit the norms.
It is an adapter of its own, trained on the merged model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etherdiff.adapters.layers import Draw, Reach, from_identity, norm
from etherdiff.adapters.tuner import BlocksConfig, UpdateConfig, UpdateLayer, UpdateTuner, register


class NaiveType(str, Enum):  # noqa: UP042  PEFT writes and reads the plain string
    NAIVE = "NAIVE"


@dataclass
class NaiveConfig(BlocksConfig):
    """W' = W N with N block-diagonal, initialised as the identity; in²/blocks trainable parameters per layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NaiveType.NAIVE


class NaiveLayer(UpdateLayer):
    """y = W N x + b; `naive_matrix` is (blocks, in/blocks, in/blocks), float32."""

    why_no_lora = "its block-diagonal factors change the weights by matrices of full rank"
    adapter_layer_names = ("naive_matrix",)
    naive_matrix: nn.ParameterDict

    def new_parameters(self, config: NaiveConfig) -> dict[str, Tensor]:
        size = self.in_features // config.blocks
        return {"naive_matrix": torch.eye(size).repeat(config.blocks, 1, 1)}

    def _departure(self, adapter: str) -> Tensor:
        """Return N - I, (blocks, in/blocks, in/blocks)."""
        matrix = self.naive_matrix[adapter]
        return matrix - torch.eye(matrix.shape[-1], device=matrix.device)

    def update_matrices(self, adapter: str, weight: Tensor) -> tuple[Tensor, ...]:
        departure = self._departure(adapter)
        blocks = weight.reshape(len(weight), len(departure), -1).transpose(0, 1)
        return ((blocks @ departure).transpose(0, 1).reshape(weight.shape),)

    def transformations(self, name: str) -> tuple[float | None, float | None]:
        return from_identity(self.naive_matrix[name]), None

    def reach(self, name: str) -> Reach | None:
        return Reach(0.0, math.inf, False)

    def random_parameters(self, name: str, distance: float, draw: Draw) -> Iterator[tuple[nn.Parameter, Tensor]]:
        matrix = self.naive_matrix[name]
        yield matrix, away_from_identity(draw(*matrix.shape), distance)

    def forward_with(self, active: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # the updates act on the input, so their sum costs one product with W however many are active
        moved = x
        for name in active:
            departure = self._departure(name).to(x.dtype)
            update_input = F.dropout(x, self.dropout_probability[name], self.training)
            update_input = update_input.reshape(*x.shape[:-1], *departure.shape[:2])
            update = torch.einsum("...nj,nij->...ni", update_input, departure).reshape(x.shape)
            moved = moved + self.scale[name] * update.to(x.dtype)
        return self.base_layer(moved, *args, **kwargs)


def away_from_identity(departure: Tensor, distance: float) -> Tensor:
    """Return I + G with each ‖G‖_F = distance; departure, G's direction: (n, size, size)."""
    length = torch.linalg.matrix_norm(departure, keepdim=True)
    return torch.eye(departure.shape[-1], dtype=departure.dtype) + distance * departure / length


class NaiveModel(UpdateTuner):
    """The tuner PEFT finds for `NaiveConfig`."""

    prefix = "naive_"
    tuner_layer_cls = NaiveLayer


register(NaiveType.NAIVE, NaiveModel.prefix, NaiveConfig, NaiveModel)


class MagnitudeType(str, Enum):  # noqa: UP042  PEFT writes and reads the plain string
    MAGNITUDE = "MAGNITUDE"


@dataclass
class MagnitudeConfig(UpdateConfig):
    """W' = diag(m) W with m initialised at one; out trainable parameters per layer. The bias keeps its size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MagnitudeType.MAGNITUDE

    def problems(self) -> list[str]:
        return super().problems() + (["magnitude re-fitting has no dropout"] if self.dropout else [])


class MagnitudeLayer(UpdateLayer):
    """y = m ⊙ (W x) + b; `magnitude_factor` is (out,), float32."""

    why_no_lora = "a factor per neuron changes the weights by matrices of full rank"
    adapter_layer_names = ("magnitude_factor",)
    magnitude_factor: nn.ParameterDict

    def new_parameters(self, config: MagnitudeConfig) -> dict[str, Tensor]:
        return {"magnitude_factor": torch.ones(self.out_features)}

    def update_matrices(self, adapter: str, weight: Tensor) -> tuple[Tensor, ...]:
        return ((self.magnitude_factor[adapter] - 1)[:, None] * weight,)

    def transformations(self, name: str) -> tuple[float | None, float | None]:
        return None, norm(self.magnitude_factor[name] - 1)

    def forward_with(self, active: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if not active:
            return y
        change = torch.stack([self.scale[name] * (self.magnitude_factor[name] - 1) for name in active]).sum(0).to(y.dtype)
        base: Any = self.get_base_layer()
        return y + change * (y if base.bias is None else y - base.bias.to(y.dtype))


class MagnitudeModel(UpdateTuner):
    """The tuner PEFT finds for `MagnitudeConfig`."""

    prefix = "magnitude_"
    tuner_layer_cls = MagnitudeLayer


register(MagnitudeType.MAGNITUDE, MagnitudeModel.prefix, MagnitudeConfig, MagnitudeModel)
