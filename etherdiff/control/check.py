"""etherdiff data check: what is wrong with a dataset, before anything is trained on it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from etherdiff.control.datasets import list_dataset
from etherdiff.control.readers import Listing, Row, sentences
from etherdiff.control.signals.signal import Signal
from etherdiff.images.reading import UnreadableImage, is_nearly_black, read_image
from etherdiff.system.files import file_hash
from etherdiff.system.terminal import in_threads

TOKENS = 77
"""What Stable Diffusion's text encoder reads of a caption, its start and end included."""


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


@dataclass(frozen=True)
class _Reading:
    """What was found in the files of one row."""

    problems: tuple[tuple[str, str], ...]
    content: str | None
    """The image's hash."""
    count: Any
    """What `signal.count` found in the control; None where that is not good."""
    black: bool
    """Whether the image is nearly black."""


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
    rows = listing.rows()
    readings = in_threads(lambda item: _read(chosen, *item), rows, f"reading {Path(name).name}")
    for reading in readings:
        for kind, where in reading.problems:
            listing.report(kind, where)
    contents = [reading.content for reading in readings]
    _find_duplicates(rows, contents, listing)
    _find_silent(rows, listing)
    counts = [reading.count for reading in readings]
    for kind, found in chosen.odd(counts).items():
        for place, what in found:
            split, row = rows[place]
            listing.report(kind, f"{split}/{row.name}: {what}")
    if not listing.training and not listing.problems:
        listing.report("splits without a pair", "training")
    pairs = {"training": len(listing.training), "evaluation": len(listing.evaluation)}
    notes = _long_captions(rows) | chosen.rare(counts[: len(listing.training)])
    dark = [f"{split}/{row.name}" for (split, row), reading in zip(rows, readings, strict=True) if reading.black]
    kinds = {"folders of which something is left out": listing.left_out, "images that are nearly black as read here": dark}
    notes |= {kind: cases for kind, cases in kinds.items() if cases}
    return Report(name, chosen.name, pairs, listing.problems, notes, chosen.shares(counts))


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


def _read(signal: Signal, split: str, row: Row) -> _Reading:
    where = f"{split}/{row.name}"
    problems: list[tuple[str, str]] = []
    content = size = count = None
    black = False
    try:
        content = file_hash(row.image)
        image = read_image(row.image)
        size, black = image.size, is_nearly_black(image)
    except (UnreadableImage, OSError) as error:
        problems.append(("images that cannot be read", f"{where}: {getattr(error, 'why', error)}"))
    if row.control is not None:
        found = signal.problems(row.control)
        problems += [("controls that are not good", f"{where}: {problem}") for problem in found]
        if not found:
            count, other = signal.count(row.control), signal.size(row.control)
            if size is not None and other not in (None, size):
                what = f"{where}: {_text(other)}, image {_text(size)}"
                problems.append(("controls of another size than their image", what))
    return _Reading(tuple(problems), content, count, black)


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _find_duplicates(rows: list[tuple[str, Row]], contents: list[str | None], listing: Listing) -> None:
    first: dict[str, tuple[str, str]] = {}
    for (split, row), content in zip(rows, contents, strict=True):
        if content is None:
            continue
        if content not in first:
            first[content] = (split, row.name)
            continue
        earlier = first[content]
        kind = "the same image twice" if earlier[0] == split else "the same image in training and evaluation"
        listing.report(kind, f"{earlier[0]}/{earlier[1]} and {split}/{row.name}")


def _find_silent(rows: list[tuple[str, Row]], listing: Listing) -> None:
    for split, row in rows:
        if row.text is None:
            listing.report("images without a caption (--make-captions has BLIP describe them)", f"{split}/{row.name}")


def _long_captions(rows: list[tuple[str, Row]]) -> dict[str, list[str]]:
    from transformers import CLIPTokenizer

    from etherdiff.families.bases import shipped_config

    captions = [(f"{split}/{row.name}", row.text) for split, row in rows if row.text is not None]
    if not captions:
        return {}
    tokenizer = CLIPTokenizer.from_pretrained(shipped_config("sd15") / "tokenizer")
    tokens = tokenizer([text for _, text in captions], truncation=False, verbose=False).input_ids
    long = [f"{where}: {len(ids)}" for (where, _), ids in zip(captions, tokens, strict=True) if len(ids) > TOKENS]
    return {f"captions whose end is not read, being longer than {TOKENS} tokens": long} if long else {}
