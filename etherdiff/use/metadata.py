"""What a LoRA file or a single-file checkpoint says about itself, in the words that other programs read."""

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from etherdiff import __version__
from etherdiff.config import DreamBoothConfig
from etherdiff.families.bases import ARCHITECTURES
from etherdiff.families.sd1 import Base, fingerprint
from etherdiff.images.reading import read_image, read_photos
from etherdiff.images.writing import is_whole
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.tasks.subjects import find_subject

Kind = Literal["lora", "checkpoint"]
VERSIONS = {768: "sd_v1", 1024: "sd_v2"}
"""Width of the text embeddings -> sd-scripts' name of the version."""
SPECIFICATION = "1.0.1"
"""Version of the Stability AI Model Metadata Standard."""
MODELSPEC_ARCHITECTURES = {
    "sd_v1": "stable-diffusion-v1",
    "sd_v2": "stable-diffusion-v2-512",
    "sd_v2_v": "stable-diffusion-v2-768-v",
}
IMPLEMENTATIONS: dict[Kind, str] = {  # as sd-scripts has it: whose names the weights have
    "lora": "diffusers",
    "checkpoint": "https://github.com/Stability-AI/generative-models",
}
LICENSES = {"sd15": "CreativeML Open RAIL-M", "sd21": "CreativeML Open RAIL++-M"}
"""Base -> its licence, which holds for what is made from it."""
MAX_THUMBNAIL = 256
"""Longest side of the thumbnail in pixels."""


def file_metadata(base: Base, kind: Kind, title: str, run: Run | None = None) -> dict[str, str]:
    """Return a file's safetensors metadata: `modelspec.*`, `ss_*` as sd-scripts writes them, and etherdiff's own.

    run: what was trained, where the file is a run's. Only what is known is there: no architecture of a base that is
    neither Stable Diffusion 1.x nor 2.x, no date (the same run gives the same texts), no path of this machine.
    """
    name = Path(base.name).name if base.local_path == Path(base.name).resolve() else base.name
    hashes = fingerprint(base)
    own = {"made_by": f"etherdiff {__version__}", "base_model": name, "base_fingerprint": json.dumps(hashes, sort_keys=True)}
    if kind == "lora":
        own["note"] = "exact only on this base"
    scripts: dict[str, Any] = {"ss_output_name": title, "ss_sd_model_name": name, **_version_facts(base)}
    if base.single_file is not None:
        scripts |= {"ss_sd_model_hash": short_hash(base.single_file), "ss_new_sd_model_hash": hashes["single_file"]}
    if run is not None and isinstance(run.config, DreamBoothConfig):
        scripts |= _training_facts(run, run.config)
    texts = {key: str(value) for key, value in scripts.items() if value is not None}
    return own | _modelspec(base, kind, title, run) | texts


def network_metadata(rank: int) -> dict[str, str]:
    """Return what sd-scripts and its readers look for in a kohya file of this rank."""
    return {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}


def short_hash(path: Path) -> str:
    """Return the hash by which old WebUIs and sd-scripts name a checkpoint: of 64 KiB from its second mebibyte on."""
    with path.open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def _is_velocity(base: Base) -> bool:
    return (base.prediction_type or base.config("scheduler").get("prediction_type")) == "v_prediction"


def _version(base: Base) -> str | None:
    """Return sd-scripts' name of the base's version; None for other widths, such as the tiny world's."""
    version = VERSIONS.get(base.config("unet")["cross_attention_dim"])
    return "sd_v2_v" if version == "sd_v2" and _is_velocity(base) else version


def _version_facts(base: Base) -> dict[str, Any]:
    version = _version(base)
    return {"ss_base_model_version": version, "ss_v2": version != "sd_v1"} if version else {}


def _modelspec(base: Base, kind: Kind, title: str, run: Run | None) -> dict[str, str]:
    config = run.config if run is not None and isinstance(run.config, DreamBoothConfig) else None
    side = (config and config.resolution) or base.resolution
    architecture = MODELSPEC_ARCHITECTURES.get(_version(base) or "")
    facts = {
        "sai_model_spec": SPECIFICATION,
        "architecture": architecture and architecture + ("/lora" if kind == "lora" else ""),
        "implementation": IMPLEMENTATIONS[kind],
        "title": title,
        "resolution": f"{side}x{side}",
        "prediction_type": "v" if _is_velocity(base) else "epsilon",
        "license": LICENSES.get(ARCHITECTURES.get(base.name, "")),
        "trigger_phrase": config and f"{config.identifier} {config.class_noun}",
        "thumbnail": run and _thumbnail(run),
    }
    return {f"modelspec.{key}": value for key, value in facts.items() if value}


def _training_facts(run: Run, config: DreamBoothConfig) -> dict[str, Any]:
    """Return how a run was trained, under sd-scripts' names."""
    side, passes = config.resolution, config.gradient_accumulation
    is_rising = config.lr_schedule == "constant" and config.warmup_steps > 0
    facts: dict[str, Any] = {
        "ss_steps": _steps(run),
        "ss_max_train_steps": config.steps,
        "ss_learning_rate": config.learning_rate,
        "ss_unet_lr": config.learning_rate,
        "ss_lr_scheduler": "constant_with_warmup" if is_rising else config.lr_schedule,
        "ss_lr_warmup_steps": config.warmup_steps,
        "ss_batch_size_per_device": config.batch_size,
        "ss_gradient_accumulation_steps": passes,
        "ss_total_batch_size": config.batch_size * passes * (run.provenance.processes or 1),
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_mixed_precision": config.mixed_precision,
        "ss_max_grad_norm": config.max_grad_norm,
        "ss_min_snr_gamma": config.min_snr_gamma,
        "ss_caption_dropout_rate": config.caption_dropout,
        "ss_seed": config.seed,
        "ss_resolution": (side, side) if side else None,
    }
    if config.prior_preservation:
        facts |= {"ss_num_reg_images": config.class_images, "ss_prior_loss_weight": config.prior_weight}
    if count := _count_photos(run, config):
        caption = run.provenance.subject_prompt
        facts["ss_num_train_images"] = count
        facts["ss_tag_frequency"] = caption and json.dumps({run.subject_name: {caption: count}}, ensure_ascii=False)
    return facts


def _steps(run: Run) -> int | None:
    """Return the number of optimizer steps; None where it cannot be read."""
    try:
        return run.cost.steps
    except UserError:
        return None


def _count_photos(run: Run, config: DreamBoothConfig) -> int | None:
    """Return how many photos were trained on; None where they are no longer there as they were."""
    try:
        photos = read_photos(find_subject(config.subject, config.data_root, download=False).images, config.skip_bad)
    except (UserError, OSError):
        return None
    return len(photos.paths) if photos.digest == run.provenance.images else None


def _thumbnail(run: Run) -> str | None:
    """Return an image that the run drew, of its last samples or else of eval, as a small data URL."""
    drawn = [*sorted(run.folder.samples.glob("step-*"), reverse=True), run.folder.eval / "images"]
    path = next((path for folder in drawn for path in sorted(folder.glob("*/*.png")) if is_whole(path)), None)
    if path is None:
        return None
    image, content = read_image(path), io.BytesIO()
    image.thumbnail((MAX_THUMBNAIL, MAX_THUMBNAIL), Image.Resampling.LANCZOS)
    image.save(content, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
