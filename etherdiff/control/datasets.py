"""The datasets of controllable generation, by name or as folders: found, completed, checked, or refused with all reasons."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from json import dumps
from pathlib import Path
from typing import Any

from rich.table import Table

from etherdiff.control.captions import make_captions as blip_captions
from etherdiff.control.inspection import Inspection, inspect_rows
from etherdiff.control.readers import Listing, Row, sentences
from etherdiff.control.readers.ade20k import HUB_DATASET, find_ade20k, read_ade20k
from etherdiff.control.readers.coco import read_coco
from etherdiff.control.readers.imagefolder import read_hub_dataset, read_imagefolder
from etherdiff.control.readers.tiny_world import read_tiny_world
from etherdiff.control.signals import find_signal, make_signal
from etherdiff.control.signals.signal import Signal
from etherdiff.system.errors import UserError
from etherdiff.system.files import cache_dir, file_hash
from etherdiff.system.terminal import in_threads, is_main_process, warn
from etherdiff.system.text import listed


@dataclass(frozen=True)
class Pair:
    """One image with its control and caption; names are unique within a split."""

    name: str
    image: Path
    control: Path
    text: str


@dataclass(frozen=True)
class ControlDataset:
    """What is trained on, and what is scored on: no pair is in both."""

    name: str
    signal: Signal
    training: tuple[Pair, ...]
    evaluation: tuple[Pair, ...]
    """The dataset's validation split; the tiny world's test split. May be empty."""


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
    read_files: bool = False,
) -> ControlDataset:
    """Return a dataset by name, or the folder of one, complete: every pair has its control file and its caption.

    Args:
        name: one of `DATASETS`, a folder in the imagefolder style, or the name of one in the data root.
        data_root: where DATA/ade20k, DATA/coco and the like are looked for.
        signal: one of `signals.SIGNALS`; None is the dataset's own, for folders segmentation.
        palette: of segmentation: ade20k, tiny or a JSON file; None: FOLDER/palette.json, else ade20k.
        captions: a caption file, instead of the dataset's captions.
        make_captions: have BLIP describe the images that have none.
        resolution: of the square that missing edge maps are made of.
        device: where BLIP computes.
        read_files: look into every file, as `data check` does, and warn of what may be trained on though it seems wrong.

    Raises:
        UserError: everything that is wrong with the files: by their names, and in them where they are read.
    """
    chosen, listing = list_dataset(name, data_root, signal, palette, captions, resolution)
    if listing.left_out:
        warn(f"left out of {name}: {listed(listing.left_out)}")
    found = Inspection()
    if read_files and is_main_process():  # one process for all
        found = inspect_rows(chosen, listing, f"checking {Path(name).name}")
        for sentence in sentences({**found.doubts, **found.notes}):
            _warn_once(f"{name}: {sentence}")
    silent = [row for _, row in listing.rows() if row.text is None]
    wrong = sentences({**listing.problems, **found.problems})
    if silent and not make_captions:
        names = {"images without a caption": [row.name for row in silent]}
        wrong += [f"{line}; --make-captions has BLIP describe them" for line in sentences(names)]
    if not listing.training and not wrong:
        wrong.append(f"{name} has no pair to train on")
    if wrong:
        raise UserError([f"{name}: {sentence}" for sentence in wrong])
    if silent:
        made = blip_captions([row.image for row in silent], device)
        texts = dict(zip((row.image for row in silent), made, strict=True))
        listing.change(lambda row: replace(row, text=row.text or texts[row.image]))
    _derive_controls(chosen, listing)
    return ControlDataset(name, chosen, _pairs(listing.training), _pairs(listing.evaluation))


@cache
def _warn_once(message: str) -> None:
    """Warn of something once, however many runs of a sweep are of one dataset."""
    warn(message)


def list_dataset(
    name: str,
    data_root: Path | None,
    signal: str | None = None,
    palette: str | None = None,
    captions: Path | None = None,
    resolution: int = 512,
) -> tuple[Signal, Listing]:
    """Return the signal and what is in the dataset, good or bad. Captions and derived controls may be missing.

    Raises:
        UserError: there is no such dataset, or nothing in it can be listed.
    """
    named = DATASETS.get(name)
    kind = signal or (named.signal if named else "segmentation")
    has_palette = find_signal(kind).has_palette  # an unknown name is refused before anything is read
    if captions is not None and not captions.is_file():
        raise UserError(f"captions: {captions} is not there")
    listing, folder = _read(name, data_root, captions)
    if has_palette and palette is None:
        own = folder and folder / "palette.json"
        palette = named.palette if named else str(own) if own and own.is_file() else None
    chosen = make_signal(kind, palette, resolution)
    if named and kind != named.signal:  # its controls are of another signal
        listing.change(lambda row: replace(row, control=None))
    _settle_controls(chosen, listing)
    return chosen.settled([row.control for _, row in listing.rows() if row.control is not None]), listing


@dataclass(frozen=True)
class NamedDataset:
    """A dataset that is found by its name."""

    signal: str
    read: Callable[[Path | None, Path | None], Listing]
    """Takes the data root and a caption file."""
    palette: str | None = None


DATASETS = {
    "ade20k": NamedDataset("segmentation", lambda root, captions: _ade20k(root, captions), "ade20k"),
    "tiny": NamedDataset("segmentation", lambda root, captions: _described(read_tiny_world("test"), captions), "tiny"),
    "tiny-validation": NamedDataset(
        "segmentation", lambda root, captions: _described(read_tiny_world("validation"), captions), "tiny"
    ),
    "celebahq-landmarks": NamedDataset(
        "landmarks",
        lambda root, captions: _described(read_imagefolder(_in_data_root("celebahq-landmarks", root)), captions),
    ),
    "coco-canny": NamedDataset("canny", lambda root, captions: read_coco(_in_data_root("coco-canny", root, "coco"), captions)),
}


def _read(name: str, data_root: Path | None, captions: Path | None) -> tuple[Listing, Path | None]:
    """Return what is in the dataset, and its folder if that is the user's own."""
    if name in DATASETS:
        return DATASETS[name].read(data_root, captions), None
    folder = Path(name)
    if not folder.is_dir() and data_root is not None and (data_root / name).is_dir():
        folder = data_root / name
    if not name.strip() or not folder.is_dir():
        close = difflib.get_close_matches(name, DATASETS, n=2)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"dataset {name!r} is neither a folder nor one of {', '.join(DATASETS)}.{hint}")
    return _described(read_imagefolder(folder), captions), folder


