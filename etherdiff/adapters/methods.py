"""Every way of fine-tuning by its name, and everything that the rest of the package asks about it: `METHODS`.

A new method is one entry here, its name in `config.MethodName` and one recipe per task.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from peft import BOFTConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from etherdiff.adapters.baselines import MagnitudeConfig, MagnitudeLayer, NaiveConfig, NaiveLayer
from etherdiff.adapters.ether import EtherConfig, EtherLayer
from etherdiff.adapters.layers import (
    AdapterLayer,
    BoftLayer,
    HraLayer,
    LoraLayer,
    OftLayer,
    VeraLayer,
    WholeModel,
    quiet_boft,
)
from etherdiff.adapters.tuner import layer_problem

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION,  # the paper's subject-driven runs
    "attention+geglu": (*ATTENTION, "ff.net.0.proj"),  # its S2I runs
    "attention+feedforward": (*ATTENTION, "ff.net.0.proj", "ff.net.2"),
}


@dataclass(frozen=True)
class MethodOptions:
    """Options of a method; a method reads those it has and refuses the others."""

    targets: tuple[str, ...] = ATTENTION
    blocks: int | None = None
    rank: int | None = None
    dropout: float = 0.0


class Style(NamedTuple):
    """The look of a method's runs in tables and figures."""

    place: int
    """Place in tables and legends: as in the paper's, the methods that it does not have next to similar ones."""
    colour: str
    """One of `results.figures.COLOURS`. Methods of one colour differ in marker and in dashes."""
    marker: str
    """Marker, as matplotlib names it."""
    dashes: str = "solid"
    """solid, dashed or dotted: figures with many points show no markers."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table below."""

    summary: str
    learning_rate: float
    """Learning rate of subject-driven runs."""
    s2i_learning_rate: float
    config: Callable[[Any], PeftConfig] | None
    """Makes a PEFT config of MethodOptions; None for full fine-tuning, which has no adapter."""
    layer: type[AdapterLayer] = AdapterLayer
    """Class of its layers, which declares transformation, reach, LoRA form and whether it can be scaled."""
    style: Style
    options: frozenset[str] = frozenset()
    """Options that it reads, of blocks, rank and dropout."""
    defaults: MethodOptions = MethodOptions()
    marks: Mapping[str, Any] = field(default_factory=dict)
    """Entries of adapter_config.json that distinguish it from other methods of its PEFT type."""
    bound: str | None = None
    """Limit of its transformations' distance from the identity, as a sentence; None where there is none."""

    @cached_property
    def peft_type(self) -> str:
        """The type in adapter_config.json."""
        return "FULL" if self.config is None else peft_type_of(self.config(self.defaults))

    @property
    def lora_exact(self) -> bool:
        """Whether its update is of low rank, so that a LoRA file can hold it exactly."""
        return self.layer.why_no_lora is None


def peft_type_of(config: PeftConfig) -> str:
    """Return the type as adapter_config.json has it."""
    return config.peft_type.value  # type: ignore[union-attr]  # set by every subclass


_BLOCKS, _RANK = frozenset({"blocks", "dropout"}), frozenset({"rank", "dropout"})


def _ether(summary: str, variant: str, two_sided: bool, style: Style, bound: str) -> Method:
    return Method(
        summary=summary,
        learning_rate=6e-3,
        s2i_learning_rate=1e-3,
        config=lambda o: EtherConfig(
            variant=variant, two_sided=two_sided, blocks=o.blocks, target_modules=list(o.targets), dropout=o.dropout
        ),
        layer=EtherLayer,
        style=style,
        options=_BLOCKS,
        defaults=MethodOptions(blocks=1),
        marks={"variant": variant, "two_sided": two_sided},
        bound=bound,
    )


