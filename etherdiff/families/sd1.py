"""Stable Diffusion 1.x and 2.x: what a base is on the disk and in memory, its prompts, its pipeline, its fingerprint."""

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedModel

from etherdiff.system.errors import UserError
from etherdiff.system.files import save_tensors, unchanged_file_hash
from etherdiff.system.terminal import quiet_libraries

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
WEIGHTS = ("unet", "vae", "text_encoder")


@dataclass(frozen=True)
class Base:
    """Files of a base model, before any weight is read."""

    name: str
    """What the user named it."""
    folder: Path
    """Diffusers pipeline folder: the model itself, or the configuration that `single_file` is read with."""
    single_file: Path | None = None
    prediction_type: str | None = None
    """Prediction type instead of the scheduler's; None keeps that."""

    @property
    def local_path(self) -> Path:
        return self.single_file or self.folder

    def config(self, component: str) -> dict[str, Any]:
        """Read a component's configuration."""
        name = {"scheduler": "scheduler_config.json"}.get(component, "config.json")
        return json.loads((self.folder / component / name).read_text(encoding="utf-8"))

    @property
    def latent_scale(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.config("vae")["block_out_channels"]) - 1)

    @property
    def resolution(self) -> int:
        """Side in pixels that the UNet was made for."""
        return int(self.config("unet")["sample_size"]) * self.latent_scale

    @property
    def resolution_step(self) -> int:
        """Pixels that sides have to be multiples of, so that the UNet's skip connections meet."""
        return self.latent_scale * 2 ** (len(self.config("unet")["block_out_channels"]) - 1)

    def resolution_problems(self, resolution: int) -> list[str]:
        """Return why the base cannot draw or train on images of this side in pixels, and what would do."""
        if resolution > 0 and resolution % self.resolution_step == 0:
            return []
        return [f"resolution: must be a multiple of {self.resolution_step} for this base, not {resolution}"]

    def steps_problems(self, steps: int, name: str = "steps") -> list[str]:
        """Return why the base cannot draw in so many denoising steps. name: the option's."""
        # with more, samplers visit a timestep twice, or one that the schedule does not have
        most = int(self.config("scheduler").get("num_train_timesteps", 1000)) - 2
        return [] if steps <= most else [f"{name}: the base's noise schedule allows at most {most}, not {steps}"]


@dataclass
class StableDiffusion:
    """A base model in memory, everything frozen and in evaluation mode."""

    base: Base
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    noise_scheduler: DDPMScheduler


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
                **_bare_text_encoder(base, base.single_file),
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


BARE_CLIP = "cond_stage_model.transformer."
"""What precedes a text encoder's weights in single files that leave out `text_model.`, which diffusers does not read."""


def _bare_text_encoder(base: Base, file: Path) -> dict[str, CLIPTextModel]:
    """Return {"text_encoder": ...} where the file's keys lack `text_model.`; else nothing, as diffusers reads it."""
    with safe_open(file, "pt") as tensors:
        keys = [key for key in tensors.keys() if key.startswith(BARE_CLIP)]  # noqa: SIM118  no mapping
        if not keys or any(key.startswith(BARE_CLIP + TEXT_PREFIX) for key in keys):
            return {}
        state = {key.removeprefix(BARE_CLIP): tensors.get_tensor(key).float() for key in keys}
    model = CLIPTextModel(CLIPTextConfig.from_pretrained(base.folder / "text_encoder"))
    prefix = TEXT_PREFIX if any(key.startswith(TEXT_PREFIX) for key in model.state_dict()) else ""
    state = {prefix + key: value for key, value in state.items() if not key.endswith("position_ids")}
    model.load_state_dict(state, strict=False)  # old releases of transformers have position_ids, which are constant
    lacking = sorted(key for key in model.state_dict().keys() - state.keys() if not key.endswith("position_ids"))
    if lacking:
        raise ValueError(f"its text encoder lacks {', '.join(lacking[:3])}")
    return {"text_encoder": model}


def load_tokenizer(base: Base) -> CLIPTokenizer:
    """Read the base's tokenizer."""
    return _read(base, lambda: CLIPTokenizer.from_pretrained(base.folder / "tokenizer"))


def load_noise_scheduler(base: Base) -> DDPMScheduler:
    """Read the noise schedule that the base was trained with."""
    override = {} if base.prediction_type is None else {"prediction_type": base.prediction_type}
    return DDPMScheduler.from_config({**base.config("scheduler"), **override})


def make_pipeline(model: StableDiffusion) -> StableDiffusionPipeline:
    """Make a pipeline of the model's own modules, with DPM-Solver++ as in the paper and without a safety checker."""
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
    """Return text embeddings (len(prompts), tokens, width) as the UNet reads them. Prompts that are too long are cut."""
    length = tokenizer.model_max_length
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return _encode_tokens(text_encoder, tokens.input_ids, tokens.attention_mask)


