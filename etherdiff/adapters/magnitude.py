"""Magnitude re-fitting (OFT paper, section 3.4; ETHER paper, table 3): one learned factor per output neuron.

OFT keeps the norm of every neuron; a last epoch may re-fit the norms. It is an adapter of its own, trained on the merged model.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from etherdiff.adapters.layers import norm
from etherdiff.adapters.tuner import UpdateConfig, UpdateLayer, UpdateTuner, register


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
