"""What a DreamBooth run computes once: class images, the autoencoder's moments, text embeddings. All of it is cached."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from etherdiff.config import DreamBoothConfig
from etherdiff.families.sampling import chunks, sample
from etherdiff.families.sd1 import StableDiffusion, encode_prompts, make_pipeline
from etherdiff.images.crops import resize_and_crop, to_array
from etherdiff.images.png import save_png
from etherdiff.images.reading import read_image
from etherdiff.system.files import remove_temporary
from etherdiff.system.paths import cache_dir
from etherdiff.system.terminal import track
from etherdiff.tasks.dreambooth_data import DreamBoothData, Moments
from etherdiff.tasks.planning import DreamBoothPlan
from etherdiff.train.cache import cached, digest
from etherdiff.train.randomness import Draw, uniform

IMAGES_AT_ONCE = 4


def prepare_data(
    plan: DreamBoothPlan, model: StableDiffusion, hashes: dict[str, str], accelerator: Accelerator
) -> DreamBoothData:
    """All that the training loop will read; `hashes` is the base's fingerprint. Uses the model's parts where needed."""
    config, device = plan.config, accelerator.device
    if accelerator.is_main_process:
        remove_temporary(cache_dir())
    class_images = make_class_images(plan, model, hashes, accelerator) if config.prior_preservation else []
    with accelerator.main_process_first():  # the others find it in the cache
        moments = cached_moments(model.vae.to(device), plan.images, config, hashes, "the subject's images")
        square = config.model_copy(update={"crop": "center"})  # class images are square: there is one crop
        pictures = [read_image(path) for path in class_images]
        class_moments = cached_moments(model.vae, pictures, square, hashes, "class images") if pictures else None
        text = cached_text(model, [plan.subject_prompt, plan.class_prompt, ""], hashes, device)
    return DreamBoothData(
        config,
        moments,
        class_moments,
        text,
        scaling_factor=float(model.vae.config.scaling_factor),
        timesteps=int(model.noise_scheduler.config.num_train_timesteps),
    )


def make_class_images(
    plan: DreamBoothPlan, model: StableDiffusion, hashes: dict[str, str], accelerator: Accelerator
) -> list[Path]:
    """The files of the class images; every process makes its share of those that are missing."""
    config = plan.config
    assert config.class_images is not None  # the plan filled it in
    settings = {
        "prompt": plan.class_prompt,
        "base": hashes,
        "seed": config.seed,
        "steps": config.class_sampling_steps,
        "resolution": plan.resolution,
    }
    folder = cache_dir() / "class_images" / digest(settings)  # never shared with another prompt, base or setting
    paths = [folder / f"{index:05d}.png" for index in range(config.class_images)]
    mine = range(accelerator.process_index, config.class_images, accelerator.num_processes)
    missing = [index for index in mine if not _is_whole(paths[index])]
    if missing:
        pipeline = make_pipeline(model).to(accelerator.device)
        folder.mkdir(parents=True, exist_ok=True)
        for index in track(missing, f"images of {plan.class_prompt!r}"):
            seed = class_seed(config.seed, index)
            # one at a time: an image's last bit can depend on its neighbours in a batch
            (image,) = sample(pipeline, plan.class_prompt, [seed], plan.resolution, config.class_sampling_steps)
            save_png(image, paths[index], {"index": index, **settings})
    accelerator.wait_for_everyone()
    return paths


def class_seed(seed: int, index: int) -> int:
    """The seed of one class image: its own, whatever process makes it and however many there are."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _is_whole(path: Path) -> bool:
    try:
        read_image(path)
    except (ValueError, OSError):
        return False
    return True


def cached_moments(
    vae: AutoencoderKL, images: Sequence[Image.Image], config: DreamBoothConfig, hashes: dict[str, str], note: str
) -> Moments:
    """The images' latent moments, from the cache where nothing that shapes them has changed."""
    assert config.resolution is not None
    resolution: int = config.resolution
    random_crops = [config.crops_per_image, config.seed] if config.crop == "random" else None
    key = {
        "vae": hashes.get("vae") or hashes["single_file"],
        "images": pixels_digest(images),
        "resolution": resolution,
        "random_crops": random_crops,
        "flip": config.flip,
    }

    def compute() -> dict[str, Tensor]:
        windows = [crop_windows(image, index, config, resolution) for index, image in enumerate(images)]
        return encode_images(vae, windows, 1 + config.flip, f"encoding {note}")

    return Moments(**cached("moments", key, compute))


def cached_text(model: StableDiffusion, prompts: list[str], hashes: dict[str, str], device: torch.device) -> Tensor:
    """Text embeddings (len(prompts), tokens, width), float32 on the CPU."""
    weights = hashes.get("text_encoder") or hashes["single_file"]
    key: dict[str, Any] = {"text_encoder": weights, "tokenizer": hashes["tokenizer"], "prompts": prompts}

    def compute() -> dict[str, Tensor]:
        text_encoder = model.text_encoder.to(device)
        return {"text": encode_prompts(model.tokenizer, text_encoder, prompts).float().cpu()}

    return cached("text", key, compute)["text"]


def crop_windows(image: Image.Image, index: int, config: DreamBoothConfig, resolution: int) -> list[Image.Image]:
    """The image's crops (each followed by its mirror image, when flipping is on), all resolution x resolution."""
    windows = []
    for crop in range(config.crops_per_image):
        u, v = (uniform(config.seed, Draw.CROP_POSITION, 2 * crop + axis, index) for axis in range(2))
        windows.append(resize_and_crop(image, resolution, config.crop, (u, v)))
        if config.flip:
            windows.append(windows[-1].transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    return windows


@torch.no_grad()
def encode_images(vae: AutoencoderKL, windows: Sequence[Sequence[Image.Image]], flips: int, note: str) -> dict[str, Tensor]:
    """Posterior moments of each image's windows, as `Moments` holds them."""
    flat = [window for image in windows for window in image]
    means, stds = [], []
    for part in track(chunks(flat, IMAGES_AT_ONCE), note):
        pixels = torch.from_numpy(np.stack([to_array(window) for window in part]))
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        means.append(posterior.mean.float().cpu())
        stds.append(posterior.std.float().cpu())
    mean, std = torch.cat(means), torch.cat(stds)
    shape = (len(windows), -1, flips, *mean.shape[1:])
    return {"mean": mean.reshape(shape), "std": std.reshape(shape)}


def pixels_digest(images: Sequence[Image.Image]) -> str:
    """A name for what the images show, whatever their files are called."""
    total = hashlib.sha256()
    for image in images:
        total.update(repr(image.size).encode())
        total.update(image.tobytes())
    return total.hexdigest()
