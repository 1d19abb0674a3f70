"""Features of image files: read once, decoded in workers, encoded in batches, kept on the disk by content.

A cached feature is named by the backbone's identity and the SHA-256 of the file: a changed image or another network is
computed again. Only finite features of readable images that are not all black are cached.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from etherdiff.eval.functional import lpips_distances
from etherdiff.eval.networks import Backbone, Pixels, Preprocessing
from etherdiff.images.reading import UnreadableImage, read_image
from etherdiff.system.errors import UserError
from etherdiff.system.files import cache_dir, digest, file_hash, save_tensors

MIN_IMAGES_FOR_WORKERS = 48
"""Images from which starting decoding processes takes less than it saves."""
MAX_WORKERS = 8
BLACK = "black"


@dataclass(frozen=True)
class Job:
    """An image file, and the roles to compute its features for."""

    index: int
    path: Path
    roles: frozenset[str]


@dataclass
class Features:
    """The results of `compute_features`, by index of the image."""

    shas: list[str | None]
    """SHA-256 of each file; None where it cannot be opened."""
    faults: dict[int, str] = field(default_factory=dict)
    """Index -> `BLACK`, or why the image cannot be read."""
    vectors: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """Role -> index -> float32 (D,). Missing where there is a fault or the features are unusable."""
    unusable: dict[str, list[int]] = field(default_factory=dict)
    """Role -> indices of images whose features hold NaN or infinity, or are all zero."""


class Distances:
    """LPIPS of every image of a group to the reference images and to the group's other images.

    The vectors are too large to keep (10 MB per image for AlexNet at 512 px): those of a group are dropped when it is complete.
    Only distances are cached.

    Attributes:
        to_reference, among: group -> float64 (g, R) and (g, g), NaN where an image has a fault or no usable features.
    """

    def __init__(self, backbone: Backbone, shas: Sequence[str | None], reference: range, groups: Sequence[range]) -> None:
        self.backbone, self.shas, self.reference = backbone, shas, reference
        self.groups = [reference, *groups]
        """Indices of each group's images; the reference images are the first group."""
        self.to_reference: dict[int, Tensor] = {}
        self.among: dict[int, Tensor] = {}
        self._vectors: dict[int, Tensor | None] = {}
        for number in range(len(self.groups)):
            self._read(number)
        missing = [group for number, group in enumerate(self.groups) if group and number not in self.among]
        self.wanted = frozenset(index for group in [reference, *missing] for index in group) if missing else frozenset[int]()

    def add(self, index: int, vector: Tensor | None) -> None:
        """Add the next image's vector, or None. Reference images come first, then groups in their order."""
        self._vectors[index] = vector if vector is not None and is_usable(vector) else None
        for number, group in enumerate(self.groups):
            if group and index == group[-1] and number not in self.among:
                self._finish(number)
        ended = next((group for group in self.groups[1:] if group[-1] == index), range(0))
        for member in ended:
            del self._vectors[member]

    def _finish(self, number: int) -> None:
        group = self.groups[number]
        self.among[number] = self._table(group, group)
        self.to_reference[number] = self._table(group, self.reference)
        usable = torch.isfinite(self.among[number]).all() and torch.isfinite(self.to_reference[number]).all()
        if usable and all(self.shas[index] for index in [*group, *self.reference]):
            _save({"among": self.among[number], "to_reference": self.to_reference[number]}, self._path(number))

    def _table(self, rows: range, columns: range) -> Tensor:
        table = torch.full((len(rows), len(columns)), torch.nan, dtype=torch.float64)
        kept_rows = [place for place, index in enumerate(rows) if self._vectors[index] is not None]
        kept_columns = [place for place, index in enumerate(columns) if self._vectors[index] is not None]
        found = lpips_distances(self._kept(rows), self._kept(columns))
        for row, values in zip(kept_rows, found, strict=True):
            table[row, kept_columns] = values
        return table

    def _kept(self, indices: Iterable[int]) -> list[Tensor]:
        return [vector for index in indices if (vector := self._vectors[index]) is not None]

    def _read(self, number: int) -> None:
        tables = _read_tensors(self._path(number), ("among", "to_reference"))
        if tables:
            self.among[number], self.to_reference[number] = tables

    def _path(self, number: int) -> Path:
        content = [[self.shas[index] for index in indices] for indices in (self.groups[number], self.reference)]
        return _folder(self.backbone) / "distances" / f"{digest(content)}.safetensors"


