"""Datasets of the Hugging Face hub in parquet files, unpacked once into the cache in the imagefolder style."""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from etherdiff.control.captions import TEXT_KEYS, first_of
from etherdiff.control.readers import Listing
from etherdiff.control.readers.imagefolder import METADATA, read_imagefolder
from etherdiff.images.reading import without_text
from etherdiff.system.errors import UserError
from etherdiff.system.files import cache_dir, make_once
from etherdiff.system.hub import fetch
from etherdiff.system.terminal import track

VERSION = 1  # of what is unpacked here
IMAGE_COLUMNS = ("image", "jpg", "target")
LABEL_COLUMNS = ("seg_map", "control_seg", "annotation", "label", "conditioning_image", "control")
"""What columns are called; label maps are preferred to pictures of them."""
TEXT_COLUMNS = (*TEXT_KEYS, "captions", "blip_caption")
SPLITS = {"train": "train", "training": "train", "validation": "validation", "val": "validation", "test": "validation"}


def read_hub_dataset(repo: str) -> Listing:
    """List the images, label maps and captions of a hub dataset.

    Raises:
        UserError: it cannot be fetched, or its columns are others.
    """
    snapshot = fetch(
        repo,
        ["*.parquet"],
        kind="dataset",
        needed="**/*.parquet",
        what=f"the hub dataset {repo} could not be fetched",
        instead="Without a network, put the dataset on this machine and point --data-root or ETHERDIFF_DATA at it",
    )
    files = sorted(snapshot.rglob("*.parquet"))
    key = hashlib.sha256("\n".join(f"{path.name} {path.stat().st_size}" for path in files).encode()).hexdigest()[:16]
    folder = cache_dir() / f"hub-datasets-{VERSION}" / f"{repo.replace('/', '--')}-{key}"
    return read_imagefolder(make_once(folder, lambda new: unpack(files, new)))


def unpack(files: list[Path], folder: Path) -> None:
    """Write the rows of parquet files (named after their split: train-00000-of-00010.parquet) as an imagefolder.

    Raises:
        UserError: columns for the image and the label map are not found.
    """
    import pyarrow.parquet as parquet

    lines: dict[str, list[str]] = {}
    for path in track(files, "unpacking"):
        split = SPLITS.get(path.name.split("-")[0])
        if split is None:
            continue
        done = lines.setdefault(split, [])
        for row in _rows(parquet.ParquetFile(path)):
            done.append(_write_row(row, folder / split, f"{len(done):06d}", path))
    if "train" not in lines:
        raise UserError(f"{files[0].parent}: none of its parquet files is named after the split train")
    for split, content in lines.items():
        (folder / split / METADATA).write_text("\n".join(content) + "\n", encoding="utf-8")


def _rows(file: Any) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(batch_size=16):
        yield from batch.to_pylist()


def _write_row(row: dict[str, Any], folder: Path, name: str, source: Path) -> str:
    """Write the image and the map as the files they were; return the row's line of metadata."""
    line: dict[str, str] = {}
    for kind, columns in (("image", IMAGE_COLUMNS), ("control", LABEL_COLUMNS)):
        content = first_of(row, columns)
        content = content.get("bytes") if isinstance(content, dict) else content
        if not isinstance(content, bytes):
            raise UserError(f"{source.name} has the columns {', '.join(row)}; one of {', '.join(columns)} is to hold images")
        line[kind] = f"{kind}s/{name}{_suffix(content, source)}"
        path = folder / line[kind]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    text = first_of(row, TEXT_COLUMNS)
    line["text"] = str((text[0] if text else "") if isinstance(text, list) else text or "")
    return json.dumps(line)


def _suffix(content: bytes, source: Path) -> str:
    try:
        with Image.open(io.BytesIO(without_text(content))) as image:
            return {"JPEG": ".jpg"}.get(str(image.format), f".{str(image.format).lower()}")
    except OSError as error:
        raise UserError(f"{source.name} holds an image that cannot be read") from error
