"""What the builders of the evaluators share: pictures as a generator would blur them, and how a folder is saved."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from etherdiff.system.files import save_tensors, staged_folder
from tiny_world.data import to_tensor

SOFTENED_SHARE = 0.5
NORMALISATION = {"do_rescale": True, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
"""An image processor's settings that give what `to_tensor` gives: [-1, 1]."""


def some(rng: np.random.Generator, total: int, count: int) -> NDArray[np.int64]:
    """Distinct indices below `total`, sorted so that a memory-mapped array is read in order; all if there are fewer."""
    return np.sort(rng.choice(total, min(count, total), replace=False))


def soften(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the images (B, 3, H, W) in [-1, 1] blurred, a little noisy and off in colour, as an autoencoder makes them."""
    count = len(images)
    chosen = torch.from_numpy(rng.random(count) < SOFTENED_SHARE).float()[:, None, None, None]
    sigma = float(rng.uniform(0.3, 0.9))
    offsets = torch.arange(-2.0, 3.0)
    line = torch.softmax(-0.5 * (offsets / sigma) ** 2, 0)
    kernel = (line[:, None] * line).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    grain = torch.from_numpy(rng.standard_normal((count, 3, 32, 32), np.float32))
    noise = F.interpolate(grain, size=images.shape[-2:], mode="bilinear", align_corners=False)
    tint = 1 + 0.05 * torch.from_numpy(rng.standard_normal((count, 3, 1, 1), np.float32))
    amount = 0.06 * torch.from_numpy(rng.random((count, 1, 1, 1), np.float32))
    return torch.lerp(images, (blurred * tint + amount * noise).clamp(-1, 1), chosen)


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], images: NDArray[np.uint8], size: int = 64) -> Tensor:
    """What `function` gives for the images (N, 64, 64, 3), `size` at a time."""
    return torch.cat([function(to_tensor(images[start : start + size])) for start in range(0, len(images), size)])


@contextmanager
def evaluator_folder(model: Any, processor: Any, folder: Path) -> Iterator[Path]:
    """A transformers folder with half-precision weights that load as float32; the block may add files to it."""
    with staged_folder(folder) as staged:
        model.config.dtype = torch.float32  # what `from_pretrained` goes by, whatever the file holds
        model.save_pretrained(staged)
        processor.save_pretrained(staged)
        weights = staged / "model.safetensors"
        halved = {name: t.half() if t.is_floating_point() else t for name, t in load_file(weights).items()}
        save_tensors(halved, weights)
        yield staged
