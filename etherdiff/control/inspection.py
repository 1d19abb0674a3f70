"""What is in the files of a dataset: `data check` and training read each once, and what is good is kept by its content."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from etherdiff.control.captions import read_lines
from etherdiff.control.readers import Listing, Row
from etherdiff.control.signals.signal import Signal
from etherdiff.images.reading import UnreadableImage, is_nearly_black, read_image
from etherdiff.system.errors import UserError
from etherdiff.system.files import cache_dir, digest, unchanged_file_hash
from etherdiff.system.terminal import in_threads

VERSION = 1  # of what is looked for; a new version reads every file again
TOKENS = 77
"""What Stable Diffusion's text encoder reads of a caption, its start and end included."""


@dataclass(frozen=True)
class Inspection:
    """What was found: each kind of thing with its cases."""

    problems: dict[str, list[str]] = field(default_factory=dict)
    """What cannot be trained on."""
    doubts: dict[str, list[str]] = field(default_factory=dict)
    """What is wrong in a dataset, though training on it works."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """What need not be wrong."""
    counts: tuple[Any, ...] = ()
    """What `signal.count` found in the control of each row; None where that is missing or not good."""


@dataclass(frozen=True)
class _Reading:
    """What was found in the files of one row."""

    problems: tuple[tuple[str, str], ...] = ()
    image: str | None = None
    """The image's hash."""
    both: str | None = None
    """The hashes of the image and its control."""
    count: Any = None
    black: bool = False
    """Whether the image is nearly black."""


def inspect_rows(signal: Signal, listing: Listing, description: str) -> Inspection:
    """Read every image and control that is listed, with a progress bar; files that were good before are only hashed.

    In one process, files whose size and time are unchanged are looked at once.
    """
    rows = tuple((split, row, _stamp(row)) for split, row in listing.rows())
    return _inspect(signal, rows, description)


@lru_cache(maxsize=4)
def _inspect(signal: Signal, rows: tuple[tuple[str, Row, Any], ...], description: str) -> Inspection:
    cache = cache_dir() / f"checked-{VERSION}" / f"{signal.name}-{digest(signal.settings())}.jsonl"
    known = _read_known(cache)
    readings = in_threads(lambda item: _read(signal, known, item[0], item[1]), rows, description)
    good = {one.both: one for one in readings if one.both and not one.problems and one.both not in known}
    lines = [json.dumps({"files": both, "count": one.count, "black": one.black}) for both, one in good.items()]
    if lines:
        with suppress(OSError):  # a cache that cannot be written: they are read again next time
            cache.parent.mkdir(parents=True, exist_ok=True)
            with cache.open("a", encoding="utf-8") as file:
                file.write("\n" + "\n".join(lines) + "\n")  # the first ends a line that a kill cut short
    found = Inspection(counts=tuple(one.count for one in readings))
    for kind, where in (problem for one in readings for problem in one.problems):
        found.problems.setdefault(kind, []).append(where)
    names = [f"{split}/{row.name}" for split, row, _ in rows]
    for kind, where in _twice(rows, readings):
        found.doubts.setdefault(kind, []).append(where)
    for kind, odd in signal.odd(found.counts).items():
        if odd:
            found.doubts[kind] = [f"{names[place]}: {what}" for place, what in odd]
    found.notes.update(_long_captions(rows))
    found.notes.update(signal.rare([one.count for one, (split, *_) in zip(readings, rows, strict=True) if split == "training"]))
    if dark := [name for name, one in zip(names, readings, strict=True) if one.black]:
        found.notes["images that are nearly black as read here"] = dark
    return found


def _read_known(cache: Path) -> dict[str, dict[str, Any]]:
    """Return what was found in good files before, by their hashes. What is damaged is looked at again."""
    entries: list[Any] = []
    if cache.is_file():
        with suppress(UserError):
            entries = [entry for _, entry in read_lines(cache) if isinstance(entry, dict)]
    return {entry["files"]: entry for entry in entries if {"files", "count", "black"} <= entry.keys()}


def _stamp(row: Row) -> Any:
    """Return what changes when a row's files do."""
    found = []
    for path in (row.image, row.control):
        with suppress(OSError):
            status = path.stat() if path else None
            found.append(status and (status.st_size, status.st_mtime_ns, status.st_mode))
    return tuple(found)


def _read(signal: Signal, known: Mapping[str, dict[str, Any]], split: str, row: Row) -> _Reading:
    where = f"{split}/{row.name}"
    content = both = None
    with suppress(OSError):  # reading it says why
        content = unchanged_file_hash(row.image)
        both = f"{content} {unchanged_file_hash(row.control) if row.control else None}"
        if both in known:
            return _Reading((), content, both, known[both]["count"], known[both]["black"])
    problems: list[tuple[str, str]] = []
    size = count = None
    black = False
    try:
        image = read_image(row.image)
        size, black = image.size, is_nearly_black(image)
    except UnreadableImage as error:
        problems.append(("images that cannot be read", f"{where}: {error.why}"))
    if row.control is not None:
        try:
            found = signal.problems(row.control)
        except (UserError, OSError) as error:
            found = [str(error)]
        problems += [("controls that are not good", f"{where}: {problem}") for problem in found]
        if not found:
            count, other = signal.count(row.control), signal.size(row.control)
            if size is not None and other not in (None, size):
                what = f"{where}: {_text(other)}, image {_text(size)}"
                problems.append(("controls of another size than their image", what))
    return _Reading(tuple(problems), content, both, count, black)


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _twice(rows: tuple[tuple[str, Row, Any], ...], readings: list[_Reading]) -> list[tuple[str, str]]:
    first: dict[str, tuple[str, str]] = {}
    found = []
    for (split, row, _), reading in zip(rows, readings, strict=True):
        if reading.image is None:
            continue
        earlier = first.setdefault(reading.image, (split, row.name))
        if earlier != (split, row.name):
            kind = "the same image twice" if earlier[0] == split else "the same image in training and evaluation"
            found.append((kind, f"{earlier[0]}/{earlier[1]} and {split}/{row.name}"))
    return found


def _long_captions(rows: tuple[tuple[str, Row, Any], ...]) -> dict[str, list[str]]:
    from transformers import CLIPTokenizer

    from etherdiff.families.bases import shipped_config

    captions = [(f"{split}/{row.name}", row.text) for split, row, _ in rows if row.text is not None]
    if not captions:
        return {}
    tokenizer = CLIPTokenizer.from_pretrained(shipped_config("sd15") / "tokenizer")
    tokens = tokenizer([text for _, text in captions], truncation=False, verbose=False).input_ids
    long = [f"{where}: {len(ids)}" for (where, _), ids in zip(captions, tokens, strict=True) if len(ids) > TOKENS]
    return {f"captions whose end is not read, being longer than {TOKENS} tokens": long} if long else {}