def _ade20k(data_root: Path | None, captions: Path | None) -> Listing:
    root = find_ade20k(data_root)
    return read_ade20k(root, captions) if root else _described(_from_hub(data_root), captions)


def _from_hub(data_root: Path | None) -> Listing:
    try:
        return read_hub_dataset(HUB_DATASET)
    except UserError as error:
        tried = "no data root is given" if data_root is None else f"{data_root / 'ade20k'} is not there"
        raise UserError([f"ade20k: {tried}, and {problem}" for problem in error.problems]) from error


def _in_data_root(name: str, data_root: Path | None, folder: str | None = None) -> Path:
    """Return DATA/NAME, or DATA/FOLDER."""
    folder = folder or name
    if data_root is None:
        raise UserError(f"{name}: point --data-root or ETHERDIFF_DATA at a folder DATA that holds DATA/{folder}")
    if not (data_root / folder).is_dir():
        raise UserError(f"{name}: {data_root / folder} is not there")
    return data_root / folder


def _described(listing: Listing, captions: Path | None) -> Listing:
    """Put the captions of a file in place of the dataset's own; images that it lacks have none."""
    if captions is not None:
        listing.describe([captions])
    return listing


def _settle_controls(signal: Signal, listing: Listing) -> None:
    """Complete the control files that there are, and report those that are missing for good."""
    if not signal.can_derive():
        for split, row in listing.rows():
            if row.control is None:
                listing.report(f"images without a control ({signal.name})", f"{split}/{row.name}")
        for rows in (listing.training, listing.evaluation):
            rows[:] = [row for row in rows if row.control is not None]
    listing.change(lambda row: _completed(signal, row))


def _completed(signal: Signal, row: Row) -> Row:
    try:
        return row if row.control is None else replace(row, control=signal.completed(row.control, row.image))
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
            control = folder / content[:2] / f"{content}{signal.suffix}"
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
    listing.change(lambda row: replace(row, control=row.control or found[row.image]))


def _pairs(rows: list[Row]) -> tuple[Pair, ...]:
    """Return pairs of the rows that have their control and their caption."""
    return tuple(
        Pair(row.name, row.image, row.control, row.text) for row in rows if row.control is not None and row.text is not None
    )


@dataclass(frozen=True)
class Report:
    """What a dataset holds, and all that is wrong with it."""

    name: str
    signal: str
    pairs: dict[str, int]
    """Of each split."""
    problems: dict[str, list[str]]
    """What is wrong, and where."""
    notes: dict[str, list[str]]
    """What need not be wrong: training goes on with it."""
    classes: dict[str, float] | None
    """Share of each class, and of none, in all pixels; None for signals without classes."""

    def as_json(self) -> dict[str, Any]:
        """Return the report; of each problem its count and its cases."""
        return {
            "name": self.name,
            "signal": self.signal,
            "good": not self.problems,
            "pairs": self.pairs,
            "problems": {kind: {"count": len(cases), "cases": cases} for kind, cases in self.problems.items()},
            "notes": {kind: {"count": len(cases), "cases": cases} for kind, cases in self.notes.items()},
            "classes": self.classes,
        }

    def sentences(self) -> list[str]:
        """Return each problem with its count and its first few cases."""
        return [f"{self.name}: {sentence}" for sentence in sentences(self.problems)]


def check_dataset(
    name: str,
    data_root: Path | None,
    *,
    signal: str | None = None,
    palette: str | None = None,
    captions: Path | None = None,
) -> Report:
    """Read every image and every control of a dataset. UserError where nothing can be listed."""
    chosen, listing = list_dataset(name, data_root, signal, palette, captions)
    found = inspect_rows(chosen, listing, f"reading {Path(name).name}")
    for split, row in listing.rows():
        if row.text is None:
            listing.report("images without a caption (--make-captions has BLIP describe them)", f"{split}/{row.name}")
    if not listing.training and not listing.problems:
        listing.report("splits without a pair", "training")
    problems = {**listing.problems, **found.problems, **found.doubts}
    left_out = {"folders of which something is left out": listing.left_out} if listing.left_out else {}
    pairs = {"training": len(listing.training), "evaluation": len(listing.evaluation)}
    return Report(name, chosen.name, pairs, problems, {**found.notes, **left_out}, chosen.shares(found.counts))


def render(report: Report) -> Table:
    """Render the report for the terminal: counts, what is wrong, what to know, the commonest classes first."""
    table = Table(title=f"{report.name} ({report.signal})", show_header=False)
    for split, count in report.pairs.items():
        table.add_row(f"pairs, {split}", f"{count:,}")
    for kind, found in (("wrong", report.problems), ("note", report.notes)):
        for sentence in sentences(found):
            table.add_row(kind, sentence)
    for name, share in sorted((report.classes or {}).items(), key=lambda item: -item[1]):
        table.add_row(name, f"{share:8.3%}  {'█' * round(40 * share)}")
    return table
