"""Networks that turn images into features: which one each role uses, how it is found, and the identity that scores record."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etherdiff.eval.preprocessing import Preprocessing
from etherdiff.system.devices import resolve_device
from etherdiff.system.errors import UserError
from etherdiff.system.files import digest, file_hash
from etherdiff.system.hub import fetch
from etherdiff.system.paths import ASSETS

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
"""`paper`: as the scripts computed the scores that the paper builds on; `tiny`: networks that come with the package.

The paper says UperNet on ADE20K, but not which one: the segmenter is a published one.
"""

Pixels = Tensor | Sequence[Tensor]
"""uint8 images (B, 3, H, W), or (3, H, W) each where their sizes may differ."""


@dataclass(frozen=True)
class Identity:
    """What decides a feature: two equal identities give, up to rounding, the same numbers for the same image."""

    name: str
    """Hub id, open_clip name, the folder's name, or etherdiff/tiny-…."""
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
        """Turn images into float32 features (B, D) on the device."""


class ImageTextBackbone(Backbone):
    """A backbone that also puts texts into the space of its images."""

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Turn texts into float32 features (B, D) on the CPU; they must not be `too_long`."""

    @abstractmethod
    def too_long(self, texts: Sequence[str]) -> list[int]:
        """Return for each text how many tokens more it has than the text encoder reads; 0 where all of it is read."""


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


# --- Finding them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkSource:
    """A transformers folder on this machine, and where it came from."""

    name: str
    folder: Path
    revision: str | None = None

    @property
    def weight_files(self) -> list[Path]:
        """What `from_pretrained` reads: safetensors where there are any."""
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
        named: role -> what to use instead of the preset's: a local folder, a hub id (with @REVISION), open_clip's
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

    if not spec.startswith(TINY) and not Path(spec).expanduser().is_dir():
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
        UserError: it is none of them, or the hub cannot give it. role: what it is for, for the message.
    """
    if spec.startswith(TINY):
        name = spec.removeprefix(TINY)
        return NetworkSource(f"etherdiff/tiny-{name}", tiny_part(name))
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return NetworkSource(folder.resolve().name, folder)
    if ":" in spec or "/" not in spec or spec.startswith((".", "/", "~")):
        raise UserError(f"{spec} is neither a folder here nor a name that {role} knows")
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