# Learning rates: of the ETHER paper (appendix C, subject-driven) for the first seven but vera's; of PEFT's own DreamBooth
# examples for boft and hra; vera's is that of its paper's language models, since none is published for diffusion. For S2I
# the paper gives ether's, ether+'s, oft's and naive's, a sixth of these; the others' are a sixth as well.
METHODS: dict[str, Method] = {
    "ether": _ether(
        "a reflection of the input features",
        "ether",
        False,
        Style(9, "green", "o"),
        "ETHER is a reflection: every block is at distance 2 from the identity, always.",
    ),
    "ether+": _ether(
        "relaxed reflections on both sides",
        "ether+",
        True,
        Style(11, "vermilion", "o"),
        "ETHER+ cannot go further than √2 per block and side, √(2n) for n blocks.",
    ),
    "ether+one-sided": _ether(
        "a relaxed input reflection",
        "ether+",
        False,
        Style(10, "blue", "<"),
        "One-sided ETHER+ cannot go further than √2 per block, √(2n) for n blocks.",
    ),
    "lora": Method(
        summary="an additive update of low rank",
        learning_rate=6e-4,
        s2i_learning_rate=1e-4,
        config=lambda o: LoraConfig(r=o.rank, lora_alpha=o.rank, target_modules=list(o.targets), lora_dropout=o.dropout),
        layer=LoraLayer,
        style=Style(2, "orange", "D"),
        options=_RANK,
        defaults=MethodOptions(rank=4),
    ),
    "oft": Method(
        summary="block-diagonal rotations (exact Cayley transform)",
        learning_rate=6e-5,
        s2i_learning_rate=1e-5,
        config=lambda o: OFTConfig(
            r=o.blocks,
            oft_block_size=0,
            use_cayley_neumann=False,  # PEFT's default only approximates the paper's rotation
            target_modules=list(o.targets),
            module_dropout=o.dropout,
        ),
        layer=OftLayer,
        style=Style(6, "sky", "^"),
        options=_BLOCKS,
        defaults=MethodOptions(blocks=4),
    ),
    "naive": Method(
        summary="block-diagonal matrices without a constraint",
        learning_rate=6e-5,
        s2i_learning_rate=1e-5,
        config=lambda o: NaiveConfig(blocks=o.blocks, target_modules=list(o.targets), dropout=o.dropout),
        layer=NaiveLayer,
        style=Style(8, "purple", "P"),
        options=_BLOCKS,
        defaults=MethodOptions(blocks=4),
    ),
    "boft": Method(
        summary="block-diagonal rotations, finer than oft's",
        learning_rate=3e-5,
        s2i_learning_rate=5e-6,
        config=lambda o: BOFTConfig(
            boft_block_size=0,
            boft_block_num=o.blocks,
            boft_n_butterfly_factor=1,  # PEFT drops further factors, silently, where its CUDA extension does not build
            target_modules=list(o.targets),
            boft_dropout=o.dropout,
        ),
        layer=BoftLayer,
        style=Style(4, "sky", "h", "dotted"),
        options=_BLOCKS,
        defaults=MethodOptions(blocks=8),
    ),
    "hra": Method(
        summary="a chain of reflections",
        learning_rate=1e-2,
        s2i_learning_rate=1.7e-3,
        config=lambda o: HRAConfig(r=o.rank, target_modules=list(o.targets)),
        layer=HraLayer,
        style=Style(5, "yellow", "*"),
        options=frozenset({"rank"}),
        defaults=MethodOptions(rank=8),
    ),
    "vera": Method(
        summary="scales on random projections shared by all layers",
        learning_rate=4e-3,
        s2i_learning_rate=7e-4,
        config=lambda o: VeraConfig(r=o.rank, target_modules=list(o.targets), vera_dropout=o.dropout),
        layer=VeraLayer,
        style=Style(3, "yellow", "p", "dotted"),
        options=_RANK,
        defaults=MethodOptions(rank=256),
    ),
    "full": Method(
        summary="every weight of the UNet",
        learning_rate=5e-6,
        s2i_learning_rate=1e-6,
        config=None,
        layer=WholeModel,
        style=Style(1, "black", "s"),
    ),
}
OTHER_STYLES = {"none": Style(0, "grey", "H"), "oft+magnitude": Style(7, "sky", "v", "dashed")}
"""Styles of runs that are of no method in the table: the control encoder alone, and re-fitted magnitudes."""


