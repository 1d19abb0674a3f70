"""What the data of every task has in common: its batches are functions of the step and of the place in the batch."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from etherdiff.config import TrainConfig
from etherdiff.train.loop import Batch

VALIDATION_TIMESTEPS = 4  # per image, spread evenly over the noise schedule


class StepBatches(ABC):
    """What the loop reads; a subclass makes a batch of given slots."""

    config: TrainConfig

    def batches(self, step: int, process: int, processes: int) -> list[Batch]:
        """One process's micro-batches of an optimizer step; all processes' and micro-batches' slots are one batch."""
        size, parts = self.config.batch_size, self.config.gradient_accumulation
        starts = [(part * processes + process) * size for part in range(parts)]
        return [self._batch(step, range(start, start + size), parts * processes * size) for start in starts]

    @abstractmethod
    def _batch(self, step: int, slots: range, per_step: int) -> Batch:
        """The samples of some of the `per_step` slots of an optimizer step."""

    @abstractmethod
    def validation_batches(self) -> list[Batch]:
        """Batches that never change."""


def validation_timesteps(timesteps: int) -> Tensor:
    """The timesteps (VALIDATION_TIMESTEPS,) of a validation image, of `timesteps` in all."""
    return ((torch.arange(VALIDATION_TIMESTEPS) + 0.5) / VALIDATION_TIMESTEPS * timesteps).long()
