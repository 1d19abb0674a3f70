"""Networks that turn images into features: how images are prepared for them, which one each role uses, and the identity.

Transformers 5 resizes with torchvision by default, 4.x with Pillow: the same model would give other features. Here the
processor's configuration is read, and Pillow does the work in every version of the library.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from etherdiff.system.devices import resolve_device
from etherdiff.system.errors import UserError
from etherdiff.system.files import ASSETS, digest, file_hash
from etherdiff.system.hub import fetch

ROLES = ("dino", "clip", "lpips", "fid")
TINY = "tiny:"
PRESETS: dict[str, dict[str, str]] = {
    "paper": {
        "dino": "facebook/dino-vits16",
        "clip": "openai/clip-vit-large-patch14",
        "lpips": "lpips:alex",
        "fid": "inception",
        "segmenter": "openmmlab/upernet-convnext-large",
    },
    "tiny": {
        "dino": "tiny:dino",
        "clip": "tiny:clip",
        "lpips": "tiny:features",
        "fid": "tiny:features",
        "segmenter": "tiny:upernet",
    },
}
"""`paper`: the networks of the scripts that the paper builds on; `tiny`: networks that come with the package.

The paper says UperNet on ADE20K, but not which one: the segmenter here is a published one.
"""

# --- Preprocessing ----------------------------------------------------------------------------------------------------


READING = "as a viewer shows it: EXIF orientation and colour profile applied, transparency on white, RGB"
"""How every image file is read, before the steps below."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, scale to 0..1, normalise; a step that is None is left out."""

    edge: int | None = None
    """Target length of the shorter side in pixels; proportions are kept."""
    size: tuple[int, int] | None = None
    """Target (height, width) in pixels; proportions are not kept."""
    resample: int = Image.Resampling.BILINEAR
    """Pillow's number of the filter."""
    crop: tuple[int, int] | None = None
    """(height, width) of the centre crop in pixels."""
    crop_rounding: Literal["down", "nearest"] = "down"
    """Rounding of the crop's start: transformers rounds down, torchvision to the nearest even."""
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def pixels(self, image: Image.Image) -> Tensor:
        """Resize and crop an RGB image; return uint8 (3, H, W)."""
        target = self._target(image)
        if target is not None:
            image = image.resize(target, Image.Resampling(self.resample))
        if self.crop is not None:
            height, width = self.crop
            left, top = (self._half(image.width - width), self._half(image.height - height))
            image = image.crop((left, top, left + width, top + height))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def normalize(self, pixels: Tensor) -> Tensor:
        """Turn uint8 (B, 3, H, W) into the network's float32 input."""
        mean, std = (pixels.new_tensor(values, dtype=torch.float32).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() * self.scale - mean) / std

    def describe(self) -> dict[str, Any]:
        """Return a JSON-able description for an identity; it differs for everything that changes a pixel."""
        return {
            "reading": READING,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()},
            "resample": Image.Resampling(self.resample).name.lower(),
        }

    def _half(self, pixels: int) -> int:
        return pixels // 2 if self.crop_rounding == "down" else round(pixels / 2)

    def _target(self, image: Image.Image) -> tuple[int, int] | None:
        """Return (width, height) to resize to; the longer side is rounded down as in transformers and torchvision."""
        if self.size is not None:
            return self.size[1], self.size[0]
        if self.edge is None:
            return None
        short, long = sorted(image.size)
        longer = int(self.edge * long / short)
        return (self.edge, longer) if image.width <= image.height else (longer, self.edge)


