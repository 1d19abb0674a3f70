"""Write Stable Diffusion 1.x and 2.x in the original (CompVis) layout: all weights in one file."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import PreTrainedModel

from etherdiff.families.bases import CLIP, OPEN_CLIP, UNET, VAE
from etherdiff.families.sd1 import text_encoder_state_dict
from etherdiff.system.errors import UserError
from etherdiff.system.files import save_tensors

StateDict = dict[str, Tensor]
OPEN_CLIP_WIDTH = 1024  # Stable Diffusion 2's text encoder, OpenCLIP ViT-H; Stable Diffusion 1's, CLIP ViT-L, has 768


class Rule(NamedTuple):
    """Parameters under `old` go under `new`; `inner` renames what follows, None keeps it as it is."""

    old: str
    new: str
    inner: Mapping[str, str] | None = None


UNET_BLOCKS = {
    "CrossAttnDownBlock2D",
    "DownBlock2D",
    "UNetMidBlock2DCrossAttn",
    "CrossAttnUpBlock2D",
    "UpBlock2D",
}
UNET_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
VAE_RESNET = {
    "norm1.": "norm1.",
    "conv1.": "conv1.",
    "norm2.": "norm2.",
    "conv2.": "conv2.",
    "conv_shortcut.": "nin_shortcut.",
}
VAE_ATTENTION = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}
OPEN_CLIP_LAYER = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.": "attn.",
}


def write_single_file(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: PreTrainedModel,
    path: str | Path,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the three models as one `.safetensors` that WebUI, ComfyUI and diffusers' `from_single_file` load.

    `dtype` casts every floating-point weight; None keeps them as they are. `metadata` goes into the file's header.
    The file appears whole or not at all.
    Raises UserError if `path` has another suffix (loaders go by it) or the models do not fit the layout.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"A single-file checkpoint must be named *.safetensors, not {path.name}.")
    state = original_state_dict(unet, vae, text_encoder)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors({key: _storable(value, dtype) for key, value in state.items()}, path, metadata)


def original_state_dict(unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: PreTrainedModel) -> StateDict:
    """The models' weights under the original names; nothing is copied but OpenCLIP's concatenated projections.

    A text encoder 1024 wide is written as OpenCLIP's (Stable Diffusion 2), any other as transformers' CLIP.
    Raises UserError for what the layout cannot hold: other kinds of blocks, unmerged adapters, all 24 OpenCLIP layers.
    """
    open_clip = text_encoder.config.hidden_size == OPEN_CLIP_WIDTH
    text = text_encoder_state_dict(text_encoder)
    parts = {
        UNET: _original_unet(unet.state_dict(), unet.config),
        VAE: _original_vae(vae.state_dict(), vae.config),
        OPEN_CLIP if open_clip else CLIP: _original_open_clip(text) if open_clip else _original_clip(text),
    }
    return {prefix + key: value for prefix, state in parts.items() for key, value in state.items()}


def _storable(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    # position_ids stays an integer: WebUI indexes with it.
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def _rename(key: str, rules: Iterable[Rule]) -> str:
    """`key` after the first rule it falls under. Raises UserError where there is none."""
    if ".base_layer." in key:
        raise UserError(f"A model still carries an adapter ({key}): merge it before writing a single file.")
    for rule in rules:
        if not key.startswith(rule.old):
            continue
        inner = key.removeprefix(rule.old)
        if rule.inner is None:
            return rule.new + inner
        for old, new in rule.inner.items():
            if inner.startswith(old):
                return rule.new + new + inner.removeprefix(old)
    raise UserError(f"The original Stable Diffusion layout has no place for {key}: write a diffusers folder instead.")


def _original_unet(state: StateDict, config: Mapping[str, Any]) -> StateDict:
    rules = list(_unet_rules(config))
    return {_rename(key, rules): value for key, value in state.items()}


def _unet_rules(config: Mapping[str, Any]) -> Iterator[Rule]:
    """The original numbers the layers of all blocks in one sequence, a down- or upsampler being part of it."""
    layers, down, up = config["layers_per_block"], config["down_block_types"], config["up_block_types"]
    foreign = {*down, *up, config["mid_block_type"]} - UNET_BLOCKS
    if foreign or not isinstance(layers, int):
        raise UserError(
            f"The original Stable Diffusion layout cannot hold this UNet ({', '.join(map(str, foreign)) or layers}): "
            f"it needs blocks out of {', '.join(sorted(UNET_BLOCKS))} and one layers_per_block for them all. "
            "Write a diffusers folder instead."
        )
    yield Rule("time_embedding.linear_1.", "time_embed.0.")
    yield Rule("time_embedding.linear_2.", "time_embed.2.")
    yield Rule("conv_in.", "input_blocks.0.0.")
    yield Rule("conv_norm_out.", "out.0.")
    yield Rule("conv_out.", "out.2.")

    yield Rule("mid_block.resnets.0.", "middle_block.0.", UNET_RESNET)
    yield Rule("mid_block.attentions.0.", "middle_block.1.")
    yield Rule("mid_block.resnets.1.", "middle_block.2.", UNET_RESNET)

    for i in range(len(down)):
        first = 1 + i * (layers + 1)  # after conv_in; every block but the last has a downsampler
        for j in range(layers):
            yield Rule(f"down_blocks.{i}.resnets.{j}.", f"input_blocks.{first + j}.0.", UNET_RESNET)
            yield Rule(f"down_blocks.{i}.attentions.{j}.", f"input_blocks.{first + j}.1.")
        yield Rule(f"down_blocks.{i}.downsamplers.0.conv.", f"input_blocks.{first + layers}.0.op.")

    for i, kind in enumerate(up):
        first = i * (layers + 1)
        for j in range(layers + 1):
            yield Rule(f"up_blocks.{i}.resnets.{j}.", f"output_blocks.{first + j}.0.", UNET_RESNET)
            yield Rule(f"up_blocks.{i}.attentions.{j}.", f"output_blocks.{first + j}.1.")
        # The upsampler comes last in the block's last layer, after the attention where there is one.
        position = 2 if kind == "CrossAttnUpBlock2D" else 1
        yield Rule(f"up_blocks.{i}.upsamplers.0.conv.", f"output_blocks.{first + layers}.{position}.conv.")


def _original_vae(state: StateDict, config: Mapping[str, Any]) -> StateDict:
    """The original's attention has 1x1 convolutions, (out, in, 1, 1), for linear layers, (out, in)."""
    rules = list(_vae_rules(config))
    return {
        _rename(key, rules): value[:, :, None, None] if ".attentions." in key and value.ndim == 2 else value
        for key, value in state.items()
    }


