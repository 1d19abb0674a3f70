"""The controllable task: a control image drives what is drawn, through a hint added after `conv_in` (ETHER paper, 5.2)."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn

from etherdiff.config import S2IConfig
from etherdiff.control.pipeline import HintEncoder, added_hint
from etherdiff.families.loss import Weighting, denoising_loss
from etherdiff.train.batches import VALIDATION_TIMESTEPS, StepBatches, validation_timesteps
from etherdiff.train.latents import LatentStore
from etherdiff.train.loop import Batch
from etherdiff.train.randomness import Draw, integer, item_at, normal, uniform

READERS = 4  # threads that read control files


class S2IData(StepBatches):
    """Batches of latents, noise, timesteps, text and control, as functions of the step and the place in the batch."""

    config: S2IConfig

    def __init__(
        self,
        config: S2IConfig,
        latents: LatentStore,
        validation_latents: LatentStore,
        texts: tuple[Sequence[str], Sequence[str]],
        pictures: tuple[Callable[[int], NDArray[np.uint8]], Callable[[int], NDArray[np.uint8]]],
        encode: Callable[[list[str]], Tensor],
        scaling_factor: float,
        timesteps: int,
    ) -> None:
        """texts and pictures: of the training images, and of those for the validation loss; a picture is (R, R, 3).

        encode: prompts to text embeddings (B, tokens, width); called for each batch, since thousands would fill the memory.
        """
        self.config, self.latents, self.validation_latents = config, latents, validation_latents
        self.texts, self.validation_texts = texts
        self.pictures, self.validation_pictures = pictures
        self.encode, self.scaling_factor, self.timesteps = encode, scaling_factor, timesteps
        self.readers = ThreadPoolExecutor(READERS)

    def _batch(self, step: int, slots: range, per_step: int) -> Batch:
        seed = self.config.seed
        items = [item_at(step * per_step + slot, len(self.latents), seed, Draw.ORDER) for slot in slots]
        flips = [integer(self.latents.flips, seed, Draw.FLIP, step, slot) for slot in slots]
        dropped = [uniform(seed, Draw.CAPTION_DROPOUT, step, slot) < self.config.caption_dropout for slot in slots]
        latents = [self._latents(item, flip, step, slot) for item, flip, slot in zip(items, flips, slots, strict=True)]
        shape = tuple(latents[0].shape)
        return {
            "latents": torch.stack(latents),
            "noise": torch.stack([normal(shape, seed, Draw.NOISE, step, slot) for slot in slots]),
            "timesteps": torch.tensor([integer(self.timesteps, seed, Draw.TIMESTEP, step, slot) for slot in slots]),
            "text": self.encode(["" if drop else self.texts[item] for item, drop in zip(items, dropped, strict=True)]),
            "control": self._control(self.pictures, items, flips),
        }

    def _latents(self, item: int, flip: int, step: int, slot: int) -> Tensor:
        """A draw from an image's posterior, scaled as the UNet sees it, (C, h, w)."""
        mean, std = self.latents.read(item, flip)
        return (mean + std * normal(tuple(mean.shape), self.config.seed, Draw.POSTERIOR, step, slot)) * self.scaling_factor

    def _control(self, picture: Callable[[int], NDArray[np.uint8]], items: list[int], flips: list[int]) -> Tensor:
        """Control images (B, 3, R, R) in [0, 1], mirrored where their images are."""
        found = list(self.readers.map(picture, items))
        mirrored = [image[:, ::-1] if flip else image for image, flip in zip(found, flips, strict=True)]
        return torch.from_numpy(np.stack(mirrored)).permute(0, 3, 1, 2).float() / 255

    def validation_batches(self) -> list[Batch]:
        """One batch per validation image: its mean at fixed noise and evenly spread timesteps."""
        spread, batches = validation_timesteps(self.timesteps), []
        for item in range(len(self.validation_latents)):
            latents = self.validation_latents.read(item, 0)[0] * self.scaling_factor
            shape = (VALIDATION_TIMESTEPS, *latents.shape)
            text, control = self.encode([self.validation_texts[item]]), self._control(self.validation_pictures, [item], [0])
            batches.append(
                {
                    "latents": latents.expand(shape),
                    "noise": normal(shape, self.config.seed, Draw.VALIDATION_NOISE, 0, item),
                    "timesteps": spread,
                    "text": text.expand(VALIDATION_TIMESTEPS, -1, -1),
                    "control": control.expand(VALIDATION_TIMESTEPS, -1, -1, -1),
                }
            )
        return batches


class S2ITask(nn.Module):
    """The mean denoising loss of a batch, the UNet seeing the hint of its control images."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        hint_encoder: HintEncoder,
        noise_scheduler: DDPMScheduler,
        weighting: Weighting | None,
    ) -> None:
        super().__init__()
        self.unet, self.hint_encoder = unet, hint_encoder
        self.noise_scheduler, self.weighting = noise_scheduler, weighting

    def forward(self, batch: Batch) -> Tensor:
        """A scalar; batch: latents, noise (B, C, h, w), timesteps (B,), text (B, tokens, width), control (B, 3, R, R)."""
        with added_hint(self.unet, self.hint_encoder(batch["control"])):
            losses = denoising_loss(
                self.unet,
                self.noise_scheduler,
                batch["latents"],
                batch["text"],
                batch["noise"],
                batch["timesteps"],
                self.weighting,
            )
        return losses.mean()
