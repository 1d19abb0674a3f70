"""The datasets of controllable generation, by name or as folders: found, completed, or refused with all reasons."""

import difflib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from json import dumps
from pathlib import Path
from typing import TypeVar

from etherdiff.control.canny import Canny
from etherdiff.control.captions import make_captions as blip_captions
from etherdiff.control.geometry import upright_size
from etherdiff.control.landmarks import Landmarks, find_task_file, with_size
from etherdiff.control.pairs import ControlDataset, Pair
from etherdiff.control.palettes import find_palette
from etherdiff.control.readers.ade20k import HUB_DATASET, find_ade20k, read_ade20k
from etherdiff.control.readers.coco import read_coco
from etherdiff.control.readers.hub import read_hub_dataset
from etherdiff.control.readers.imagefolder import read_imagefolder
from etherdiff.control.readers.listing import Listing, Row, caption_of, merged_captions, sentences
from etherdiff.control.readers.tiny_world import read_tiny_world
from etherdiff.control.segmentation import Segmentation
from etherdiff.control.signal import Signal
from etherdiff.system.errors import UserError
from etherdiff.system.files import file_hash
from etherdiff.system.paths import cache_dir
from etherdiff.system.terminal import progress_bar

DATASETS = {
    "ade20k": "segmentation",
    "tiny": "segmentation",
    "tiny-validation": "segmentation",
    "celebahq-landmarks": "landmarks",
    "coco-canny": "canny",
}
"""Datasets with a name, and the signal of each."""
_PALETTE_FILE = "palette.json"
_MISSING_CAPTIONS = "images without a caption"
_DERIVED = {"canny": ".png", "landmarks": ".json"}
"""Signals that can be computed from an image, and the suffix of their files."""

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def find_dataset(
    name: str,
    data_root: Path | None,
    *,
    signal: str | None = None,
    palette: str | None = None,
    captions: Path | None = None,
    make_captions: bool = False,
    resolution: int = 512,
    device: str = "auto",
) -> ControlDataset:
    """A dataset by name, or the folder of one, complete: every pair has its control file and its caption.

    Args:
        name: one of `DATASETS`, a folder in the imagefolder style, or the name of one in the data root.
        data_root: where DATA/ade20k, DATA/coco and the like are looked for.
        signal: segmentation, canny or landmarks; None is the dataset's own, for folders segmentation.
        palette: of segmentation: ade20k, tiny or a JSON file; None: FOLDER/palette.json, else ade20k.
        captions: a caption file, instead of the dataset's captions.
        make_captions: have BLIP describe the images that have none.
        resolution: of the square that missing edge maps are made of.
        device: where BLIP computes.

    Raises:
        UserError: everything that is wrong with the files by their names; `check.check_dataset` also reads them.
    """
    chosen, listing = list_dataset(name, data_root, signal, palette, captions, resolution)
    problems = dict(listing.problems)
    silent = [row for _, row in listing.rows() if row.text is None]
    wrong = sentences(problems)
    if silent and not make_captions:
        wrong += [f"{line}; --make-captions has BLIP describe them" for line in sentences({_MISSING_CAPTIONS: _names(silent)})]
    if not listing.training and not wrong:
        wrong.append(f"{name} has no pair to train on")
    if wrong:
        raise UserError([f"{name}: {sentence}" for sentence in wrong])
    if silent:
        made = blip_captions([row.image for row in silent], device)
        texts = dict(zip((row.image for row in silent), made, strict=True))
        _describe(listing, texts)
    _derive_controls(chosen, listing)
    return ControlDataset(name, chosen, _pairs(listing.training), _pairs(listing.evaluation))


def list_dataset(
    name: str,
    data_root: Path | None,
    signal: str | None = None,
    palette: str | None = None,
    captions: Path | None = None,
    resolution: int = 512,
) -> tuple[Signal, Listing]:
    """The signal and what lies there, good or bad; nothing is computed, captions and derived controls may be missing.

    Raises:
        UserError: there is no such dataset, or nothing in it can be listed.
    """
    if signal not in (None, *set(DATASETS.values())):
        raise UserError(f"signal: must be segmentation, canny or landmarks, not {signal!r}")
    if captions is not None and not captions.expanduser().is_file():
        raise UserError(f"captions: {captions} is not there")
    kind = signal or DATASETS.get(name, "segmentation")
    listing, folder = _read(name, data_root, captions.expanduser() if captions else None)
    if kind == "segmentation" and palette is None:
        beside = folder and folder / _PALETTE_FILE
        palette = _PALETTES.get(name) or (str(beside) if beside and beside.is_file() else None)
    chosen = make_signal(kind, palette, resolution)
    if name in DATASETS and kind != DATASETS[name]:  # its controls are of another signal
        listing.training, listing.evaluation = (
            [replace(row, control=None) for row in rows] for rows in (listing.training, listing.evaluation)
        )
    _settle_controls(chosen, listing)
    return chosen, listing


def make_signal(name: str, palette: str | None = None, resolution: int = 512) -> Signal:
    """A signal by name; palette: of segmentation; resolution: that missing edge maps are made at.

    Raises:
        UserError: no such signal, or no such palette.
    """
    if name == "segmentation":
        return Segmentation(find_palette(palette or "ade20k"))
    if palette is not None:
        raise UserError(f"palette: only segmentation has one, not {name}")
    if name == "canny":
        return Canny(resolution)
    if name == "landmarks":
        return Landmarks()
    raise UserError(f"signal: must be segmentation, canny or landmarks, not {name!r}")


