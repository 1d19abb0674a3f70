"""Subject-driven fine-tuning (DreamBooth, Ruiz et al. 2023): the batches and the loss."""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from etherdiff.config import DreamBoothConfig
from etherdiff.families.loss import Weighting, denoising_loss
from etherdiff.train.batches import VALIDATION_TIMESTEPS, StepBatches, validation_timesteps
from etherdiff.train.loop import Batch
from etherdiff.train.randomness import Draw, integer, item_at, normal, uniform


@dataclass(frozen=True)
class Moments:
    """The autoencoder's posterior of every image, crop and flip: mean and standard deviation, (N, crops, flips, C, h, w).

    Unscaled, float32, on the CPU. Training draws from it, so nothing is lost against encoding anew each step.
    """

    mean: Tensor
    std: Tensor

    @property
    def views(self) -> tuple[int, int, int]:
        """(images, crops per image, flips)."""
        return self.mean.shape[0], self.mean.shape[1], self.mean.shape[2]


class DreamBoothData(StepBatches):
    """Batches of latents, noise, timesteps and text, as functions of the step and the place in the batch."""

    config: DreamBoothConfig

    def __init__(
        self,
        config: DreamBoothConfig,
        subject: Moments,
        class_images: Moments | None,
        text: Tensor,
        scaling_factor: float,
        timesteps: int,
    ) -> None:
        """text: (3, tokens, width), the embeddings of the subject's, the class's and the empty prompt."""
        self.config, self.subject, self.class_images = config, subject, class_images
        self.subject_text, self.class_text, self.empty_text = text
        self.scaling_factor, self.timesteps = scaling_factor, timesteps

    def _batch(self, step: int, slots: range, per_step: int) -> Batch:
        samples = [self._subject_sample(step, slot, per_step) for slot in slots]
        weights = [1.0] * len(samples)
        if self.class_images is not None:
            samples += [self._class_sample(step, slot, per_step) for slot in slots]
            weights += [self.config.prior_weight] * len(slots)
        latents, noise, timesteps, text = zip(*samples, strict=True)
        return {
            "latents": torch.stack(latents),
            "noise": torch.stack(noise),
            "timesteps": torch.tensor(timesteps),
            "text": torch.stack(text),
            # so that the sum of weighted losses is mean(subject) + prior_weight * mean(class)
            "weights": torch.tensor(weights) / len(slots),
        }

    def _subject_sample(self, step: int, slot: int, per_step: int) -> tuple[Tensor, Tensor, int, Tensor]:
        seed = self.config.seed
        item = item_at(step * per_step + slot, self.subject.views[0], seed, Draw.ORDER)
        dropped = uniform(seed, Draw.CAPTION_DROPOUT, step, slot) < self.config.caption_dropout
        latents = self._latents(self.subject, item, step, slot, Draw.CROP, Draw.FLIP, Draw.POSTERIOR)
        noise = normal(tuple(latents.shape), seed, Draw.NOISE, step, slot)
        timestep = integer(self.timesteps, seed, Draw.TIMESTEP, step, slot)
        return latents, noise, timestep, self.empty_text if dropped else self.subject_text

    def _class_sample(self, step: int, slot: int, per_step: int) -> tuple[Tensor, Tensor, int, Tensor]:
        assert self.class_images is not None
        seed = self.config.seed
        item = item_at(step * per_step + slot, self.class_images.views[0], seed, Draw.CLASS_ORDER)
        draws = Draw.CLASS_CROP, Draw.CLASS_FLIP, Draw.CLASS_POSTERIOR
        latents = self._latents(self.class_images, item, step, slot, *draws)
        noise = normal(tuple(latents.shape), seed, Draw.CLASS_NOISE, step, slot)
        return latents, noise, integer(self.timesteps, seed, Draw.CLASS_TIMESTEP, step, slot), self.class_text

    def _latents(self, moments: Moments, item: int, step: int, slot: int, crop: Draw, flip: Draw, posterior: Draw) -> Tensor:
        """A draw from the posterior of a drawn view of an image, scaled as the UNet sees it, (C, h, w)."""
        _, crops, flips = moments.views
        seed = self.config.seed
        view = item, integer(crops, seed, crop, step, slot), integer(flips, seed, flip, step, slot)
        mean, std = moments.mean[view], moments.std[view]
        return (mean + std * normal(tuple(mean.shape), seed, posterior, step, slot)) * self.scaling_factor

    def validation_batches(self) -> list[Batch]:
        """One batch per subject image: its first view's mean at fixed noise and evenly spread timesteps."""
        seed, spread, batches = self.config.seed, validation_timesteps(self.timesteps), []
        for item in range(self.subject.views[0]):
            latents = self.subject.mean[item, 0, 0] * self.scaling_factor
            shape = (VALIDATION_TIMESTEPS, *latents.shape)
            batches.append(
                {
                    "latents": latents.expand(shape),
                    "noise": normal(shape, seed, Draw.VALIDATION_NOISE, 0, item),
                    "timesteps": spread,
                    "text": self.subject_text.expand(VALIDATION_TIMESTEPS, *self.subject_text.shape),
                    "weights": torch.full((VALIDATION_TIMESTEPS,), 1 / VALIDATION_TIMESTEPS),
                }
            )
        return batches


class DreamBoothTask(nn.Module):
    """The loss of a batch: denoising of the subject's images plus, weighted, of the class's (DreamBooth, eq. 2)."""

    def __init__(self, unet: UNet2DConditionModel, noise_scheduler: DDPMScheduler, weighting: Weighting | None) -> None:
        super().__init__()
        self.unet, self.noise_scheduler, self.weighting = unet, noise_scheduler, weighting

    def forward(self, batch: Batch) -> Tensor:
        """A scalar; batch: latents and noise (B, C, h, w), timesteps (B,), text (B, tokens, width), weights (B,)."""
        losses = denoising_loss(
            self.unet,
            self.noise_scheduler,
            batch["latents"],
            batch["text"],
            batch["noise"],
            batch["timesteps"],
            self.weighting,
        )
        return (losses * batch["weights"]).sum()
