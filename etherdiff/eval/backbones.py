"""Which network makes which features: presets, hub ids, open_clip names, local folders."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from etherdiff.eval.network import Backbone
from etherdiff.system.devices import resolve_device
from etherdiff.system.errors import UserError
from etherdiff.system.paths import ASSETS

if TYPE_CHECKING:
    from etherdiff.eval.from_transformers import Source

ROLES = ("dino", "clip", "lpips", "fid")
TINY = "tiny:"
PRESETS: dict[str, dict[str, str]] = {
    "paper": {
        "dino": "facebook/dino-vits16",
        "clip": "openai/clip-vit-large-patch14",
        "lpips": "lpips:alex",
        "fid": "inception",
    },
    "tiny": {"dino": "tiny:dino", "clip": "tiny:clip", "lpips": "tiny:features", "fid": "tiny:features"},
}
"""`paper`: as the scripts computed the scores that the paper builds on; `tiny`: networks that come with the package."""

_FILES = ["*.json", "*.txt"]


def find_backbones(
    roles: Iterable[str], preset: str = "paper", named: Mapping[str, str] | None = None, device: str = "auto"
) -> dict[str, Backbone]:
    """A backbone per role; weights of transformers models are read when the first image comes.

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
    problems = [f"backbone for {role!r}: there are {', '.join(ROLES)}" for role in specs if role not in ROLES]
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
    """The network that `spec` names, for one role. Raises UserError."""
    from etherdiff.eval.from_libraries import OpenClip, load_inception, load_lpips
    from etherdiff.eval.from_transformers import load_from_folder

    if not spec.startswith(TINY) and not Path(spec).expanduser().is_dir():
        kind = spec.partition(":")[0]
        if kind == "lpips" and role == "lpips":
            return load_lpips(spec, device)
        if kind == "inception" and role == "fid":
            return load_inception(spec, device)
        if ":" in spec and role == "clip":
            return OpenClip(spec, device)
    return load_from_folder(role, find_source(role, spec), device)


def find_source(role: str, spec: str) -> "Source":
    """The transformers folder of a tiny network (tiny:NAME), of a local folder, or of a hub id, which is downloaded.

    Raises:
        UserError: it is none of them, or the hub cannot give it. role: what it is for, for the message.
    """
    from etherdiff.eval.from_transformers import Source

    if spec.startswith(TINY):
        name = spec.removeprefix(TINY)
        return Source(f"etherdiff/tiny-{name}", tiny_part(name))
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return Source(folder.resolve().name, folder)
    if ":" in spec or "/" not in spec or spec.startswith((".", "/", "~")):
        raise UserError(f"{spec} is neither a folder here nor a name that {role} knows")
    repo, _, revision = spec.partition("@")
    path = _download(repo, revision or None)
    return Source(repo, path, path.name if path.parent.name == "snapshots" else revision)


def tiny_part(name: str) -> Path:
    """The folder of one of the tiny networks: clip, dino, features, upernet. Raises UserError where it is not there."""
    folder = ASSETS / "tiny" / name
    if not (folder / "config.json").is_file():
        raise UserError(f"the tiny network {name!r} is not part of this installation; name another backbone for it")
    return folder


def _download(repo: str, revision: str | None) -> Path:
    """A hub id's snapshot in the hub's cache, fetched where it is not there; pickled weights only for want of others."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*_FILES, "model*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*_FILES, "pytorch_model*.bin"]))
    except HFValidationError as error:
        raise UserError(f"{repo} is neither a folder nor a hub id ({error})") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{repo} does not exist on the hub, or is private: log in with `hf auth login`") from error
    except Exception as error:  # the hub client raises its own, httpx's and OSError alike
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{repo} could not be fetched ({reason}). Without a network, give a local folder, or the preset tiny"
        ) from error
    return folder
