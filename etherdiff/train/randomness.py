"""Randomness without hidden state: every draw is a function of (seed, what it is for, step, index of the sample).

numpy's Philox is a counter-based generator, so jumping to a draw costs nothing. A run that resumes at step 700, and two
processes that share a batch, see the numbers that one uninterrupted process would have seen.
"""

from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


class Draw(IntEnum):
    """Purpose of a random number. Values are part of the result: add at the end, never renumber."""

    ORDER = 0
    CLASS_ORDER = 1
    NOISE = 2
    CLASS_NOISE = 3
    TIMESTEP = 4
    CLASS_TIMESTEP = 5
    POSTERIOR = 6
    CLASS_POSTERIOR = 7
    CROP = 8
    CLASS_CROP = 9
    FLIP = 10
    CLASS_FLIP = 11
    CAPTION_DROPOUT = 12
    VALIDATION_NOISE = 13
    CROP_POSITION = 14
    DROPOUT = 15
    PERTURBATION = 16


def generator(seed: int, draw: Draw, step: int, index: int) -> np.random.Generator:
    """Return the stream of numbers for one purpose, step and sample; seed in [0, 2**64)."""
    if min(seed, step, index) < 0:  # numpy 1 would count from 2**64 down
        raise ValueError(f"no random numbers at seed {seed}, step {step}, index {index}: one is negative")
    key = np.array([seed, draw], dtype=np.uint64)
    counter = np.array([0, 0, index, step], dtype=np.uint64)  # the first two words count within the stream
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(shape: tuple[int, ...], seed: int, draw: Draw, step: int, index: int) -> Tensor:
    """Draw standard normal float32 of the given shape, on the CPU."""
    return torch.from_numpy(generator(seed, draw, step, index).standard_normal(shape, dtype=np.float32))


def integer(below: int, seed: int, draw: Draw, step: int, index: int) -> int:
    """Draw an integer in [0, below)."""
    return int(generator(seed, draw, step, index).integers(below))


def uniform(seed: int, draw: Draw, step: int, index: int) -> float:
    """Draw a number in [0, 1)."""
    return float(generator(seed, draw, step, index).random())


def item_at(position: int, count: int, seed: int, draw: Draw) -> int:
    """Return which of `count` items stands at `position` of an endless order that shuffles them anew for each pass."""
    epoch, offset = divmod(position, count)
    return int(_permutation(count, epoch, seed, draw)[offset])


@lru_cache(maxsize=8)
def _permutation(count: int, epoch: int, seed: int, draw: Draw) -> np.ndarray:
    return generator(seed, draw, epoch, 0).permutation(count)