def compute_features(
    paths: Sequence[Path],
    backbones: Mapping[str, Backbone],
    roles: Sequence[frozenset[str]],
    reference: range = range(0),
    groups: Sequence[range] = (),
    batch_size: int = 32,
    workers: int | None = None,
) -> tuple[Features, Distances | None]:
    """Compute each image's features for its roles, and LPIPS distances if that is a role. A file is decoded at most once.

    Args:
        paths: image files, which may repeat.
        roles: for each path, the roles (keys of `backbones`) that need it; "lpips" is ignored.
        reference, groups: for "lpips": consecutive indices of `paths`, the reference before the groups; no group is empty.
        workers: decoding processes; None: as many as there are cores, up to `MAX_WORKERS`, and none for few images.
    """
    found = Features(hash_images(paths))
    found.faults = {index: _why_unreadable(paths[index]) for index, sha in enumerate(found.shas) if sha is None}
    lpips = backbones.get("lpips")
    distances = Distances(lpips, found.shas, reference, groups) if lpips is not None else None
    jobs = [
        Job(index, path, wanted)
        for index, path in enumerate(paths)
        if (wanted := _missing(found, index, roles[index], backbones, distances)) and found.shas[index] is not None
    ]
    with ThreadPoolExecutor(1) as writer:  # small files, written while the next batch is encoded
        done = encode_images(jobs, backbones, batch_size, workers)
        for index, fault, vectors in _in_order(done, distances, found):
            _keep(found, index, fault, vectors, backbones, writer)
            if distances is not None and index in distances.wanted:
                distances.add(index, vectors.get("lpips"))
    return found, distances


def hash_images(paths: Sequence[Path]) -> list[str | None]:
    """Return the SHA-256 of each file; None where it cannot be opened."""

    def hash_or_none(path: Path) -> str | None:
        try:
            return file_hash(path)
        except OSError:
            return None

    with ThreadPoolExecutor(min(MAX_WORKERS, _cores())) as pool:  # hashing releases the interpreter lock
        return list(pool.map(hash_or_none, paths))


Encoded = tuple[int, str | None, dict[str, Tensor]]
"""Index, fault, and role -> float32 (D,), empty where there is a fault."""


def encode_images(
    jobs: Sequence[Job], backbones: Mapping[str, Backbone], batch_size: int = 32, workers: int | None = None
) -> Iterator[Encoded]:
    """Yield each job's features, in order: workers decode, this process encodes."""
    if not jobs:
        return
    if workers is None:
        workers = min(_cores(), MAX_WORKERS) if len(jobs) >= MIN_IMAGES_FOR_WORKERS else 0
    preparing = {role: backbone.preprocessing for role, backbone in backbones.items()}
    loader = DataLoader(
        _Decoded(jobs, preparing), batch_size, num_workers=workers, collate_fn=_collate, pin_memory=torch.cuda.is_available()
    )
    for batch in loader:
        vectors: dict[str, dict[int, Tensor]] = {}
        for role, (places, pixels) in batch.pixels.items():
            vectors[role] = dict(zip(places, _encode(backbones[role], pixels), strict=True))
        for place, (index, fault) in enumerate(batch.images):
            yield index, fault, {role: found[place] for role, found in vectors.items() if place in found}


@dataclass
class _Batch:
    images: list[tuple[int, str | None]]
    """Index and fault."""
    pixels: dict[str, tuple[list[int], Pixels]]
    """Role -> places in the batch, and their pixels."""

    def pin_memory(self) -> "_Batch":
        pinned: dict[str, tuple[list[int], Pixels]] = {}
        for role, (places, pixels) in self.pixels.items():
            tensors = pixels.pin_memory() if isinstance(pixels, Tensor) else [image.pin_memory() for image in pixels]
            pinned[role] = (places, tensors)
        return _Batch(self.images, pinned)


class _Decoded(Dataset):
    """Decoded and resized images, or the reason why one cannot be used."""

    def __init__(self, jobs: Sequence[Job], preparing: Mapping[str, Preprocessing]) -> None:
        self.jobs, self.preparing = jobs, preparing

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, place: int) -> tuple[int, str | None, dict[str, Tensor]]:
        job = self.jobs[place]
        try:
            image = read_image(job.path)
        except UnreadableImage as error:
            return job.index, error.why, {}
        if is_black(image):
            return job.index, BLACK, {}
        return job.index, None, {role: self.preparing[role].pixels(image) for role in job.roles}


