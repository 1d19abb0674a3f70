"""From an image to what a network reads, step by step as transformers' processors do with Pillow.

Transformers 5 resizes with torchvision by default, 4.x with Pillow: the same model would give other features. Here the
processor's configuration is read, and Pillow does the work whatever the library's version.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from etherdiff.system.errors import UserError

READING = "as a viewer shows it: EXIF orientation and colour profile applied, transparency on white, RGB"
"""How every image file is read, before anything of the below."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, scale to 0..1, normalise; whatever is None is not done."""

    edge: int | None = None
    """Pixels: the shorter side is scaled to it, keeping proportions."""
    size: tuple[int, int] | None = None
    """(height, width) in pixels: scaled to it, proportions not kept."""
    resample: int = Image.Resampling.BILINEAR
    """Pillow's number of the filter."""
    crop: tuple[int, int] | None = None
    """(height, width) of the window cut from the centre."""
    crop_rounding: Literal["down", "nearest"] = "down"
    """Where the window starts when it cannot be centred: transformers rounds down, torchvision to the nearest even."""
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def pixels(self, image: Image.Image) -> Tensor:
        """An RGB image, resized and cropped, as uint8 (3, H, W)."""
        target = self._target(image)
        if target is not None:
            image = image.resize(target, Image.Resampling(self.resample))
        if self.crop is not None:
            height, width = self.crop
            left, top = (self._half(image.width - width), self._half(image.height - height))
            image = image.crop((left, top, left + width, top + height))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to float32, as the network reads it."""
        mean, std = (pixels.new_tensor(values, dtype=torch.float32).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() * self.scale - mean) / std

    def describe(self) -> dict[str, Any]:
        """For an identity: JSON-able, and different for everything that changes a pixel."""
        return {
            "reading": READING,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()},
            "resample": Image.Resampling(self.resample).name.lower(),
        }

    def _half(self, pixels: int) -> int:
        return pixels // 2 if self.crop_rounding == "down" else round(pixels / 2)

    def _target(self, image: Image.Image) -> tuple[int, int] | None:
        """(width, height) to resize to, rounded down on the longer side as transformers and torchvision do."""
        if self.size is not None:
            return self.size[1], self.size[0]
        if self.edge is None:
            return None
        short, long = sorted(image.size)
        longer = int(self.edge * long / short)
        return (self.edge, longer) if image.width <= image.height else (longer, self.edge)


def read_preprocessing(folder: Path) -> Preprocessing:
    """What a transformers folder says of its images, in preprocessor_config.json or processor_config.json.

    Raises:
        UserError: neither is there, or it asks for something that is not done here.
    """
    plain, nested = folder / "preprocessor_config.json", folder / "processor_config.json"
    try:
        if plain.is_file():
            return from_processor(json.loads(plain.read_text(encoding="utf-8")))
        if nested.is_file():
            return from_processor(json.loads(nested.read_text(encoding="utf-8"))["image_processor"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: the image processor's configuration cannot be used ({error})") from error
    raise UserError(f"{folder} has no preprocessor_config.json: without it nobody knows how its images are to be prepared")


def from_processor(config: dict[str, Any]) -> Preprocessing:
    """The steps in the configuration of an image processor of transformers (CLIP, ViT, ConvNeXT and their kin).

    Raises:
        ValueError: a step that is not known here.
    """
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    if config.get("do_pad") or config.get("do_rescale") is False:
        raise ValueError("it pads, or does not scale pixels to 0..1")
    edge: int | None = None
    size: tuple[int, int] | None = None
    if config.get("do_resize", True):
        edge, size = _edge_and_size(config, kind)
    crop = _pair(config.get("crop_size") or edge or size) if config.get("do_center_crop", "CLIP" in kind) else None
    resample = config.get("resample", Image.Resampling.BICUBIC if "CLIP" in kind else Image.Resampling.BILINEAR)
    if "ConvNext" in kind and edge is not None:  # below 384 px it scales to edge / crop_pct and cuts edge x edge
        square = (edge, edge)
        if edge < 384:
            edge, crop = int(edge / config.get("crop_pct", 224 / 256)), square
        else:
            edge, size = None, square
    normalized = config.get("do_normalize", True)
    return Preprocessing(
        edge=edge,
        size=size,
        resample=int(resample),
        crop=crop,
        scale=float(config.get("rescale_factor", 1 / 255)),
        mean=tuple(config["image_mean"]) if normalized else (0.0, 0.0, 0.0),
        std=tuple(config["image_std"]) if normalized else (1.0, 1.0, 1.0),
    )


def _edge_and_size(config: dict[str, Any], kind: str) -> tuple[int | None, tuple[int, int] | None]:
    size = config["size"]
    if isinstance(size, int):  # as old files have it: CLIP's is the shorter side, ViT's a square
        return (size, None) if "CLIP" in kind or "ConvNext" in kind else (None, (size, size))
    if "shortest_edge" in size and "longest_edge" not in size:
        return int(size["shortest_edge"]), None
    if "height" in size:
        return None, _pair(size)
    raise ValueError(f"size {size}")


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return int(size["height"]), int(size["width"])
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
