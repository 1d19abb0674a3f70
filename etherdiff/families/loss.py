"""The denoising loss of latent diffusion (Rombach et al. 2022, eq. 3), per sample."""

from collections.abc import Callable
from functools import partial

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import Tensor

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
