"""Networks in transformers folders: a vision transformer's CLS token, CLIP, a ResNet's features, and segmenters."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSemanticSegmentation,
    AutoTokenizer,
    CLIPModel,
    ResNetForImageClassification,
)

from etherdiff.eval.functional import unit_channels
from etherdiff.eval.networks import (
    Backbone,
    Identity,
    ImageTextBackbone,
    NetworkSource,
    Pixels,
    find_source,
    hash_files,
    read_preprocessing,
    stacked,
    versions_of,
)
from etherdiff.families.bases import shipped_config
from etherdiff.system.errors import UserError
from etherdiff.system.terminal import quiet_libraries

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
OTHER = ("other", "others", "background", "unlabeled", "unlabelled", "void", "ignore")
"""Names of a first class that means "none of the others"."""


class FolderNetwork:
    """Base class of the networks. The model is loaded at the first image, since all features may be cached."""

    load: Callable[..., Any]
    feature: str

    def __init__(self, source: NetworkSource, device: str) -> None:
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
        """Model in float32 and evaluation mode, on the device. UserError if a weight is missing."""
        quiet_libraries()
        try:
            model, found = type(self).load(
                str(self.source.folder), local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{self.source.name} cannot be read: {str(error).splitlines()[0]}") from error
        # DINO is published without the pooling layer that ViTModel adds, which is not used
        missing = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))
        if missing or found["mismatched_keys"]:
            names = ", ".join([*missing, *map(str, found["mismatched_keys"])][:3])
            raise UserError(f"{self.source.name} lacks weights that its configuration asks for ({names}, …)")
        return model.eval().requires_grad_(False).to(self.device)


class ClsToken(FolderNetwork, Backbone):
    """A vision transformer's CLS token after the last layer, as in the paper's DINO score."""

    load = AutoModel.from_pretrained
    feature = "CLS token of the last hidden state"

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> Tensor:
        output = self.model(pixel_values=self.preprocessing.normalize(stacked(pixels, self.device)))
        return output.last_hidden_state[:, 0]


class Clip(FolderNetwork, ImageTextBackbone):
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
        """Number of tokens that the text encoder reads, including start and end."""
        config = json.loads((self.source.folder / "config.json").read_text(encoding="utf-8"))
        return int(config.get("text_config", {}).get("max_position_embeddings", 77))

    @cached_property
    def tokenizer(self) -> Any:
        own = any((self.source.folder / name).is_file() for name in TOKENIZER_FILES)
        # CLIP's vocabulary comes with the package: a small model need not include it
        folder = self.source.folder if own else shipped_config("sd15") / "tokenizer"
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


class ResNetPooled(FolderNetwork, Backbone):
    """A ResNet's features after global pooling: for FID where Inception does not fit."""

    load = ResNetForImageClassification.from_pretrained
    feature = "pooled output"

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> Tensor:
        output = self.model.resnet(self.preprocessing.normalize(stacked(pixels, self.device)))
        return output.pooler_output.flatten(1)


class ResNetLayers(FolderNetwork, Backbone):
    """A ResNet's hidden states, scaled so that squared distances are LPIPS without learned weights."""

    load = ResNetForImageClassification.from_pretrained
    feature = "LPIPS without linear weights over all hidden states"
    cached = False

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> Tensor:
        batch = self.preprocessing.normalize(stacked(pixels, self.device))
        return unit_channels(self.model.resnet(batch, output_hidden_states=True).hidden_states)


def load_from_folder(role: str, source: NetworkSource, device: str) -> Backbone:
    """Return the network in a transformers folder, for a role.

    Raises:
        UserError: no weights, no preprocessing, or a network that the role cannot use.
    """
    kind = _read_config(source).model_type
    if role == "clip" and kind == "clip":
        return Clip(source, device)
    if role == "dino" and kind not in ("clip", "resnet"):
        return ClsToken(source, device)
    if role in ("lpips", "fid") and kind == "resnet":
        return ResNetLayers(source, device) if role == "lpips" else ResNetPooled(source, device)
    needed = {"clip": "a CLIP model", "dino": "a vision transformer", "lpips": "a ResNet", "fid": "a ResNet"}
    raise UserError(f"{source.name} is a {kind} model, but {role} needs {needed[role]}")