def is_black(image: Image.Image) -> bool:
    """Say whether every pixel is 0, as in the image that a safety checker returns."""
    extrema: list[tuple[int, int]] = list(image.convert("RGB").getextrema())  # type: ignore[arg-type]
    return all(highest == 0 for _, highest in extrema)


def _collate(images: list[tuple[int, str | None, dict[str, Tensor]]]) -> _Batch:
    """Stack the images of each role into one tensor: a file handle per image would exhaust the handles."""
    pixels: dict[str, tuple[list[int], Pixels]] = {}
    for role in sorted({role for *_, prepared in images for role in prepared}):
        places = [place for place, (*_, prepared) in enumerate(images) if role in prepared]
        found = [images[place][2][role] for place in places]
        same = len({tensor.shape for tensor in found}) == 1
        pixels[role] = places, torch.stack(found) if same else found
    return _Batch([(index, fault) for index, fault, _ in images], pixels)


def _encode(backbone: Backbone, pixels: Pixels) -> Tensor:
    size = backbone.largest_batch
    parts = [backbone.encode(pixels[start : start + size]) for start in range(0, len(pixels), size)]
    features = torch.cat([part if not backbone.cached else part.cpu() for part in parts])
    return features.float()


def _missing(
    found: Features, index: int, roles: frozenset[str], backbones: Mapping[str, Backbone], distances: Distances | None
) -> frozenset[str]:
    """Return the roles that the image must still be encoded for; cached features are added to `found`."""
    wanted = {"lpips"} if distances is not None and index in distances.wanted else set()
    for role in roles - {"lpips"}:
        sha = found.shas[index]
        known = _read_tensors(_vector_path(backbones[role], sha), ("features",)) if sha else None
        if known:
            found.vectors.setdefault(role, {})[index] = known[0]
        else:
            wanted.add(role)
    return frozenset(wanted)


def _in_order(done: Iterator[Encoded], distances: Distances | None, found: Features) -> Iterator[Encoded]:
    """Yield the encoded images, and in their place the unreadable files that distances wait for."""
    unopened = sorted(index for index in found.faults if distances is not None and index in distances.wanted)
    for item in done:
        while unopened and unopened[0] < item[0]:
            yield (first := unopened.pop(0)), found.faults[first], {}
        yield item
    for index in unopened:
        yield index, found.faults[index], {}


def _keep(
    found: Features,
    index: int,
    fault: str | None,
    vectors: Mapping[str, Tensor],
    backbones: Mapping[str, Backbone],
    writer: ThreadPoolExecutor,
) -> None:
    if fault is not None:
        found.faults[index] = fault
    for role, vector in vectors.items():
        if not is_usable(vector):
            found.unusable.setdefault(role, []).append(index)
        elif backbones[role].cached:
            found.vectors.setdefault(role, {})[index] = vector
            sha = found.shas[index]
            if sha is not None:
                # cloned: a row of a batch would be written with all of it
                writer.submit(_save, {"features": vector.clone()}, _vector_path(backbones[role], sha))


def is_usable(vector: Tensor) -> bool:
    """Say whether features are finite and have a direction."""
    return bool(torch.isfinite(vector).all() and vector.any())


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    with suppress(OSError):  # a cache that cannot be written only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, path)


def _read_tensors(path: Path, names: Sequence[str]) -> list[Tensor] | None:
    """Return the named tensors of a file; None if it is missing, damaged, or holds NaN or infinity."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = [file.get_tensor(name) for name in names]
    except (SafetensorError, OSError, ValueError):
        return None
    return tensors if all(bool(torch.isfinite(tensor).all()) for tensor in tensors) else None


def _vector_path(backbone: Backbone, sha: str) -> Path:
    return _folder(backbone) / sha[:2] / f"{sha}.safetensors"


def _folder(backbone: Backbone) -> Path:
    return cache_dir() / "features" / backbone.identity.digest


def _why_unreadable(path: Path) -> str:
    try:
        read_image(path)
    except UnreadableImage as error:
        return error.why
    raise UserError(f"{path} could not be opened, but now can be: start again")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
