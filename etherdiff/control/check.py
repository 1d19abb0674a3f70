"""etherdiff data check: what is wrong with a dataset, before anything is trained on it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from etherdiff.control.datasets import list_dataset
from etherdiff.control.inspection import inspect_rows
from etherdiff.control.readers import sentences


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
