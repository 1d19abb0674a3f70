"""What the loop reads, for every task: batches that are functions of the step and of the place in the batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from etherdiff.config import TrainConfig
from etherdiff.train.loop import Batch
from etherdiff.train.randomness import Draw, integer, item_at, normal, uniform
from etherdiff.train.store import Moments

VALIDATION_TIMESTEPS = 4  # per image, spread evenly over the noise schedule


class Item(NamedTuple):
    """One sample of a batch."""

    image: int
    """Number of the image."""
    flip: int = 0
    """1 where the image is mirrored."""
    dropped: bool = False
    """Whether it is trained on with the empty prompt."""


class Draws(NamedTuple):
    """Streams of random numbers that a source is drawn with."""

    order: Draw
    crop: Draw
    flip: Draw
    posterior: Draw
    noise: Draw
    timestep: Draw


OWN_DRAWS = Draws(Draw.ORDER, Draw.CROP, Draw.FLIP, Draw.POSTERIOR, Draw.NOISE, Draw.TIMESTEP)
CLASS_DRAWS = Draws(
    Draw.CLASS_ORDER, Draw.CLASS_CROP, Draw.CLASS_FLIP, Draw.CLASS_POSTERIOR, Draw.CLASS_NOISE, Draw.CLASS_TIMESTEP
)


@dataclass(frozen=True)
class ImageSource:
    """Images that batches are drawn from."""

    moments: Moments
    condition: Callable[[Sequence[Item]], Batch]
    """What the UNet is told of some samples: text, and control where there is one; (B, ...) each."""
    draws: Draws = OWN_DRAWS
    weight: float | None = None
    """Weight of the images' mean loss in a weighted sum; None: the loss is a plain mean."""


class StepBatches:
    """Batches of latents, noise, timesteps and what the UNet is told."""

    def __init__(
        self,
        config: TrainConfig,
        sources: Sequence[ImageSource],
        validation: ImageSource,
        scaling_factor: float,
        timesteps: int,
    ) -> None:
        """Sources follow each other in a batch, `batch_size` samples of each.

        scaling_factor: from the autoencoder's latents to the UNet's. timesteps: length of the noise schedule.
        """
        self.config, self.sources, self.validation = config, sources, validation
        self.scaling_factor, self.timesteps = scaling_factor, timesteps

    def batches(self, step: int, process: int, processes: int) -> list[Batch]:
        """Return one process's micro-batches of an optimizer step; all processes' and micro-batches' slots are one batch."""
        size, parts = self.config.batch_size, self.config.gradient_accumulation
        starts = [(part * processes + process) * size for part in range(parts)]
        return [self._batch(step, range(start, start + size), parts * processes * size) for start in starts]

    def _batch(self, step: int, slots: range, per_step: int) -> Batch:
        """The samples of some of the `per_step` slots of an optimizer step."""
        parts = [self._part(source, step, slots, per_step) for source in self.sources]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _part(self, source: ImageSource, step: int, slots: range, per_step: int) -> Batch:
        """The samples of one source, with everything that the loss needs."""
        seed, draws = self.config.seed, source.draws
        items = [self.item(source, step, slot, per_step) for slot in slots]
        latents = torch.stack([self._latents(source, item, step, slot) for item, slot in zip(items, slots, strict=True)])
        shape = tuple(latents.shape[1:])
        batch = {
            "latents": latents,
            "noise": torch.stack([normal(shape, seed, draws.noise, step, slot) for slot in slots]),
            "timesteps": torch.tensor([integer(self.timesteps, seed, draws.timestep, step, slot) for slot in slots]),
            **source.condition(items),
        }
        if source.weight is not None:  # so that the sum of weighted losses is the weighted sum of the sources' means
            batch["weights"] = torch.tensor([source.weight] * len(slots)) / len(slots)
        return batch

    def item(self, source: ImageSource, step: int, slot: int, per_step: int) -> Item:
        """Return what a source has in a slot of a step of `per_step` slots."""
        seed, draws = self.config.seed, source.draws
        return Item(
            item_at(step * per_step + slot, len(source.moments), seed, draws.order),
            integer(source.moments.flips, seed, draws.flip, step, slot),
            uniform(seed, Draw.CAPTION_DROPOUT, step, slot) < self.config.caption_dropout,
        )

    def _latents(self, source: ImageSource, item: Item, step: int, slot: int) -> Tensor:
        """A draw from the posterior of one of the image's crops, scaled as the UNet sees it, (C, h, w)."""
        seed, draws = self.config.seed, source.draws
        crop = integer(source.moments.crops, seed, draws.crop, step, slot)
        mean, std = source.moments.read(item.image, crop, item.flip)
        return (mean + std * normal(tuple(mean.shape), seed, draws.posterior, step, slot)) * self.scaling_factor

    def validation_batches(self) -> list[Batch]:
        """Return a batch per validation image: its first view's mean at fixed noise and evenly spread timesteps."""
        spread, source, batches = validation_timesteps(self.timesteps), self.validation, []
        for image in range(len(source.moments)):
            latents = source.moments.read(image)[0] * self.scaling_factor
            shape = (VALIDATION_TIMESTEPS, *latents.shape)
            told = source.condition([Item(image)])
            batch = {
                "latents": latents.expand(shape),
                "noise": normal(shape, self.config.seed, Draw.VALIDATION_NOISE, 0, image),
                "timesteps": spread,
                **{name: tensor.expand(VALIDATION_TIMESTEPS, *tensor.shape[1:]) for name, tensor in told.items()},
            }
            if source.weight is not None:
                batch["weights"] = torch.full((VALIDATION_TIMESTEPS,), 1 / VALIDATION_TIMESTEPS)
            batches.append(batch)
        return batches


def validation_timesteps(timesteps: int) -> Tensor:
    """Return the timesteps (VALIDATION_TIMESTEPS,) of a validation image, of `timesteps` in all."""
    return ((torch.arange(VALIDATION_TIMESTEPS) + 0.5) / VALIDATION_TIMESTEPS * timesteps).long()
