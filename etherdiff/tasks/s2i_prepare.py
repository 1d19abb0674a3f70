"""What a controllable run computes once: the autoencoder's moments. All of it is cached."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from etherdiff.control.datasets import Pair
from etherdiff.families.sd1 import StableDiffusion, encode_prompts
from etherdiff.images.crops import resize_and_crop, to_array
from etherdiff.images.reading import read_image
from etherdiff.system.devices import DTYPES
from etherdiff.system.files import remove_temporary, unchanged_file_hash
from etherdiff.system.paths import cache_dir
from etherdiff.system.terminal import track
from etherdiff.tasks.s2i_data import S2IData
from etherdiff.tasks.s2i_plan import S2IPlan
from etherdiff.train.latents import LatentStore, stored_latents

VALIDATION_PAIRS = 8


def prepare_pairs(plan: S2IPlan, model: StableDiffusion, hashes: dict[str, str], accelerator: Accelerator) -> S2IData:
    """All that the training loop will read; `hashes` is the base's fingerprint. The text encoder stays in use."""
    config, dataset, device = plan.config, plan.dataset, accelerator.device
    watched = validation_pairs(plan)
    if accelerator.is_main_process:
        remove_temporary(cache_dir())
    with accelerator.main_process_first():  # the others find it in the cache
        model.vae.to(device)
        latents = pair_latents(plan, dataset.training, 1 + config.flip, model, hashes, "encoding the training images")
        of_watched = pair_latents(plan, watched, 1, model, hashes, "encoding validation images")
    model.text_encoder.to(device, DTYPES[config.mixed_precision])

    def encode(prompts: list[str]) -> Tensor:
        return encode_prompts(model.tokenizer, model.text_encoder, prompts)

    return S2IData(
        config,
        latents,
        of_watched,
        ([pair.text for pair in dataset.training], [pair.text for pair in watched]),
        (lambda item: control_picture(plan, dataset.training[item]), lambda item: control_picture(plan, watched[item])),
        encode,
        scaling_factor=float(model.vae.config.scaling_factor),
        timesteps=int(model.noise_scheduler.config.num_train_timesteps),
    )


def validation_pairs(plan: S2IPlan) -> tuple[Pair, ...]:
    """The pairs that the validation loss and the samples are of: not trained on, where there are such."""
    return (plan.dataset.evaluation or plan.dataset.training)[:VALIDATION_PAIRS]


def pair_latents(
    plan: S2IPlan, pairs: Sequence[Pair], flips: int, model: StableDiffusion, hashes: dict[str, str], note: str
) -> LatentStore:
    """The latent moments of the pairs' images."""
    key = {
        "vae": hashes.get("vae") or hashes["single_file"],
        "images": images_digest(pairs),
        "resolution": plan.resolution,
        "flips": flips,
    }
    return stored_latents(model.vae, len(pairs), flips, lambda item: _pixels(pairs[item], plan.resolution), key, note)


def _pixels(pair: Pair, resolution: int) -> NDArray[np.float32]:
    return to_array(resize_and_crop(read_image(pair.image), resolution, "center"))


def control_picture(plan: S2IPlan, pair: Pair) -> NDArray[np.uint8]:
    """What the hint encoder sees of a pair: (R, R, 3)."""
    return plan.dataset.signal.picture(pair.control, plan.resolution)


def images_digest(pairs: Sequence[Pair]) -> str:
    """A name for the images of the pairs, by the content of their files."""
    total = hashlib.sha256()
    for pair in track(pairs, "reading images") if len(pairs) > VALIDATION_PAIRS else pairs:
        total.update(unchanged_file_hash(pair.image).encode())
    return total.hexdigest()


def pairs_digest(plan: S2IPlan) -> str:
    """A name for all that is trained on: images, control files, captions, and how control is read."""
    total = hashlib.sha256(repr(sorted(plan.dataset.signal.settings().items())).encode())
    for pair in plan.dataset.training:
        total.update(repr((unchanged_file_hash(pair.image), unchanged_file_hash(pair.control), pair.text)).encode())
    return total.hexdigest()


def as_tensor(picture: NDArray[np.uint8]) -> Tensor:
    """A control picture (R, R, 3) as the pipeline takes it: (3, R, R) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float() / 255
