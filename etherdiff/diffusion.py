"""The denoising loss of latent diffusion (Rombach et al. 2022, eq. 3), per sample."""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import Tensor


def denoising_loss(
    unet: UNet2DConditionModel,
    noise_scheduler: DDPMScheduler,
    latents: Tensor,
    text: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    min_snr_gamma: float | None = None,
) -> Tensor:
    """Mean squared error of the UNet's prediction, (B,) in float32.

    latents, noise: (B, C, H, W), scaled as the UNet sees them. text: (B, tokens, width). timesteps: (B,) integers. The target
    is the noise or the velocity, as the scheduler's prediction_type says. min_snr_gamma weighs each sample as in Hang et
    al. 2023 (gamma 5 there).
    """
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, text, return_dict=False)[0]
    velocity = noise_scheduler.config.prediction_type == "v_prediction"
    target = noise_scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    loss = (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))
    if min_snr_gamma is None:
        return loss
    return loss * min_snr_weight(noise_scheduler, timesteps, min_snr_gamma)


def min_snr_weight(noise_scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR for a noise target, / (SNR + 1) for a velocity target; (B,)."""
    snr = compute_snr(noise_scheduler, timesteps)
    clipped = torch.clamp(snr, max=gamma)
    return clipped / (snr + 1 if noise_scheduler.config.prediction_type == "v_prediction" else snr)
