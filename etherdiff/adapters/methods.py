"""Every way of fine-tuning by its name: which layers it takes, which PEFT config it is, which learning rate it wants."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import BOFTConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig, VeraConfig, get_peft_model
from torch import nn

from etherdiff.adapters.boft import quiet_boft
from etherdiff.adapters.ether import EtherConfig
from etherdiff.adapters.magnitude import MagnitudeConfig
from etherdiff.adapters.naive import NaiveConfig
from etherdiff.adapters.tuner import layer_problem

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION,  # the paper's subject-driven runs
    "attention+geglu": (*ATTENTION, "ff.net.0.proj"),  # its S2I runs
    "attention+feedforward": (*ATTENTION, "ff.net.0.proj", "ff.net.2"),
}


@dataclass(frozen=True)
class MethodOptions:
    """What a method can be told; a method reads what it knows and refuses the rest."""

    targets: tuple[str, ...] = ATTENTION
    blocks: int | None = None
    rank: int | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Method:
    """A row of the table below. `config` makes a PEFT config of MethodOptions; full fine-tuning, without adapter, has none."""

    summary: str
    learning_rate: float
    """Of subject-driven runs."""
    s2i_learning_rate: float
    config: Callable[[Any], PeftConfig] | None
    options: frozenset[str] = frozenset()
    """Which of blocks, rank and dropout it reads."""
    defaults: MethodOptions = MethodOptions()
    lora_exact: bool = False
    """Whether its update is of low rank, so that a LoRA file can hold it exactly."""


def _ether(variant: str, two_sided: bool | None) -> Callable[[Any], PeftConfig]:
    return lambda o: EtherConfig(
        variant=variant, two_sided=two_sided, blocks=o.blocks, target_modules=list(o.targets), dropout=o.dropout
    )


_BLOCKS, _RANK = frozenset({"blocks", "dropout"}), frozenset({"rank", "dropout"})
_ONE_BLOCK, _FOUR_BLOCKS = MethodOptions(blocks=1), MethodOptions(blocks=4)

# Learning rates: of the ETHER paper (appendix C, subject-driven) for the first seven but vera's; of PEFT's own DreamBooth
# examples for boft and hra; vera's is that of its paper's language models, nobody having published one for diffusion. For S2I
# the paper gives ether's, ether+'s, oft's and naive's, a sixth of these; the others' are a sixth as well.
METHODS: dict[str, Method] = {
    "ether": Method("a reflection of the input features", 6e-3, 1e-3, _ether("ether", None), _BLOCKS, _ONE_BLOCK, True),
    "ether+": Method("relaxed reflections on both sides", 6e-3, 1e-3, _ether("ether+", None), _BLOCKS, _ONE_BLOCK, True),
    "ether+one-sided": Method("a relaxed input reflection", 6e-3, 1e-3, _ether("ether+", False), _BLOCKS, _ONE_BLOCK, True),
    "lora": Method(
        "an additive update of low rank",
        6e-4,
        1e-4,
        lambda o: LoraConfig(r=o.rank, lora_alpha=o.rank, target_modules=list(o.targets), lora_dropout=o.dropout),
        _RANK,
        MethodOptions(rank=4),
        True,
    ),
    "oft": Method(
        "block-diagonal rotations (exact Cayley transform)",
        6e-5,
        1e-5,
        lambda o: OFTConfig(
            r=o.blocks,
            oft_block_size=0,
            use_cayley_neumann=False,  # PEFT's default only approximates the paper's rotation
            target_modules=list(o.targets),
            module_dropout=o.dropout,
        ),
        _BLOCKS,
        _FOUR_BLOCKS,
    ),
    "naive": Method(
        "block-diagonal matrices without a constraint",
        6e-5,
        1e-5,
        lambda o: NaiveConfig(blocks=o.blocks, target_modules=list(o.targets), dropout=o.dropout),
        _BLOCKS,
        _FOUR_BLOCKS,
    ),
    "boft": Method(
        "block-diagonal rotations, finer than oft's",
        3e-5,
        5e-6,
        lambda o: BOFTConfig(
            boft_block_size=0,
            boft_block_num=o.blocks,
            boft_n_butterfly_factor=1,  # PEFT drops further factors, silently, where its CUDA extension does not build
            target_modules=list(o.targets),
            boft_dropout=o.dropout,
        ),
        _BLOCKS,
        MethodOptions(blocks=8),
    ),
    "hra": Method(
        "a chain of reflections",
        1e-2,
        1.7e-3,
        lambda o: HRAConfig(r=o.rank, target_modules=list(o.targets)),
        frozenset({"rank"}),
        MethodOptions(rank=8),
        True,
    ),
    "vera": Method(
        "scales on random projections shared by all layers",
        4e-3,
        7e-4,
        lambda o: VeraConfig(r=o.rank, target_modules=list(o.targets), vera_dropout=o.dropout),
        _RANK,
        MethodOptions(rank=256),
        True,
    ),
    "full": Method("every weight of the UNet", 5e-6, 1e-6, None),
}


def magnitude_config(targets: tuple[str, ...]) -> PeftConfig:
    """Magnitude re-fitting, the extra epoch after OFT: an adapter of its own rather than a method."""
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


def _check_blocks(unet: UNet2DConditionModel, options: MethodOptions) -> None:
    """Our own adapters check themselves; PEFT's OFT silently takes another number of blocks, and BOFT names no layer."""
    config = NaiveConfig(blocks=options.blocks or 1)
    targets = [(n, m) for n, m in unet.named_modules() if isinstance(m, nn.Linear) and n.endswith(options.targets)]
    for name, layer in targets:
        problem = layer_problem(config, name, layer)
        if problem:
            raise ValueError(problem)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