def _vae_rules(config: Mapping[str, Any]) -> Iterator[Rule]:
    """The original's decoder counts its levels down to the image, diffusers' up."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    for half in ("encoder", "decoder"):
        yield Rule(f"{half}.conv_in.", f"{half}.conv_in.")
        yield Rule(f"{half}.conv_norm_out.", f"{half}.norm_out.")
        yield Rule(f"{half}.conv_out.", f"{half}.conv_out.")
        yield Rule(f"{half}.mid_block.resnets.0.", f"{half}.mid.block_1.", VAE_RESNET)
        yield Rule(f"{half}.mid_block.attentions.0.", f"{half}.mid.attn_1.", VAE_ATTENTION)
        yield Rule(f"{half}.mid_block.resnets.1.", f"{half}.mid.block_2.", VAE_RESNET)
    for i in range(levels):
        for j in range(layers):
            yield Rule(f"encoder.down_blocks.{i}.resnets.{j}.", f"encoder.down.{i}.block.{j}.", VAE_RESNET)
        yield Rule(f"encoder.down_blocks.{i}.downsamplers.0.", f"encoder.down.{i}.downsample.")
        level = levels - 1 - i
        for j in range(layers + 1):
            yield Rule(f"decoder.up_blocks.{i}.resnets.{j}.", f"decoder.up.{level}.block.{j}.", VAE_RESNET)
        yield Rule(f"decoder.up_blocks.{i}.upsamplers.0.", f"decoder.up.{level}.upsample.")
    yield Rule("quant_conv.", "quant_conv.")
    yield Rule("post_quant_conv.", "post_quant_conv.")


def _original_clip(text: StateDict) -> StateDict:
    """transformers' own names, and the constant `position_ids`, int64 (1, 77), that files of that time hold."""
    positions = text["text_model.embeddings.position_embedding.weight"]
    position_ids = torch.arange(len(positions), device=positions.device)[None]
    return {**text, "text_model.embeddings.position_ids": position_ids}


def _original_open_clip(text: StateDict) -> StateDict:
    """OpenCLIP's names; each layer's q, k and v, (d, d), become one `in_proj`, (3d, d)."""
    fused = {}
    for key, value in text.items():
        if ".self_attn.q_proj." in key:
            rows = [text[key.replace(".q_proj.", f".{name}_proj.")] for name in "qkv"]
            fused[key.replace(".q_proj.", ".in_proj_")] = torch.cat(rows)
        elif not re.search(r"\.self_attn\.[kv]_proj\.", key):
            fused[key] = value
    rules = list(_open_clip_rules())
    named = {_rename(key, rules): value for key, value in fused.items()}
    return named | _unused_open_clip(named)


def _unused_open_clip(named: StateDict) -> StateDict:
    """What no image depends on, and readers look for, as sd-scripts fills it in: a last layer, a projection of ones, a scale.

    diffusers 0.28 to 0.32 do not open a file without `text_projection`.
    """
    before = "transformer.resblocks.22."
    last = {key.replace(before, "transformer.resblocks.23."): named[key].clone() for key in named if key.startswith(before)}
    like = named["ln_final.weight"]
    projection = torch.ones(len(like), len(like), dtype=like.dtype, device=like.device)
    return last | {"text_projection": projection, "logit_scale": torch.tensor(1)}


def _open_clip_rules() -> Iterator[Rule]:
    """No rule for the last of ViT-H's 24 layers: every reader of Stable Diffusion 2 files leaves it out."""
    yield Rule("text_model.embeddings.token_embedding.", "token_embedding.")
    yield Rule("text_model.embeddings.position_embedding.weight", "positional_embedding")
    yield Rule("text_model.final_layer_norm.", "ln_final.")
    for i in range(23):
        yield Rule(f"text_model.encoder.layers.{i}.", f"transformer.resblocks.{i}.", OPEN_CLIP_LAYER)
