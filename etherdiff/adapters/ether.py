"""ETHER and ETHER+ (Bini et al., ICML 2024) as a PEFT tuner; importing this module registers them with PEFT."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from etherdiff.adapters.layers import Draw, Reach
from etherdiff.adapters.reflection import ReflectedLinear, at_angle, distance_from_identity, update_factors
from etherdiff.adapters.tuner import BlocksConfig, UpdateLayer, UpdateTuner, register

REFLECTION_DISTANCE = 2.0
"""‖H - I‖_F of a block of ETHER, always."""


class EtherType(str, Enum):  # noqa: UP042  PEFT writes and reads the plain string
    ETHER = "ETHER"


@dataclass
class EtherConfig(BlocksConfig):
    """ETHER (`variant="ether"`, paper eq. 1) or ETHER+ (`"ether+"`, eq. 2) on linear layers.

    The number of trainable parameters per layer is in (ETHER), 2 in (one-sided ETHER+) or 2 (in + out) (ETHER+), whatever
    `blocks` is; n = 1 is the cheapest in time.
    """

    variant: str = field(default="ether+", metadata={"help": "ether (a reflection) or ether+ (its relaxation)"})
    two_sided: bool | None = field(
        default=None, metadata={"help": "transform the output side as well; None: the paper's choice, only ether+ does"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = EtherType.ETHER
        if self.two_sided is None:
            self.two_sided = self.variant == "ether+"

    def problems(self) -> list[str]:
        known = self.variant in ("ether", "ether+")
        return super().problems() + ([] if known else [f"variant must be 'ether' or 'ether+', not {self.variant!r}"])

    def blocked_features(self, in_features: int, out_features: int) -> dict[str, int]:
        return {"input": in_features} | ({"output": out_features} if self.two_sided else {})


class EtherLayer(UpdateLayer):
    """y = H̃ W H x + b, with H (in, in) and H̃ (out, out) never built; parameters (blocks, features/blocks), float32."""

    why_no_lora = None
    adapter_layer_names = ("ether_u", "ether_v", "ether_u_out", "ether_v_out")

    def new_parameters(self, config: EtherConfig) -> dict[str, Tensor]:
        """Draw u ~ Kaiming uniform (a = √5), with v = -u: ETHER+ starts as the identity, ETHER as a random reflection."""
        sides = {"": self.in_features} | ({"_out": self.out_features} if config.two_sided else {})
        parameters = {}
        for side, features in sides.items():
            u = torch.empty(config.blocks, features // config.blocks)
            nn.init.kaiming_uniform_(u, a=math.sqrt(5))
            parameters[f"ether_u{side}"] = u
            if config.variant == "ether+":
                parameters[f"ether_v{side}"] = -u
        return parameters

    def _vectors(self, adapter: str) -> list[Tensor | None]:
        dicts = (getattr(self, name) for name in self.adapter_layer_names)
        return [vectors.get(adapter, None) for vectors in dicts]

    def update_matrices(self, adapter: str, weight: Tensor) -> tuple[Tensor, ...]:
        down, up = update_factors(weight, *self._vectors(adapter))  # type: ignore[arg-type]
        return up, down

    def transformations(self, name: str) -> tuple[float | None, float | None]:
        u, v, u_out, v_out = self._vectors(name)
        input_side = None if u is None else distance_from_identity(u, v)
        return input_side, None if u_out is None else distance_from_identity(u_out, v_out)

    def _sides(self, name: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield u and, for ETHER+, v of the input side and of the output side, as far as there are."""
        u, v, u_out, v_out = self._vectors(name)
        yield from ((one, other) for one, other in ((u, v), (u_out, v_out)) if one is not None)

    def reach(self, name: str) -> Reach | None:
        """Return how far a block can be: ‖v̂v̂ᵀ − ûûᵀ‖_F = √2 sin θ, θ the angle between u and v, which single numbers lack."""
        sides = list(self._sides(name))
        if sides[0][1] is None:
            return Reach(REFLECTION_DISTANCE, REFLECTION_DISTANCE, True)
        return Reach(0.0, math.sqrt(2) if min(u.shape[-1] for u, _ in sides) > 1 else 0.0, True)

    def random_parameters(self, name: str, distance: float, draw: Draw) -> Iterator[tuple[Any, Tensor]]:
        for u, v in self._sides(name):
            yield u, (chosen := draw(*u.shape))
            if v is not None:
                yield v, at_angle(chosen, draw(*u.shape), math.asin(min(1.0, distance / math.sqrt(2))))

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor]:
        up, down = self.update_matrices(name, self.original_weight().float())
        return down, self.scale[name] * up

    def forward_with(self, active: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(active) != 1 or not self._can_fuse(active[0]):
            return super().forward_with(active, x, *args, **kwargs)
        weight, bias = self.linear_weight(), self.base_layer.bias
        vectors = self._vectors(active[0])
        if not torch.is_autocast_enabled(x.device.type):
            return ReflectedLinear.apply(x, weight, bias, *vectors)
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return ReflectedLinear.apply(x, weight, bias, *vectors)

    def _can_fuse(self, adapter: str) -> bool:
        """Return whether `ReflectedLinear` computes this layer: linear and frozen, at scale 1, without dropout at work."""
        base = self.base_layer
        # a tuple: torch.compile cannot trace a union before torch 2.7
        if not isinstance(base, (nn.Linear, Conv1D)) or self.scale[adapter] != 1:
            return False
        if self.training and self.dropout_probability[adapter]:
            return False
        return not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))


class EtherModel(UpdateTuner):
    """The tuner PEFT finds for `EtherConfig`."""

    prefix = "ether_"
    tuner_layer_cls = EtherLayer


register(EtherType.ETHER, EtherModel.prefix, EtherConfig, EtherModel)
