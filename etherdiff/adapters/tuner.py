"""The common part of our PEFT tuners: layers that add a weight update to a linear layer.

Every update is computed from the layer's original weight, so several active adapters add up alike in forward and in merge,
in any order. PEFT's hooks used here are not a public API: tests/adapters/test_peft_hooks.py holds them.
"""

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import reduce
from typing import Any, Self, cast

import torch
from peft.config import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from etherdiff.adapters.layers import AdapterLayer
from etherdiff.system.text import listed


@dataclass
class UpdateConfig(PeftConfig):
    """Options of every adapter of ours. `target_modules` as in PEFT: name endings, or one regular expression."""

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names (or name endings) of the linear layers to adapt, or one regex"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "names, or a regex, to leave alone"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "indices of the blocks to adapt"})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "name of the block list that layers_to_transform counts in"}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained whole, next to the adapter"})
    dropout: float = field(default=0.0, metadata={"help": "probability, in [0, 1), of zeroing an input of the update"})

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = self.problems()
        if problems:
            raise ValueError("; ".join(problems))
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # what PEFT's matching expects
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def problems(self) -> list[str]:
        """Return everything wrong with these settings, one sentence each."""
        found = []
        if not 0 <= self.dropout < 1:
            found.append(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            found.append("layers_to_transform needs target_modules as a list of names, not as a regex")
        return found

    def misfit(self, in_features: int, out_features: int) -> str | None:
        """Return why a layer of this size cannot be adapted with these settings, and what would work; None if it can."""
        return None


@dataclass
class BlocksConfig(UpdateConfig):
    """An adapter made of diagonal blocks, which have to divide the features."""

    blocks: int = field(default=1, metadata={"help": "diagonal blocks n; must divide the features of every target"})

    def problems(self) -> list[str]:
        wrong = not isinstance(self.blocks, int) or isinstance(self.blocks, bool) or self.blocks < 1
        return super().problems() + ([f"blocks must be a whole number of at least 1, not {self.blocks!r}"] if wrong else [])

    def blocked_features(self, in_features: int, out_features: int) -> dict[str, int]:
        """Return the feature counts that `blocks` has to divide, by their names."""
        return {"input": in_features}

    def misfit(self, in_features: int, out_features: int) -> str | None:
        features = self.blocked_features(in_features, out_features)
        wrong = [f"{count} {side} features" for side, count in features.items() if count % self.blocks]
        if not wrong:
            return None
        works = [n for n in range(1, min(features.values()) + 1) if all(count % n == 0 for count in features.values())]
        shown = ", ".join(map(str, works[:8])) + (", …" if len(works) > 8 else "")
        return f"{' and '.join(wrong)} do not divide into {self.blocks} blocks (blocks that do: {shown})"


class UpdateLayer(nn.Module, BaseTunerLayer, AdapterLayer):
    """A linear layer (out, in) plus the weight updates of its active adapters."""

    is_scalable = True
    other_param_names = ("dropout_probability", "scale")

    def __init__(self, base_layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.dropout_probability: dict[str, float] = {}
        self.scale: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # what a merge added, as matrices whose product it is: the only exact way back from a singular transform
        self._added: dict[str, tuple[Tensor, ...]] = {}
        self._original: Tensor | None = None
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.in_features, self.out_features = linear_features(self.get_base_layer())

    # --- what a method defines ---------------------------------------------------------------------------------------

    def new_parameters(self, config: Any) -> dict[str, Tensor]:
        """Return freshly initialised float32 parameters of one adapter, by the names in `adapter_layer_names`."""
        raise NotImplementedError

    def update_matrices(self, adapter: str, weight: Tensor) -> tuple[Tensor, ...]:
        """Return matrices whose product is the adapter's update (out, in) of `weight`, at scale 1; differentiable, float32."""
        raise NotImplementedError

    def apply_update(self, adapter: str, x: Tensor) -> Tensor:
        """Return the update applied to x (..., in), without the bias; (..., out)."""
        weight = self.linear_weight()
        for matrix in reversed(self.update_matrices(adapter, weight)):
            x = F.linear(x, matrix.to(x.dtype))
        return x

    # --- what it declares (see AdapterLayer) -------------------------------------------------------------------------

    @property
    def layer(self) -> Self:
        return self

    @classmethod
    def of(cls, layer: Any) -> Self:
        return layer

    def weight_update(self, name: str) -> Tensor:
        return _product(self.update_matrices(name, self.linear_weight()))  # `merge` works in float32

    # --- adapters by name --------------------------------------------------------------------------------------------

    def add(self, adapter: str, config: UpdateConfig) -> None:
        """Add an adapter on the base weight's device. Its parameters are float32 whatever the base's precision."""
        base: Any = self.get_base_layer()
        for name, value in self.new_parameters(config).items():
            getattr(self, name)[adapter] = nn.Parameter(value.to(device=base.weight.device, dtype=torch.float32))
        self.dropout_probability[adapter] = config.dropout
        self.scale[adapter] = 1.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter: str) -> None:
        if adapter in self._added:
            self.unmerge()
        super().delete_adapter(adapter)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the factor of one adapter's update; 1 is what was trained."""
        if adapter in self.scale:
            self.scale[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of every active adapter."""
        for adapter in self._present():
            self.scale[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`; with None go back to 1."""
        for adapter in self._present():
            self.scale[adapter] = 1.0 if scale is None else self.scale[adapter] / scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def _present(self, adapters: Sequence[str] | None = None) -> list[str]:
        return [name for name in (self.active_adapters if adapters is None else adapters) if name in self.scale]

    # --- weights -----------------------------------------------------------------------------------------------------

    def linear_weight(self) -> Tensor:
        """Return the base layer's weight as it stands, (out, in)."""
        base: Any = self.get_base_layer()
        return base.weight.T if isinstance(base, Conv1D) else base.weight

    def original_weight(self) -> Tensor:
        """Return the base weight without what was merged into it, (out, in)."""
        if self._original is not None:
            return self._original
        weight = self.linear_weight().detach()
        if not self._added:
            return weight
        return (weight.float() - sum(_product(matrices) for matrices in self._added.values())).to(weight.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the adapter's update of the original weight at its present scale, float32, in the base layer's own layout."""
        with torch.no_grad():
            delta = _product(self._scaled_matrices(adapter, self.original_weight()))
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def _scaled_matrices(self, adapter: str, weight: Tensor) -> tuple[Tensor, ...]:
        first, *rest = self.update_matrices(adapter, weight.float())
        return (first * self.scale[adapter], *rest)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, keep_original: bool = False) -> None:
        """Add the updates of the named (default: the active) adapters to the base weight.

        safe_merge: check for NaN and infinity before touching the weight; raises ValueError naming the adapter.
        keep_original: hold a copy of the weight, so that `unmerge` restores it bit for bit instead of to rounding.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        if safe_merge:
            self.check_finite(names)
        original = self.original_weight()
        added = {name: self._scaled_matrices(name, original) for name in names}
        weight = self.linear_weight()
        merged = weight.float() + sum(_product(matrices) for matrices in added.values())
        if keep_original and self._original is None:
            self._original = original.clone()
        weight.copy_(merged)
        self._added |= added
        self.merged_adapters += names

    @torch.no_grad()
    def check_finite(self, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError where merging one of the named (default: the active) adapters would break the base weight."""
        weight = self.original_weight()
        for name in self._present(adapter_names):
            if not torch.isfinite(weight + _product(self._scaled_matrices(name, weight))).all():
                raise ValueError(f"merging adapter {name!r} would put NaN or infinity into the weights: it is broken")

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take out everything that was merged: to rounding, or bit for bit if the original was kept."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.linear_weight().copy_(self.original_weight())
        self._added, self._original = {}, None
        self.merged_adapters.clear()

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute (..., in) -> (..., out)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else self._present()
        if active and hasattr(self.base_layer, "_hf_hook"):
            return self._offloaded_forward(active, x)
        return self.forward_with(active, x, *args, **kwargs)

    def _offloaded_forward(self, active: list[str], x: Tensor) -> Tensor:
        """Compute with weights that are elsewhere until accelerate's hooks run: fetch them, use them once."""
        hooked: list[Any] = [module for module in self.modules() if hasattr(module, "_hf_hook") and module is not self]
        for module in hooked:
            module._hf_hook.pre_forward(module)
        weight, base = self.linear_weight(), cast(Any, self.get_base_layer())
        updated = weight.float() + sum(_product(self._scaled_matrices(name, weight)) for name in active)
        y = F.linear(x, updated.to(weight.dtype), base.bias)
        for module in hooked:
            module._hf_hook.post_forward(module, y)
        return y

    def forward_with(self, active: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus, for each adapter in `active`, its scaled update of x."""
        y = self.base_layer(x, *args, **kwargs)
        for name in active:
            update_input = F.dropout(x, self.dropout_probability[name], self.training)
            y = y + self.scale[name] * self.apply_update(name, update_input).to(y.dtype)
        return y


def _product(matrices: tuple[Tensor, ...]) -> Tensor:
    return reduce(torch.matmul, matrices)


def linear_features(layer: nn.Module) -> tuple[int, int]:
    """Return the (in, out) features of a torch Linear or a transformers Conv1D (GPT-2's transposed linear layer)."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features  # type: ignore[return-value]


class UpdateTuner(BaseTuner):
    """PEFT's injection of one of our layers into every target of a model."""

    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    tuner_layer_cls: Any  # the method's UpdateLayer

    def _prepare_model(self, peft_config: UpdateConfig, model: nn.Module) -> None:
        """Refuse, before anything is replaced, targets that cannot be adapted; one error names them all."""
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        modules = {name: module for name, module in model.named_modules() if name and not name.startswith(inside)}
        peft_config = _maybe_include_all_linear_layers(peft_config, model)
        targets = [name for name in modules if self._check_target_module_exists(peft_config, name)]
        if not targets:
            raise ValueError(_no_target_message(peft_config, modules))
        problems = [problem for name in targets if (problem := layer_problem(peft_config, name, modules[name]))]
        if problems:
            raise ValueError(listed(problems, 8, "; "))

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        problem = layer_problem(peft_config, current_key, target)
        if problem:
            raise ValueError(problem)
        if isinstance(target, self.tuner_layer_cls):
            target.add(adapter_name, peft_config)
            return
        layer = self.tuner_layer_cls(target)
        layer.set_adapter(adapter_name)
        layer.add(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is made active
        self._replace_module(parent, target_name, layer, target)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, keep_original: bool = False
    ) -> None:
        """Merge as PEFT does; `keep_original` makes `unmerge_adapter` restore the weights bit for bit, for a copy's memory."""
        self._check_merge_allowed()
        layers = [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]
        if safe_merge:
            self._check_finite(adapter_names)
        for layer in layers:
            layer.merge(False, adapter_names, keep_original)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge and safe_merge:
            self._check_finite(adapter_names)  # before the first layer is replaced
        return super()._unload_and_optionally_merge(merge, progressbar, False, adapter_names)

    def _check_finite(self, adapter_names: list[str] | None) -> None:
        for module in self.model.modules():
            if isinstance(module, self.tuner_layer_cls):
                module.check_finite(adapter_names)


def layer_problem(config: UpdateConfig, name: str, module: nn.Module) -> str | None:
    """Return why the module `name` cannot be adapted, and what would work; None if it can."""
    base = _unwrapped(module)
    if isinstance(module, BaseTunerLayer) and not isinstance(module, UpdateLayer):
        return f"layer {name!r} already carries an adapter of another kind ({type(module).__name__}); delete it first"
    if not isinstance(base, nn.Linear | Conv1D):
        return f"layer {name!r} is a {type(base).__name__}; only linear layers can be adapted"
    if not base.weight.dtype.is_floating_point:
        return f"layer {name!r} holds quantised weights ({base.weight.dtype}); load the model in float32 or bfloat16"
    misfit = config.misfit(*linear_features(base))
    return f"layer {name!r}: {misfit}" if misfit else None


def _unwrapped(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _no_target_message(config: UpdateConfig, modules: dict[str, nn.Module]) -> str:
    linear = [name for name, module in modules.items() if isinstance(_unwrapped(module), nn.Linear | Conv1D)]
    endings = sorted({name.rsplit(".", 1)[-1] if not name[-1].isdigit() else ".".join(name.split(".")[-2:]) for name in linear})
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else sorted(config.target_modules or [])
    close = sorted({match for name in wanted for match in difflib.get_close_matches(name, endings, n=2)})
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    found = f"Its linear layers end in: {', '.join(endings)}"
    return f"target_modules {', '.join(wanted)} match no layer of this model.{hint} {found}"


def register(peft_type: Enum, prefix: str, config: type[UpdateConfig], tuner: type[UpdateTuner]) -> None:
    """Make PEFT know a method. Its own `register_peft_method` refuses names outside its enum, so write the mappings."""
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = prefix  # type: ignore[index]
