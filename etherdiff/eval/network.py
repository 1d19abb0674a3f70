"""A network that turns images into features, and the identity that says which one it was."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etherdiff.eval.preprocessing import Preprocessing
from etherdiff.system.files import digest, file_hash

Pixels = Tensor | Sequence[Tensor]
"""uint8 images (B, 3, H, W), or (3, H, W) each where their sizes may differ."""


@dataclass(frozen=True)
class Identity:
    """What decides a feature: two equal identities give, up to rounding, the same numbers for the same image."""

    name: str
    """Hub id, open_clip name, the folder's name, or etherdiff/tiny-….."""
    revision: str | None
    """The hub's commit, where its cache tells."""
    weights_sha256: str
    weights_hashed: str
    """What the hash was taken of: names of files (as the hub shows it), or "tensors"."""
    feature: str
    preprocessing: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @cached_property
    def digest(self) -> str:
        """A name for the identity, of 32 hexadecimal digits."""
        return digest(self.as_dict())


class Backbone(ABC):
    """Images to features. `preprocessing` runs in decoding workers, `encode` on the device."""

    preprocessing: Preprocessing
    identity: Identity
    cached = True
    """Whether its features are small enough to be kept on the disk."""
    largest_batch = 64
    """Images per forward pass; more are split."""

    @abstractmethod
    def encode(self, pixels: Pixels) -> Tensor:
        """Images to float32 features (B, D) on the device."""


class ImageTextBackbone(Backbone):
    """One that puts texts into the same space."""

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Float32 features (B, D) on the CPU; texts must not be `too_long`."""

    @abstractmethod
    def too_long(self, texts: Sequence[str]) -> list[int]:
        """For each text, how many tokens more it has than the text encoder reads; 0 where all of it is read."""


def stacked(pixels: Pixels, device: str) -> Tensor:
    """Images of one size as a batch on the device."""
    batch = pixels if isinstance(pixels, Tensor) else torch.stack(list(pixels))
    return batch.to(device, non_blocking=True)


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 of the one file, or of the hashes of several in the order of their names."""
    hashes = [file_hash(path) for path in sorted(paths)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def hash_tensors(module: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of all parameters and buffers of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions_of(*packages: str) -> dict[str, str]:
    """Installed versions of the packages, and of Pillow and torch, which every feature depends on."""
    return {name: version(name) for name in sorted({"torch", "pillow", *packages})}