def in_threads(work: Callable[[_In], _Out], items: Sequence[_In], description: str) -> list[_Out]:
    """What `work` gives for each item, in order, with a progress bar. Image decoding leaves Python's lock to others."""
    # threads that each suppress warnings would restore each other's filters in any order
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count() or 1) as pool, progress_bar() as bar:
        task = bar.add_task(description, total=len(items), note="")
        results = []
        for result in pool.map(work, items):
            results.append(result)
            bar.advance(task)
        return results


_PALETTES = {"ade20k": "ade20k", "tiny": "tiny", "tiny-validation": "tiny"}


def _read(name: str, data_root: Path | None, captions: Path | None) -> tuple[Listing, Path | None]:
    """What lies there, and the folder where it is the user's own."""
    if name in ("tiny", "tiny-validation"):
        return _described(read_tiny_world("test" if name == "tiny" else "validation"), captions), None
    if name == "ade20k":
        root = find_ade20k(data_root)
        return (read_ade20k(root, captions) if root else _described(_from_hub(data_root), captions)), root
    if name == "coco-canny":
        return read_coco(_in_data_root("coco", name, data_root), captions), None
    if name == "celebahq-landmarks":
        return _described(read_imagefolder(_in_data_root(name, name, data_root)), captions), None
    folder = Path(name).expanduser()
    if not folder.is_dir() and data_root is not None and (data_root / name).is_dir():
        folder = data_root / name
    if not name.strip() or not folder.is_dir():
        close = difflib.get_close_matches(name, DATASETS, n=2)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"dataset {name!r} is neither a folder nor one of {', '.join(DATASETS)}.{hint}")
    return _described(read_imagefolder(folder), captions), folder


def _from_hub(data_root: Path | None) -> Listing:
    try:
        return read_hub_dataset(HUB_DATASET)
    except UserError as error:
        tried = "no data root is given" if data_root is None else f"{data_root / 'ade20k'} is not there"
        raise UserError([f"ade20k: {tried}, and {problem}" for problem in error.problems]) from error


def _in_data_root(folder: str, name: str, data_root: Path | None) -> Path:
    if data_root is None:
        raise UserError(f"{name}: point --data-root or ETHERDIFF_DATA at a folder DATA that holds DATA/{folder}")
    if not (data_root / folder).is_dir():
        raise UserError(f"{name}: {data_root / folder} is not there")
    return data_root / folder


def _described(listing: Listing, captions: Path | None) -> Listing:
    """With the captions of a file in place of the dataset's own; images that it does not have stay silent."""
    if captions is not None:
        texts = merged_captions([captions])
        found = {row.image: caption_of(texts, row.image) for _, row in listing.rows()}
        _describe(listing, found)
    return listing


def _describe(listing: Listing, texts: Mapping[Path, str | None]) -> None:
    for rows in (listing.training, listing.evaluation):
        rows[:] = [replace(row, text=texts[row.image]) if row.image in texts else row for row in rows]


def _settle_controls(signal: Signal, listing: Listing) -> None:
    """Report controls that are missing for good; landmark files that do not tell their image's size are told it."""
    can_derive = signal.name in _DERIVED and not (isinstance(signal, Landmarks) and find_task_file(signal.task_file) is None)
    for split, rows in (("training", listing.training), ("evaluation", listing.evaluation)):
        kept = []
        for row in rows:
            if row.control is None and not can_derive:
                listing.report(f"images without a control ({signal.name})", f"{split}/{row.name}")
            else:
                kept.append(_sized(row) if isinstance(signal, Landmarks) else row)
        rows[:] = kept


def _sized(row: Row) -> Row:
    try:
        return row if row.control is None else replace(row, control=with_size(row.control, upright_size(row.image)))
    except OSError:
        return row  # an unreadable image is found where images are read


def _derive_controls(signal: Signal, listing: Listing) -> None:
    """Compute what is missing into the cache, by the content of the image and the settings of the signal."""
    images = list(dict.fromkeys(row.image for _, row in listing.rows() if row.control is None))
    if not images:
        return
    key = sha256(dumps(signal.settings(), sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir() / "controls-1" / f"{signal.name}-{key}"

    def derive(image: Path) -> Path | UserError:
        try:
            content = file_hash(image)
            control = folder / content[:2] / f"{content}{_DERIVED[signal.name]}"
            if not control.exists():
                control.parent.mkdir(parents=True, exist_ok=True)
                signal.derive(image, control)
            return control
        except UserError as error:
            return error
        except OSError as error:
            return UserError(f"{image}: {error.strerror or error}")

    results = in_threads(derive, images, f"{signal.name} of the images")
    problems = [problem for result in results if isinstance(result, UserError) for problem in result.problems]
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    found = {image: result for image, result in zip(images, results, strict=True) if isinstance(result, Path)}
    for rows in (listing.training, listing.evaluation):
        rows[:] = [replace(row, control=row.control or found[row.image]) for row in rows]


def _there(value: _In | None) -> _In:
    assert value is not None
    return value


def _names(rows: list[Row]) -> list[str]:
    return [row.name for row in rows]


def _pairs(rows: list[Row]) -> tuple[Pair, ...]:
    return tuple(Pair(row.name, row.image, _there(row.control), _there(row.text)) for row in rows)
