"""Latent diffusion (Rombach et al. 2022): its loss (eq. 3) per sample; images, each a function of its own seed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.training_utils import compute_snr
from PIL import Image
from torch import Tensor

from etherdiff.images.writing import contact_sheet
from etherdiff.system.errors import RunError

Weighting = Callable[[DDPMScheduler, Tensor], Tensor]
"""Timesteps (B,) to the weights of their losses, (B,)."""


def denoising_loss(
    unet: UNet2DConditionModel,
    noise_scheduler: DDPMScheduler,
    latents: Tensor,
    text: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    weighting: Weighting | None = None,
) -> Tensor:
    """Mean squared error of the UNet's prediction, (B,) in float32.

    latents, noise: (B, C, H, W), scaled as the UNet sees them. text: (B, tokens, width). timesteps: (B,) integers. The target
    is the noise or the velocity, as the scheduler's prediction_type says. weighting: what each sample counts.
    """
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, text, return_dict=False)[0]
    velocity = noise_scheduler.config.prediction_type == "v_prediction"
    target = noise_scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    loss = (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))
    return loss if weighting is None else loss * weighting(noise_scheduler, timesteps)


def loss_weighting(min_snr_gamma: float | None, debiased_estimation: bool) -> Weighting | None:
    """The weighting that was asked for; None for the plain loss."""
    if min_snr_gamma is not None:
        return partial(min_snr_weight, gamma=min_snr_gamma)
    return debiased_weight if debiased_estimation else None


def min_snr_weight(noise_scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) of an error in the image, in terms of the target's error (Hang et al. 2023, gamma 5 there); (B,)."""
    snr = compute_snr(noise_scheduler, timesteps)
    return torch.clamp(snr, max=gamma) / _target_error(noise_scheduler, snr)


def debiased_weight(noise_scheduler: DDPMScheduler, timesteps: Tensor) -> Tensor:
    """sqrt(SNR) of an error in the image: 1 / sqrt(SNR) for a noise target (Yu et al. 2023); (B,)."""
    snr = compute_snr(noise_scheduler, timesteps)
    return snr.sqrt() / _target_error(noise_scheduler, snr)


def _target_error(noise_scheduler: DDPMScheduler, snr: Tensor) -> Tensor:
    """How many times the squared error of the image the target's is: SNR for the noise, SNR + 1 for the velocity."""
    return snr + 1 if noise_scheduler.config.prediction_type == "v_prediction" else snr


T = TypeVar("T")
PAPER_SAMPLING: dict[str, Any] = {"sampler": "DPM++ 2M", "steps": 25, "guidance_scale": 7.5}
"""How the paper draws subject images (its design follows DreamBooth's): see `make_pipeline` for the scheduler."""

S2I_SAMPLING: dict[str, Any] = {"sampler": "DDIM", "steps": 50, "guidance_scale": 9.0}
"""How the paper draws from control: see `make_s2i_pipeline`."""


def sample(
    pipeline: StableDiffusionPipeline,
    prompt: str | Sequence[str] | None,
    seeds: Sequence[int],
    resolution: int,
    steps: int = PAPER_SAMPLING["steps"],
    guidance_scale: float = PAPER_SAMPLING["guidance_scale"],
    **more: Any,
) -> list[Image.Image]:
    """Draw an image per seed, in one batch. An image's noise comes from its own seed, drawn on the CPU whatever the device.

    prompt: one for all seeds, or one for each; None where `more` holds embeddings of them. `more` goes to the pipeline:
    embeddings, a negative prompt, or control images (see `StableDiffusionS2IPipeline`).

    Raises:
        RunError: an image that is not finite, which would be saved as a black one.
    """
    prompts = 1 if isinstance(prompt, str) else len(more["prompt_embeds"] if prompt is None else prompt)
    drawn = pipeline(
        prompt,
        height=resolution,
        width=resolution,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        num_images_per_prompt=len(seeds) // prompts,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
        **more,
    ).images
    if not np.isfinite(drawn).all():
        seed = next(seed for seed, pixels in zip(seeds, drawn, strict=True) if not np.isfinite(pixels).all())
        raise RunError(
            f"the image of seed {seed} came out as NaN or infinite, and is not saved: the weights or the settings drive the "
            "UNet too far. Try a guidance scale or an adapter's scale nearer to 1, or other steps"
        )
    return VaeImageProcessor.numpy_to_pil(drawn)


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Split the items, in order, into parts of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def sheet(rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]) -> Image.Image:
    """Draw a contact sheet of rows of images, which have the same length, with labels."""
    flat = [image for row in rows for image in row]
    return contact_sheet(flat, len(rows[0]), list(row_labels), list(column_labels))


def slug(text: str, length: int = 40) -> str:
    """Return a prompt as part of a file name: ASCII letters and digits only, never empty."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text).split()
    return "-".join(words)[:length].strip("-") or "prompt"
