"""LoRA files of other programs as adapters of the UNet: sd-scripts' (kohya) names, and diffusers' own."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from etherdiff.system.errors import UserError
from etherdiff.system.text import listed

KOHYA = re.compile(r"lora_unet_(?P<layer>.+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha)")
DIFFUSERS = re.compile(
    r"unet\.(?P<layer>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora\.down\.weight|lora\.up\.weight|alpha)"
)
PARTS = {"lora_down.weight": "down", "lora_A.weight": "down", "lora.down.weight": "down"}
PARTS |= {"lora_up.weight": "up", "lora_B.weight": "up", "lora.up.weight": "up", "alpha": "alpha"}
TEXT_ENCODER = ("lora_te", "text_encoder.")


def read_metadata(path: Path) -> dict[str, str]:
    """Return a LoRA file's metadata. UserError where it is none that can be an adapter here."""
    if path.suffix != ".safetensors":
        raise UserError(f"adapter {path} is a file: give a LoRA file that ends in .safetensors, or an adapter's folder.")
    try:
        with safe_open(path, "pt") as file:
            keys, metadata = list(file.keys()), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"adapter {path} is damaged or no safetensors file ({error}): copy it again.") from error
    if any(key.startswith("base_model.model.") for key in keys):
        raise UserError(f"adapter {path} is a file: give the folder that holds it and adapter_config.json.")
    of_text = [key for key in keys if key.startswith(TEXT_ENCODER)]
    if of_text:
        raise UserError(
            f"adapter {path} also changes the text encoder ({len(of_text)} tensors), and etherdiff adapts the UNet alone: "
            "without them it would draw something else. Give a file that was trained on the UNet alone."
        )
    unknown = [key for key in keys if not (KOHYA.fullmatch(key) or DIFFUSERS.fullmatch(key))]
    if unknown or not keys:
        raise UserError(
            f"adapter {path} is no plain LoRA of a Stable Diffusion UNet (it holds {listed(unknown, 3) or 'nothing'}): "
            "etherdiff reads sd-scripts' (kohya) and diffusers' LoRA files (no DoRA, LoHa, LoKr), and its own folders."
        )
    return metadata


def base_of(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the base that etherdiff recorded in a file of its own."""
    if "base_fingerprint" not in metadata:
        return None
    return {"name": metadata["base_model"], "fingerprint": json.loads(metadata["base_fingerprint"])}


def read_lora(path: Path, metadata: Mapping[str, str], unet: nn.Module) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return a LoRA file's tensors by PEFT's names, and the rank of each layer. Its alphas are folded into the tensors.

    unet: gives the layers their names, which kohya's files write with underscores for dots. UserError where one has no place.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(path).items():
        if found := KOHYA.fullmatch(key) or DIFFUSERS.fullmatch(key):
            parts.setdefault(found["layer"].replace(".", "_"), {})[PARTS[found["part"]]] = value.float()
    modules = {name.replace(".base_layer", "").replace(".", "_"): (name, module) for name, module in unet.named_modules()}
    unknown = sorted(layer for layer in parts if layer not in modules)
    if unknown:
        raise UserError(
            f"adapter {path} does not fit this UNet: there is no place for {len(unknown)} of its layers ({listed(unknown, 3)})."
        )
    tensors, ranks = {}, {}
    for layer, given in parts.items():
        if {"down", "up"} - given.keys():
            raise UserError(f"adapter {path} is incomplete: {layer} lacks a matrix. Copy it again.")
        name, module = modules[layer][0].replace(".base_layer", ""), modules[layer][1]
        down, up = given["down"], given["up"]
        rank = ranks[name] = len(down)
        if isinstance(module, nn.Linear):  # written as convolutions by some
            down, up = down.flatten(1), up.flatten(1)
        alpha = float(given["alpha"]) if "alpha" in given else _recorded_alpha(metadata, name, rank)
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.mul(up, alpha / rank).contiguous()
    return tensors, ranks


def _recorded_alpha(metadata: Mapping[str, str], layer: str, rank: int) -> float:
    """Return the alpha that PEFT recorded in diffusers' metadata; the rank where there is none."""
    config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    patterns = config.get("unet.alpha_pattern") or {}
    matching = [alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer)]
    return float(matching[0] if matching else config.get("unet.lora_alpha", rank))