def read_preprocessing(folder: Path) -> Preprocessing:
    """Read the preprocessing of a transformers folder from preprocessor_config.json or processor_config.json.

    Raises:
        UserError: neither exists, or it asks for a step that is not supported.
    """
    plain, nested = folder / "preprocessor_config.json", folder / "processor_config.json"
    try:
        if plain.is_file():
            return from_processor(json.loads(plain.read_text(encoding="utf-8")))
        if nested.is_file():
            return from_processor(json.loads(nested.read_text(encoding="utf-8"))["image_processor"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: the image processor's configuration cannot be used ({error})") from error
    raise UserError(f"{folder} has no preprocessor_config.json, which says how images are prepared")


def from_processor(config: dict[str, Any]) -> Preprocessing:
    """Return the steps of a transformers image processor (CLIP, ViT, ConvNeXT and similar) from its configuration.

    Raises:
        ValueError: a step that is not supported.
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
    if isinstance(size, int):  # in old files: the shorter side for CLIP, a square for ViT
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


# --- Networks ---------------------------------------------------------------------------------------------------------

Pixels = Tensor | Sequence[Tensor]
"""uint8 images (B, 3, H, W), or (3, H, W) each where their sizes may differ."""


@dataclass(frozen=True)
class Identity:
    """Everything that determines a feature: equal identities give the same numbers, up to rounding."""

    name: str
    """Hub id, open_clip name, the folder's name, or etherdiff/tiny-…."""
    revision: str | None
    """Commit on the hub, if the cache records it."""
    weights_sha256: str
    weights_hashed: str
    """What was hashed: names of files (as the hub shows it), or "tensors"."""
    feature: str
    preprocessing: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @cached_property
    def digest(self) -> str:
        """Name of the identity, 32 hexadecimal digits."""
        return digest(self.as_dict())


class Backbone(ABC):
    """Turns images into features. `preprocessing` runs in decoding workers, `encode` on the device."""

    preprocessing: Preprocessing
    identity: Identity
    cached = True
    """Whether its features are small enough to be cached on disk."""
    largest_batch = 64
    """Maximum images per forward pass; larger batches are split."""

    @abstractmethod
    def encode(self, pixels: Pixels) -> Tensor:
        """Turn images into float32 features (B, D) on the device."""


class ImageTextBackbone(Backbone):
    """A backbone that also encodes texts in the space of its images."""

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Turn texts into float32 features (B, D) on the CPU; they must not be `too_long`."""

    @abstractmethod
    def too_long(self, texts: Sequence[str]) -> list[int]:
        """Return for each text the number of tokens beyond what the text encoder reads; 0 if it reads all."""


def stacked(pixels: Pixels, device: str) -> Tensor:
    """Return images of one size as a batch on the device."""
    batch = pixels if isinstance(pixels, Tensor) else torch.stack(list(pixels))
    return batch.to(device, non_blocking=True)


def hash_files(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of the one file, or of the hashes of several in the order of their names."""
    hashes = [file_hash(path) for path in sorted(paths)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def hash_tensors(module: nn.Module) -> str:
    """Return the SHA-256 over names, shapes, types and bytes of all parameters and buffers of a module."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def versions_of(*packages: str) -> dict[str, str]:
    """Return the installed versions of the packages, and of Pillow and torch, which every feature depends on."""
    return {name: version(name) for name in sorted({"torch", "pillow", *packages})}


# --- Finding networks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkSource:
    """A transformers folder on this machine, and where it came from."""

    name: str
    folder: Path
    revision: str | None = None

    @property
    def weight_files(self) -> list[Path]:
        """Files that `from_pretrained` reads: safetensors if there are any."""
        return sorted(self.folder.glob("*.safetensors")) or sorted(self.folder.glob("pytorch_model*.bin"))


def choose_preset(base: str, asked: str | None = None) -> str:
    """Return the preset that scores a run: the one asked for, else `tiny` exactly where the run's base is tiny."""
    return asked or ("tiny" if base == "tiny" else "paper")


def find_backbones(
    roles: Iterable[str], preset: str = "paper", named: Mapping[str, str] | None = None, device: str = "auto"
) -> dict[str, Backbone]:
    """Return a backbone per role; weights of transformers models are read when the first image comes.

    Args:
        roles: of `ROLES`.
        preset: of `PRESETS`.
        named: role -> network instead of the preset's: a local folder, a hub id (with @REVISION), open_clip's
            NAME:PRETRAINED or hf-hub:ID, lpips:NET, inception[:FEATURES].

    Raises:
        UserError: everything that is wrong with any of them.
    """
    if preset not in PRESETS:
        raise UserError(f"preset {preset!r}: there are {', '.join(PRESETS)}")
    specs = PRESETS[preset] | dict(named or {})
    problems = [f"backbone for {role!r}: there are {', '.join(ROLES)}" for role in named or () if role not in ROLES]
    place, found = resolve_device(device), {}
    for role in roles:
        try:
            found[role] = load_backbone(role, specs[role], place)
        except UserError as error:
            problems += [f"{role}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(problems)
    return found


def load_backbone(role: str, spec: str, device: str) -> Backbone:
    """Return the network that `spec` names, for one role. Raises UserError."""
    from etherdiff.eval.folders import load_from_folder
    from etherdiff.eval.libraries import OpenClip, load_inception, load_lpips

    if not spec.startswith(TINY) and not Path(spec).is_dir():
        kind = spec.partition(":")[0]
        if kind == "lpips" and role == "lpips":
            return load_lpips(spec, device)
        if kind == "inception" and role == "fid":
            return load_inception(spec, device)
        if ":" in spec and role == "clip":
            return OpenClip(spec, device)
    return load_from_folder(role, find_source(role, spec), device)


def find_source(role: str, spec: str) -> NetworkSource:
    """Find the transformers folder of a tiny network (tiny:NAME), of a local folder, or of a hub id, which is downloaded.

    Raises:
        UserError: it is none of them, or cannot be downloaded. The message names the role.
    """
    if spec.startswith(TINY):
        name = spec.removeprefix(TINY)
        return NetworkSource(f"etherdiff/tiny-{name}", tiny_part(name))
    folder = Path(spec)
    if folder.is_dir():
        return NetworkSource(folder.resolve().name, folder)
    if ":" in spec or "/" not in spec or spec.startswith((".", "/", "~")):
        raise UserError(f"{spec} is neither a local folder nor a name that {role} knows")
    repo, _, revision = spec.partition("@")
    path = _download(repo, revision or None)
    return NetworkSource(repo, path, path.name if path.parent.name == "snapshots" else revision)


def tiny_part(name: str) -> Path:
    """Return the folder of one of the tiny networks: clip, dino, features, upernet. Raises UserError where it is not there."""
    folder = ASSETS / "tiny" / name
    if not (folder / "config.json").is_file():
        raise UserError(f"the tiny network {name!r} is not part of this installation; name another backbone for it")
    return folder


def _download(repo: str, revision: str | None) -> Path:
    """Return a hub id's snapshot in the hub's cache, downloaded where it is missing; pickled weights come last."""
    for weights in ("model*.safetensors", "pytorch_model*.bin"):
        folder = fetch(
            repo,
            ["*.json", "*.txt", weights],
            revision=revision,
            what=f"{repo} could not be fetched from the hub",
            instead="Without a network, give a local folder, or the preset tiny",
        )
        if any(folder.glob(weights)):
            break
    return folder