def label_styles() -> dict[str, Style]:
    """Return how runs are shown, by their method's label, in the order of tables."""
    styles = {name: method.style for name, method in METHODS.items()} | OTHER_STYLES
    return dict(sorted(styles.items(), key=lambda item: item[1].place))


def layer_types() -> dict[str, type[AdapterLayer]]:
    """Return PEFT type -> class of its layers, for every type that can be read."""
    return {method.peft_type: method.layer for method in METHODS.values()} | {"MAGNITUDE": MagnitudeLayer}


def method_of(config: Mapping[str, Any]) -> str:
    """Return the name of the method that an adapter_config.json is of; of none in the table, a name to show."""
    peft_type = config["peft_type"]
    for name, method in METHODS.items():
        if method.peft_type == peft_type and all(config.get(key) == value for key, value in method.marks.items()):
            return name
    two_sided = " two-sided" if config.get("two_sided") else ""
    return f"{peft_type.lower()}{two_sided}"


def magnitude_config(targets: tuple[str, ...]) -> PeftConfig:
    """Return the config of magnitude re-fitting, the extra epoch after OFT: an adapter of its own rather than a method."""
    return MagnitudeConfig(target_modules=list(targets))


def resolve_options(name: str, options: MethodOptions) -> MethodOptions:
    """Fill in the method's defaults. ValueError where an option is given that the method does not have."""
    method = METHODS[name]
    given = {"blocks": options.blocks, "rank": options.rank, "dropout": options.dropout or None}
    unread = [key for key, value in given.items() if value is not None and key not in method.options]
    if unread:
        has = ", ".join(sorted(method.options)) or "no such option"
        raise ValueError(f"method {name} does not have {' or '.join(unread)} (it has {has})")
    return replace(
        options,
        blocks=options.blocks if options.blocks is not None else method.defaults.blocks,
        rank=options.rank if options.rank is not None else method.defaults.rank,
    )


def add_adapter(unet: UNet2DConditionModel, name: str, options: MethodOptions, seed: int = 0) -> nn.Module:
    """Freeze the UNet and put the method's trainable parameters into it, in place.

    Returns what saves and loads them: a PeftModel around the UNet, or the UNet itself for full fine-tuning. The
    parameters are drawn from `seed` alone. ValueError where the options do not fit the UNet.
    """
    method = METHODS[name]
    options = resolve_options(name, options)
    if method.config is None:
        return unet.requires_grad_(True)
    if "blocks" in method.options:
        _check_blocks(unet, options)
    unet.requires_grad_(False)
    config = method.config(options)
    with torch.random.fork_rng(devices=[]), quiet_boft():
        torch.manual_seed(seed)
        return get_peft_model(unet, config)


def adapter_layers(model: nn.Module, name: str = "default") -> dict[str, AdapterLayer]:
    """Return the layers that the adapter `name` is on, by their names in the plain UNet, in its order."""
    configs: Any = model.peft_config
    kind = layer_types()[peft_type_of(configs[name])]
    layers = {key: kind.of(layer) for key, layer in tuner_layers(model).items()}
    return {key: layer for key, layer in layers.items() if layer.holds(name)}


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's layers of any adapter, by their names in the plain UNet."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return {name: module for name, module in plain.named_modules() if isinstance(module, BaseTunerLayer)}


def _check_blocks(unet: UNet2DConditionModel, options: MethodOptions) -> None:
    """Refuse blocks that do not fit: PEFT's OFT silently takes another number of blocks, and BOFT names no layer."""
    config = NaiveConfig(blocks=options.blocks or 1)
    targets = [(n, m) for n, m in unet.named_modules() if isinstance(m, nn.Linear) and n.endswith(options.targets)]
    for name, layer in targets:
        problem = layer_problem(config, name, layer)
        if problem:
            raise ValueError(problem)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
