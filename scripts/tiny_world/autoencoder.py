"""tiny-sd's autoencoder: 64 px pictures to 16 x 16 latents of 4 channels, and back."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from etherdiff.train.randomness import Draw, normal
from tiny_world.data import SceneSet, scene_set, thing_weights, to_tensor
from tiny_world.training import Schedule, seeded, train

SCHEDULE = Schedule(steps=8_000, learning_rate=1e-3, warmup=200, weight_decay=0.0, ema=0.998, evaluate_every=500)
DECODER_SCHEDULE = Schedule(steps=4_000, learning_rate=5e-4, warmup=200, weight_decay=0.0, ema=0.998, evaluate_every=500)
BATCH = 16
SCENES, VALIDATION = 60_000, 256
KL_WEIGHT = 1e-4  # per latent number, beside a mean squared error per colour value: keeps the latents smooth, hardly blurs


class Reconstruction(nn.Module):
    """The autoencoder, called to give its loss."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, weights: Tensor, noise: Tensor) -> Tensor:
        """Squared error (and a little absolute error) of images (B, 3, 64, 64) in [-1, 1], and the KL divergence.

        `weights` (B, 1, 64, 64) say how much each pixel's error counts; `noise` (B, 4, 16, 16) is the latents'.
        """
        posterior = self.vae.encode(images).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        latents = mean + torch.exp(0.5 * log_variance) * noise
        error = self.vae.decode(latents).sample.float() - images
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
        return (weights * (error**2 + 0.05 * error.abs())).mean() + KL_WEIGHT * divergence.mean()


class Decoding(nn.Module):
    """The decoder alone, called on images as well."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False)
        for part in (vae.post_quant_conv, vae.decoder):
            part.requires_grad_(True)

    def forward(self, images: Tensor, weights: Tensor, noise: Tensor) -> Tensor:
        """Absolute error, weighted: where the latents leave two colours open, it picks one and a squared error mixes them."""
        latents = _latents(self.vae, images, noise)
        return (weights * (self.vae.decode(latents).sample.float() - images).abs()).mean()


def train_autoencoder(work: Path, fraction: float = 1.0) -> AutoencoderKL:
    """Train (or go on) all of it and then the decoder; set `scaling_factor` so that the scaled latents have unit variance."""
    scenes = scene_set("train", SCENES, work)
    validation = scene_set("validation", VALIDATION, work)
    with seeded():
        vae = make_model()
    vae.set_attn_processor(AttnProcessor())  # torch's fused attention is slow backwards on a CPU
    for name, stage, schedule in (("autoencoder", Reconstruction, SCHEDULE), ("decoder", Decoding, DECODER_SCHEDULE)):
        vae = train(
            name,
            stage(vae).to(memory_format=torch.channels_last),
            lambda rng: draw_batch(rng, scenes),
            lambda model, *batch: model(*batch),
            schedule.shortened(fraction),
            work,
            lambda model: {"psnr": psnr(model.vae, validation)},
            compiled=fraction == 1.0,
        ).vae
    vae.register_to_config(scaling_factor=round(1 / latent_std(vae, validation), 4))
    return vae


def make_model() -> AutoencoderKL:
    """The untrained autoencoder: 2.7M parameters."""
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )


def draw_batch(rng: np.random.Generator, scenes: SceneSet) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes (B, 3, 64, 64), half of them mirrored, their pixels' weights (B, 1, 64, 64), and noise (B, 4, 16, 16)."""
    chosen = np.sort(rng.integers(len(scenes.images), size=BATCH))
    images, weights = to_tensor(scenes.images[chosen]), thing_weights(scenes.segmentations[chosen])
    mirrored = torch.from_numpy(rng.random(BATCH) < 0.5)[:, None, None, None]
    images, weights = (torch.where(mirrored, each.flip(-1), each) for each in (images, weights))
    noise = torch.from_numpy(rng.standard_normal((BATCH, 4, 16, 16), np.float32))
    return images.contiguous(memory_format=torch.channels_last), weights, noise


def _latents(vae: AutoencoderKL, images: Tensor, noise: Tensor) -> Tensor:
    posterior = vae.encode(images).latent_dist
    return posterior.mean + posterior.std * noise


@torch.no_grad()
def psnr(vae: AutoencoderKL, scenes: SceneSet) -> float:
    """Mean over scenes of the peak signal-to-noise ratio, in dB, of what comes back from the mean latents."""
    values = []
    for start in range(0, len(scenes.images), 32):
        images = to_tensor(scenes.images[start : start + 32])
        back = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(((back - images) / 2).square().mean((1, 2, 3))))
    return float(torch.cat(values).mean())


@torch.no_grad()
def latent_std(vae: AutoencoderKL, scenes: SceneSet) -> float:
    """Standard deviation of sampled latents over scenes, positions and channels."""
    noise = normal((len(scenes.images), 4, 16, 16), seed=0, draw=Draw.VALIDATION_NOISE, step=0, index=0)
    return float(_latents(vae, to_tensor(scenes.images[:]), noise).std())
