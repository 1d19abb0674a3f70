"""What the loop reads, for every task: batches that are functions of the step and of the place in the batch.

The autoencoder's moments of images are computed once: in a file that is memory-mapped, or read whole where it is small.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from etherdiff.config import TrainConfig
from etherdiff.families.diffusion import chunks
from etherdiff.system.files import cache_dir, digest, file_hash, move_into_place, write_text
from etherdiff.system.locks import wait_for_lock
from etherdiff.system.terminal import track, warn
from etherdiff.train.loop import Batch
from etherdiff.train.randomness import Draw, integer, item_at, normal, uniform

PIXELS_AT_ONCE = 4 * 512 * 512
BETWEEN_RECORDS = 64  # forward passes after which progress is recorded
MAX_IN_MEMORY = 64 * 2**20  # bytes; larger files are memory-mapped


class Moments:
    """The posterior of every view of every image: mean and standard deviation, (N, views, 2, C, h, w).

    Unscaled float32. A view is a crop; with flips, each crop's mirror image follows it. Training draws from the posterior, so
    nothing is lost compared with encoding the images again in each step.
    """

    def __init__(self, array: NDArray[np.float32], flips: int = 1) -> None:
        """flips: 1, or 2 where mirror images are there as well."""
        self.array, self.flips = array, flips

    def __len__(self) -> int:
        return len(self.array)

    @property
    def crops(self) -> int:
        """Number of crops per image."""
        return int(self.array.shape[1]) // self.flips

    def read(self, image: int, crop: int = 0, flip: int = 0) -> tuple[Tensor, Tensor]:
        """Return a view's mean and standard deviation, (C, h, w) each."""
        mean, std = torch.from_numpy(np.array(self.array[image, crop * self.flips + flip]))
        return mean, std


def stored_moments(
    vae: AutoencoderKL,
    count: int,
    read: Callable[[int], NDArray[np.float32]],
    key: dict[str, Any],
    note: str,
    flips: int = 1,
    at_once: int = 4,
) -> Moments:
    """Return the moments of `count` images, from the cache if nothing has changed that they depend on.

    Of several processes, the first computes them and the others wait: they would write into one file.

    Args:
        read: gives an image's views by its number, (views, 3, R, R) in [-1, 1].
        key: everything that decides the result; can be written as JSON.
        note: text beside the progress bar.
        flips: 2 where each crop's mirror image follows it.
        at_once: images that are read, and views that are encoded, together.
    """
    path = cache_dir() / "latents" / f"{digest(key)}.npy"
    found = _read_whole(path)
    if found is None:  # no lock before: a finished cache may lie where nothing can be written
        with wait_for_lock(path.with_suffix(".lock")):
            found = _read_whole(path)
            if found is None:
                if path.exists():
                    warn(f"{path} is damaged: computing it again")
                found = _compute(vae, count, read, path, note, at_once)
    return Moments(found, flips)


def images_at_once(resolution: int) -> int:
    """Return how many images of thousands to encode in one forward pass."""
    return min(max(PIXELS_AT_ONCE // resolution**2, 1), 64)


def _compute(
    vae: AutoencoderKL, count: int, read: Callable[[int], NDArray[np.float32]], path: Path, note: str, at_once: int
) -> NDArray[np.float32]:
    """Fill the file, going on where an earlier process was cut off."""
    record, unfinished = _record(path), path.with_suffix(".partial.npy")
    moments, start = _begin(unfinished, record, count, encode(vae, [read(0)], at_once).shape[1:])
    for number, part in enumerate(track(chunks(range(start, count), at_once), note), 1):
        moments[part.start : part.stop] = encode(vae, [read(item) for item in part], at_once)  # type: ignore[attr-defined]
        if number % BETWEEN_RECORDS == 0:
            moments.flush()
            write_text(record, json.dumps({"done": part[-1] + 1}))
    moments.flush()
    del moments  # Windows renames no file that is mapped
    write_text(record, json.dumps({"done": count, "sha256": file_hash(unfinished)}))
    move_into_place(unfinished, path)  # last: without its hash it would seem damaged, to other processes and after a kill
    return _read(path)


def _read_whole(path: Path) -> NDArray[np.float32] | None:
    """The finished file, if it is what was written."""
    if not path.exists():
        return None
    try:
        if json.loads(_record(path).read_text(encoding="utf-8")).get("sha256") == file_hash(path):
            return _read(path)
    except (OSError, ValueError, AttributeError):
        pass
    return None


def _read(path: Path) -> NDArray[np.float32]:
    return np.load(path, mmap_mode="r" if path.stat().st_size > MAX_IN_MEMORY else None)


def _record(path: Path) -> Path:
    """Of the file: how far it is; when finished, its hash."""
    return path.with_suffix(".json")


def _begin(unfinished: Path, record: Path, count: int, shape: tuple[int, ...]) -> tuple[Any, int]:
    """The array to fill, and the image to go on with."""
    try:
        done = int(json.loads(record.read_text(encoding="utf-8"))["done"])
        moments = open_memmap(unfinished, mode="r+")
        if 0 < done <= count and moments.shape == (count, *shape):
            return moments, done
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return open_memmap(unfinished, mode="w+", dtype=np.float32, shape=(count, *shape)), 0


@torch.no_grad()
def encode(vae: AutoencoderKL, images: list[NDArray[np.float32]], at_once: int) -> NDArray[np.float32]:
    """Encode images of (views, 3, R, R), `at_once` views in a forward pass: (B, views, 2, C, h, w)."""
    parts = torch.from_numpy(np.concatenate(images)).split(at_once)
    posteriors = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist for part in parts]
    moments = torch.cat([torch.stack([p.mean.float(), p.std.float()], 1).cpu() for p in posteriors])
    return moments.reshape(len(images), -1, *moments.shape[1:]).numpy()


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
