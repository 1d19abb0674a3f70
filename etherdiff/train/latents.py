"""The autoencoder's moments of thousands of images: on the disk, not in memory; computed once, and resumed where cut off."""

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
from etherdiff.system.files import digest, file_hash, move_into_place, write_text
from etherdiff.system.locks import wait_for_lock
from etherdiff.system.paths import cache_dir
from etherdiff.system.terminal import track, warn

PIXELS_AT_ONCE = 4 * 512 * 512
BETWEEN_RECORDS = 64  # batches after which it is recorded how far the work is


class LatentStore:
    """Posterior moments of every image and flip, unscaled float32: (N, flips, 2, C, h, w), read as they are needed."""

    def __init__(self, moments: NDArray[np.float32]) -> None:
        self.moments = moments

    def __len__(self) -> int:
        return len(self.moments)

    @property
    def flips(self) -> int:
        """1, or 2 where mirrored images are there as well."""
        return int(self.moments.shape[1])

    def read(self, item: int, flip: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (C, h, w) each."""
        mean, std = torch.from_numpy(np.array(self.moments[item, flip]))
        return mean, std


def stored_latents(
    vae: AutoencoderKL,
    count: int,
    flips: int,
    read: Callable[[int], NDArray[np.float32]],
    key: dict[str, Any],
    note: str,
) -> LatentStore:
    """The moments of `count` images, from the cache where nothing that shapes them has changed.

    Of several processes the first computes them and the others wait: they would write into one file.

    read: an image's pixels (3, R, R) in [-1, 1] by its number. key: JSON-able, all that decides the result.
    """
    path = cache_dir() / "latents" / f"{digest(key)}.npy"
    found = _whole(path)
    if found is None:  # no lock before: a finished cache may lie where nothing can be written
        with wait_for_lock(path.with_suffix(".lock")):
            found = _whole(path)
            if found is None:
                if path.exists():
                    warn(f"{path} is damaged: computing it again")
                found = _compute(vae, count, flips, read, path, note)
    return LatentStore(found)


def _compute(
    vae: AutoencoderKL, count: int, flips: int, read: Callable[[int], NDArray[np.float32]], path: Path, note: str
) -> NDArray[np.float32]:
    """Fill the file, going on where a process before was cut off."""
    record = _record(path)
    unfinished = path.with_suffix(".partial.npy")
    first = read(0)
    at_once = min(max(PIXELS_AT_ONCE // first[0].size, 1), 64)
    moments, start = _begin(unfinished, record, count, _encode(vae, [first], flips).shape[1:])
    parts = chunks(range(start, count), at_once)
    for number, part in enumerate(track(parts, note), 1):
        moments[part.start : part.stop] = _encode(vae, [read(item) for item in part], flips)  # type: ignore[attr-defined]
        if number % BETWEEN_RECORDS == 0:
            moments.flush()
            write_text(record, json.dumps({"done": part[-1] + 1}))
    moments.flush()
    del moments  # Windows renames no file that is mapped
    write_text(record, json.dumps({"done": count, "sha256": file_hash(unfinished)}))
    move_into_place(unfinished, path)  # last: without its hash it would seem damaged, to other processes and after a kill
    return np.load(path, mmap_mode="r")


def _whole(path: Path) -> NDArray[np.float32] | None:
    """The finished file, if it is what was written."""
    if not path.exists():
        return None
    try:
        if json.loads(_record(path).read_text(encoding="utf-8")).get("sha256") == file_hash(path):
            return np.load(path, mmap_mode="r")
    except (OSError, ValueError, AttributeError):
        pass
    return None


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
def _encode(vae: AutoencoderKL, images: list[NDArray[np.float32]], flips: int) -> NDArray[np.float32]:
    """(B, flips, 2, C, h, w)."""
    pixels = torch.from_numpy(np.stack(images)).to(vae.device, vae.dtype)
    views = [pixels, pixels.flip(-1)][:flips]
    posteriors = [vae.encode(view).latent_dist for view in views]
    moments = torch.stack([torch.stack([p.mean.float(), p.std.float()], 1) for p in posteriors], 1)
    return moments.cpu().numpy()
