"""Compute the autoencoder's moments of images once: in a file that is memory-mapped, or read whole where it is small."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from etherdiff.families.sampling import chunks
from etherdiff.system.files import cache_dir, digest, file_hash, move_into_place, write_text
from etherdiff.system.locks import wait_for_lock
from etherdiff.system.terminal import track, warn

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