def _read_config(source: NetworkSource) -> Any:
    if not (source.folder / "config.json").is_file():  # transformers 4 guesses a model from the folder's name
        raise UserError(f"{source.name} is not a transformers model: it has no config.json")
    try:
        return AutoConfig.from_pretrained(str(source.folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{source.name} is not a transformers model: {str(error).splitlines()[0]}") from error


def _projected(output: Any) -> Tensor:
    """Return the projection: pooler_output of an object in transformers 5, the output itself in 4.x."""
    return output if isinstance(output, Tensor) else output.pooler_output


# --- Segmenters ------------------------------------------------------------------------------------------------------


class Segmenter(FolderNetwork):
    """Turns images into class indices. If the model counts "other" as class 0, that class is left out."""

    load = AutoModelForSemanticSegmentation.from_pretrained
    feature = "class of each pixel: logits scaled bilinearly to the map, argmax over the dataset's classes"
    largest_batch = 16
    """Maximum images per forward pass; larger batches are split."""

    def __init__(self, source: NetworkSource, classes: Sequence[str], device: str) -> None:
        """classes: names of the dataset's classes, in order. UserError where the network has other classes."""
        self.classes = len(classes)
        self.skipped = _outputs_before(source, _read_outputs(source), classes)
        """Number of outputs before the dataset's first class: 1 if the network counts "other" as class 0, else 0."""
        if self.skipped:
            self.feature += ", the first output left out"
        super().__init__(source, device)
        if self.preprocessing.crop is not None:
            raise UserError(
                f"{source.name} crops the centre of an image, so it cannot score a whole map: name another segmenter"
            )

    @torch.inference_mode()
    def segment(self, pixels: Pixels, resolution: int) -> Tensor:
        """Turn uint8 pixels (B, 3, h, w) into classes: int64 (B, resolution, resolution), 0 to classes - 1, on the CPU.

        An image whose logits hold NaN or infinity is -1 everywhere.
        """
        batch = self.preprocessing.normalize(stacked(pixels, self.device))
        parts = [self._classes(part, resolution) for part in batch.split(self.largest_batch)]
        return torch.cat(parts).cpu()

    def _classes(self, batch: Tensor, resolution: int) -> Tensor:
        logits = self.model(pixel_values=batch).logits.float()
        if logits.shape[1] != self.classes + self.skipped:
            raise UserError(f"{self.source.name} gives {logits.shape[1]} classes, but its configuration says otherwise")
        finite = torch.isfinite(logits).flatten(1).all(1)
        # as mmsegmentation does: the logits are scaled to the map, never the map to the logits
        logits = F.interpolate(logits[:, self.skipped :], (resolution, resolution), mode="bilinear", align_corners=False)
        return torch.where(finite[:, None, None], logits.argmax(1), -1)


def load_segmenter(spec: str, classes: Sequence[str], device: str) -> Segmenter:
    """Return the network that `spec` names: a hub id (with @REVISION), a local folder, or tiny:upernet.

    Raises:
        UserError: it is not there, segments nothing, or has other classes than the dataset.
    """
    return Segmenter(find_source("segmenter", spec), classes, device)


def _read_outputs(source: NetworkSource) -> list[str]:
    """Return the names of the network's classes in its configuration; LABEL_0, LABEL_1, … where it has none."""
    config = _read_config(source)
    if type(config) not in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING:
        raise UserError(f"{source.name} is a {config.model_type} model, which does not segment: name an UperNet or SegFormer")
    return [str(config.id2label[index]) for index in range(config.num_labels)]


def _outputs_before(source: NetworkSource, outputs: Sequence[str], classes: Sequence[str]) -> int:
    """Return how many of the network's classes come before the dataset's first: 0 or 1.

    `do_reduce_labels` of the image processor means that the network was trained on maps without 0 ("other"), as in ADE20K's
    challenge: then its class 0 is the map's 1, which is the dataset's 0, and no class comes before.
    """
    has_other = _plain(outputs[0]) in OTHER and _plain(classes[0]) != _plain(outputs[0])
    counts = f"{source.name} has {len(outputs)} classes (the first is {outputs[0]!r}), and the dataset {len(classes)}"
    if len(outputs) == len(classes) + 1 and _reduces_labels(source):
        raise UserError(
            f"{counts}: its image processor removes 'other' from maps, so it must have as many classes as the dataset"
        )
    if len(outputs) == len(classes) + 1 and has_other:
        return 1
    if len(outputs) != len(classes):
        raise UserError(f"{counts}: name a segmenter that was trained on this dataset's classes")
    if has_other:
        raise UserError(f"{counts}: it counts 'other' as class 0, so it lacks one of the dataset's classes")
    named, wanted = [_plain(name) for name in outputs], [_plain(name) for name in classes]
    if named != wanted and sorted(named) == sorted(wanted):
        raise UserError(f"{source.name} has the dataset's classes in another order")
    return 0


def _plain(name: str) -> str:
    """Return a class's first name: ADE20K's "building, edifice" is "building" elsewhere."""
    return name.partition(",")[0].partition(";")[0].strip().lower()


def _reduces_labels(source: NetworkSource) -> bool:
    """Say whether the image processor reduced labels in training; `reduce_labels` is the option's old name."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = source.folder / name
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            config = config.get("image_processor", config)
            return bool(config.get("do_reduce_labels", config.get("reduce_labels", False)))
    return False