def encode_long_prompts(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: list[str]) -> Tensor:
    """Return text embeddings (len(prompts), 77 k, width) of all that prompts say, in as many parts as the longest has.

    As the WebUIs do: each part is encoded by itself, with its own start, end and padding, and the embeddings are joined.
    """
    length = tokenizer.model_max_length
    parts = [token_chunks(tokenizer, prompt) for prompt in prompts]
    count = max(map(len, parts))
    rows = [
        [tokenizer.bos_token_id, *part, tokenizer.eos_token_id] for one in parts for part in one + [[]] * (count - len(one))
    ]
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return _encode_tokens(text_encoder, ids, mask).unflatten(0, (len(prompts), count)).flatten(1, 2)


def token_chunks(tokenizer: CLIPTokenizer, prompt: str) -> list[list[int]]:
    """Split a prompt's tokens into parts of as many as the text encoder reads between start and end; at least one part."""
    ids = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids
    size = tokenizer.model_max_length - 2
    return [ids[start : start + size] for start in range(0, len(ids), size)] or [[]]


def cut_off(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """Return the end of a prompt that `encode_prompts` does not read; empty where it reads all."""
    return str(tokenizer.decode([token for part in token_chunks(tokenizer, prompt)[1:] for token in part])).strip()


def _encode_tokens(text_encoder: CLIPTextModel, ids: Tensor, mask: Tensor) -> Tensor:
    uses_mask = getattr(text_encoder.config, "use_attention_mask", None)
    with torch.no_grad():
        used = mask.to(text_encoder.device) if uses_mask else None
        return text_encoder(ids.to(text_encoder.device), attention_mask=used)[0]


def fingerprint(base: Base) -> dict[str, str]:
    """Return the SHA-256 of each component's weights (or of the single file), and of what else shapes a result."""
    if base.single_file is not None:
        hashes = {"single_file": unchanged_file_hash(base.single_file)}
    else:
        hashes = {name: _combined([unchanged_file_hash(path) for path in weight_files(base, name)]) for name in WEIGHTS}
    hashes["tokenizer"] = _combined([unchanged_file_hash(path) for path in sorted((base.folder / "tokenizer").iterdir())])
    schedule = {k: v for k, v in load_noise_scheduler(base).config.items() if not k.startswith("_")}
    hashes["noise_schedule"] = _combined([json.dumps(schedule, sort_keys=True, default=str)])
    return hashes


# --- Files ------------------------------------------------------------------------------------------------------------


def weight_files(base: Base, component: str) -> list[Path]:
    """Return the safetensors files that `from_pretrained` reads for a component, if possible without a variant such as fp16."""
    files = sorted((base.folder / component).glob("*.safetensors"))
    plain = [path for path in files if variant_of(path) is None]
    return plain or [path for path in files if variant_of(path) == variant_of(files[0])]


def variant_of(path: Path) -> str | None:
    """Return fp16 for diffusion_pytorch_model.fp16.safetensors, also for its shards (….fp16-00001-of-00002.…)."""
    middle = path.name.split(".")[1:-1]
    return re.sub(r"-\d+-of-\d+$", "", middle[0]) if middle else None


def check_weights(base: Base, components: Sequence[str] = WEIGHTS) -> None:
    """Raise UserError unless these components have weights that etherdiff reads; none is read."""
    for component in components:
        if weight_files(base, component):
            continue
        pickles = sorted((base.folder / component).glob("*.bin"))
        why = "holds only pickled weights (.bin), which can run code when opened" if pickles else "holds no weights"
        raise UserError(
            f"base {base.name}: {component}/ {why}. etherdiff reads safetensors only; convert it with "
            "pipe = StableDiffusionPipeline.from_pretrained(…); pipe.save_pretrained(…, safe_serialization=True)."
        )


def _load(base: Base, cls: Any, component: str, **options: Any) -> Any:
    check_weights(base, [component])
    variant = variant_of(weight_files(base, component)[0])
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


TEXT_PREFIX = "text_model."


def text_encoder_state_dict(text_encoder: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights of a CLIPTextModel(WithProjection) as transformers 4 names them: `text_model.encoder.layers...`.

    transformers 5.6 and later name a CLIPTextModel's weights without the prefix. `position_ids`, a constant that
    old releases saved, is left out.
    """
    return {
        key if key.startswith((TEXT_PREFIX, "text_projection.")) else TEXT_PREFIX + key: value
        for key, value in text_encoder.state_dict().items()
        if not key.endswith("position_ids")
    }


def save_text_encoder(text_encoder: PreTrainedModel, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`, as `save_pretrained` does but with transformers 4's key names.

    transformers 5's own names load in 4.x as random weights with only a warning; 5.x reads both.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(text_encoder.config)
    config.architectures = [type(text_encoder).__name__]
    config.dtype = text_encoder.dtype
    config.save_pretrained(folder)
    save_tensors(text_encoder_state_dict(text_encoder), folder / "model.safetensors")


def _combined(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
