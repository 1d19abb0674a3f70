"""Hugging Face's imagefolder style: metadata.jsonl, each line an image, its control and its text.

Parquet files of the Hugging Face hub are unpacked once into the cache in this style.
"""

import hashlib
import io
import json
import os.path
from collections.abc import Container, Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

from PIL import Image

from etherdiff.control.captions import CONTROL_KEYS, IMAGE_KEYS, TEXT_KEYS, first_of, read_lines
from etherdiff.control.readers import Listing, Row
from etherdiff.images.reading import without_text
from etherdiff.system.errors import UserError
from etherdiff.system.files import cache_dir, make_once
from etherdiff.system.hub import fetch
from etherdiff.system.terminal import track

METADATA = "metadata.jsonl"
TRAINING = ("train", "training")
EVALUATION = ("validation", "val", "test")
MAX_EVALUATED = 500
_SHARE = 20  # one in so many is evaluated


def read_imagefolder(root: Path) -> Listing:
    """List FOLDER/metadata.jsonl, of which 5% (1 to 500) are kept for evaluation, or FOLDER/{train,validation}/metadata.jsonl.

    Paths are relative to the metadata's folder and stay inside FOLDER. Which rows are kept depends on their names only.

    Raises:
        UserError: there is no metadata.jsonl where one is looked for, or it cannot be read.
    """
    listing = Listing()
    training, evaluation = _split_folder(root, TRAINING), _split_folder(root, EVALUATION)
    if (root / METADATA).is_file():
        rows = _read_split(root, root, listing)
        listing.training, listing.evaluation = split_by_name(rows)
    elif training is not None:
        listing.training = _read_split(training, root, listing)
        listing.evaluation = _read_split(evaluation, root, listing) if evaluation is not None else []
    else:
        raise UserError(
            f"{root}: there is no {METADATA} in it, nor in train/. Each of its lines is to be like "
            '{"image": "images/1.jpg", "control": "controls/1.png", "text": "a cat on a sofa"}'
        )
    listing.note_unnamed(root)
    return listing


def split_by_name(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Split into (training, evaluation): rows whose names' hashes are last are evaluated, whatever the order of the lines."""
    evaluated = min(MAX_EVALUATED, max(1, len(rows) // _SHARE)) if len(rows) > 1 else 0
    last_first = sorted(rows, key=lambda row: hashlib.sha256(row.name.encode()).hexdigest(), reverse=True)
    kept = {row.name for row in last_first[:evaluated]}
    return [row for row in rows if row.name not in kept], [row for row in rows if row.name in kept]


def _split_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name / METADATA).is_file()), None)


def _read_split(folder: Path, root: Path, listing: Listing) -> list[Row]:
    rows: dict[str, Row] = {}
    named: set[str] = set()
    where = (folder / METADATA).relative_to(root)
    for number, entry in read_lines(folder / METADATA):
        image_name, control_name, text = (first_of(entry, keys) for keys in (IMAGE_KEYS, CONTROL_KEYS, TEXT_KEYS))
        if not _is_name(image_name) or not (control_name is None or _is_name(control_name)):
            listing.report(f"lines of {where} that are not JSON objects with an image", f"line {number}")
            continue
        paths = [folder / name for name in (image_name, control_name) if name is not None]
        escaping = [str(path) for path in paths if not _is_inside(path, root)]
        missing = [str(path.relative_to(root)) for path in paths if str(path) not in escaping and not path.is_file()]
        for path in escaping:
            listing.report(f"paths that lead out of {root}", path)
        for path in missing:
            listing.report(f"files named in {where} that are not there", path)
        if os.path.normpath(image_name) in named:
            listing.report(f"images named twice in {where}", image_name)
        elif not escaping and not missing:
            named.add(os.path.normpath(image_name))
            name = _new_name("-".join(Path(image_name).with_suffix("").parts), rows)
            caption = text.strip() if isinstance(text, str) else ""
            rows[name] = Row(name, paths[0], paths[1] if control_name is not None else None, caption or None)
    return list(rows.values())


def _new_name(wanted: str, taken: Container[str]) -> str:
    """Return what becomes a file name: of a-1.png, a/1.png and a/1.jpg, the second and third are numbered."""
    numbered = (f"{wanted}-{number}" for number in count(2))
    return next(name for name in chain([wanted], numbered) if name not in taken)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def _is_inside(path: Path, root: Path) -> bool:
    """Compare by the name, not by what links lead to: a dataset may well be made of links."""
    return Path(os.path.normpath(path)).is_relative_to(os.path.normpath(root))


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
