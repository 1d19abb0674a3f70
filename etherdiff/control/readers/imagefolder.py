"""Hugging Face's imagefolder style: metadata.jsonl, each line an image, its control and its text."""

import hashlib
import os.path
from collections.abc import Container
from itertools import chain, count
from pathlib import Path

from etherdiff.control.captions import CONTROL_KEYS, IMAGE_KEYS, TEXT_KEYS, first_of, read_lines
from etherdiff.control.readers import Listing, Row
from etherdiff.system.errors import UserError

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
