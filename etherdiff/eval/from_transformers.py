"""Features from transformers folders: a vision transformer's CLS token, CLIP, a ResNet's pooled and inner features."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPModel, ResNetForImageClassification

from etherdiff.eval.lpips_distance import unit_channels
from etherdiff.eval.network import Backbone, Identity, ImageTextBackbone, Pixels, hash_files, stacked, versions_of
from etherdiff.eval.preprocessing import read_preprocessing
from etherdiff.families.shipped import shipped_config
from etherdiff.system.errors import UserError
from etherdiff.system.terminal import quiet_libraries

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


@dataclass(frozen=True)
class Source:
    """A transformers folder on this machine, and where it came from."""

    name: str
    folder: Path
    revision: str | None = None

    @property
    def weight_files(self) -> list[Path]:
        """What `from_pretrained` reads: safetensors where there are any."""
        return sorted(self.folder.glob("*.safetensors")) or sorted(self.folder.glob("pytorch_model*.bin"))


class FromFolder:
    """The parts that all of them share; the model is read at the first image, since features may all be cached."""

    load: Callable[..., Any]
    feature: str

    def __init__(self, source: Source, device: str) -> None:
        if not source.weight_files:
            raise UserError(f"{source.name}: no weights (*.safetensors or pytorch_model*.bin) in its folder")
        self.source, self.device = source, device
        self.preprocessing = read_preprocessing(source.folder)
        self.identity = Identity(
            name=source.name,
            revision=source.revision,
            weights_sha256=hash_files(source.weight_files),
            weights_hashed=", ".join(path.name for path in source.weight_files),
            feature=self.feature,
            preprocessing=self.preprocessing.describe(),
            versions=versions_of("transformers"),
        )

    @cached_property
    def model(self) -> Any:
        """In float32 and evaluation mode, on the device. UserError where a weight would have been made up."""
        quiet_libraries()
        try:
            model, found = type(self).load(
                str(self.source.folder), local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{self.source.name} cannot be read: {str(error).splitlines()[0]}") from error
        # DINO is published without the pooling layer that ViTModel adds, and nobody reads
        missing = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))
        if missing or found["mismatched_keys"]:
            names = ", ".join([*missing, *map(str, found["mismatched_keys"])][:3])
            raise UserError(f"{self.source.name} lacks weights that its configuration asks for ({names}, …)")
        return model.eval().requires_grad_(False).to(self.device)


class ClsToken(FromFolder, Backbone):
    """A vision transformer's CLS token after the last layer, as in the paper's DINO score."""

    load = AutoModel.from_pretrained
    feature = "CLS token of the last hidden state"

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> Tensor:
        output = self.model(pixel_values=self.preprocessing.normalize(stacked(pixels, self.device)))
        return output.last_hidden_state[:, 0]


class Clip(FromFolder, ImageTextBackbone):
    """CLIP's projected image and text embeddings."""

    load = CLIPModel.from_pretrained
    feature = "projected embeddings"

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> Tensor:
        batch = self.preprocessing.normalize(stacked(pixels, self.device))
        return _projected(self.model.get_image_features(pixel_values=batch))

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt").to(self.device)
        features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return _projected(features).cpu()

    def too_long(self, texts: Sequence[str]) -> list[int]:
        return [max(0, len(ids) - self.context) for ids in self.tokenizer(list(texts), verbose=False).input_ids]

    @cached_property
    def context(self) -> int:
        """Tokens that the text encoder reads, start and end included."""
        config = json.loads((self.source.folder / "config.json").read_text(encoding="utf-8"))
        return int(config.get("text_config", {}).get("max_position_embeddings", 77))

    @cached_property
    def tokenizer(self) -> Any:
        own = any((self.source.folder / name).is_file() for name in TOKENIZER_FILES)
        # CLIP's own vocabulary comes with the package: a small model need not carry it again
        folder = self.source.folder if own else shipped_config("sd15") / "tokenizer"
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


class ResNetPooled(FromFolder, Backbone):
    """A ResNet's features after global pooling: what FID needs, where Inception does not fit."""

    load = ResNetForImageClassification.from_pretrained
    feature = "pooled output"

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> Tensor:
        output = self.model.resnet(self.preprocessing.normalize(stacked(pixels, self.device)))
        return output.pooler_output.flatten(1)


class ResNetLayers(FromFolder, Backbone):
    """A ResNet's inner features, so scaled that squared distances between them are LPIPS without learned weights."""

    load = ResNetForImageClassification.from_pretrained
    feature = "LPIPS without linear weights over all hidden states"
    cached = False

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> Tensor:
        batch = self.preprocessing.normalize(stacked(pixels, self.device))
        return unit_channels(self.model.resnet(batch, output_hidden_states=True).hidden_states)


def load_from_folder(role: str, source: Source, device: str) -> Backbone:
    """The network in a transformers folder, for what it is to be used.

    Raises:
        UserError: no weights, no preprocessing, or a network that the role cannot use.
    """
    try:
        kind = AutoConfig.from_pretrained(str(source.folder), local_files_only=True).model_type
    except (OSError, ValueError) as error:
        raise UserError(f"{source.name} is no transformers model: {str(error).splitlines()[0]}") from error
    if role == "clip" and kind == "clip":
        return Clip(source, device)
    if role == "dino" and kind not in ("clip", "resnet"):
        return ClsToken(source, device)
    if role in ("lpips", "fid") and kind == "resnet":
        return ResNetLayers(source, device) if role == "lpips" else ResNetPooled(source, device)
    needed = {"clip": "a CLIP model", "dino": "a vision transformer", "lpips": "a ResNet", "fid": "a ResNet"}
    raise UserError(f"{source.name} is a {kind} model, but {role} needs {needed[role]}")


def _projected(output: Any) -> Tensor:
    """Transformers 5 gives an object, whose pooler_output is the projection; 4.x gave the projection itself."""
    return output if isinstance(output, Tensor) else output.pooler_output
