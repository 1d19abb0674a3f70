"""How datasets are laid out on the disk: one file per layout, each of which lists what it finds and what is wrong with it."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from etherdiff.control.captions import match_captions, read_captions
from etherdiff.images.reading import describe_left_out, walk_images
from etherdiff.system.text import counted

MAX_EXAMPLES = 5


@dataclass(frozen=True)
class Row:
    """One image; its control and its caption where the dataset has them."""

    name: str
    image: Path
    control: Path | None
    text: str | None


@dataclass
class Listing:
    """Everything found in a dataset, good or bad."""

    training: list[Row] = field(default_factory=list)
    evaluation: list[Row] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    """What is wrong, and where: "images without a label map" -> their names."""
    left_out: list[str] = field(default_factory=list)
    """What is there and not used, and where: "images/training: 1 folder with 4 images"."""

    def report(self, kind: str, where: str) -> None:
        """Note one more case of a kind of problem."""
        self.problems.setdefault(kind, []).append(where)

    def note_left_out(self, root: Path, *folders: str) -> None:
        """Note what `list_images` leaves out of folders in `root`."""
        found = {folder: describe_left_out(root / folder) for folder in folders}
        self.left_out += [f"{folder}: {others}" for folder, others in found.items() if others]

    def note_unnamed(self, root: Path) -> None:
        """Note the images in a folder and below that no row names."""
        files = [path for _, row in self.rows() for path in (row.image, row.control) if path is not None]
        named = {os.path.normpath(path) for path in files}
        places = Counter(path.parent for path in walk_images(root) if os.path.normpath(path) not in named)
        for place, count in sorted(places.items()):
            self.left_out.append(f"{place.relative_to(root)}: {counted(count, 'image')} not named in metadata")

    def change(self, row: Callable[[Row], Row]) -> None:
        """Replace every row."""
        self.training, self.evaluation = [row(one) for one in self.training], [row(one) for one in self.evaluation]

    def describe(self, files: Sequence[Path]) -> None:
        """Put the captions of these files in place of the rows' own; an image that they lack has none.

        Raises:
            UserError: a file is no caption file, or which caption is whose is not clear.
        """
        captions = [caption for file in files for caption in read_captions(file)]
        texts = match_captions(captions, [row.image for _, row in self.rows()])
        self.change(lambda row: replace(row, text=texts.get(row.image) or None))

    def report_twins(self, kind: str, root: Path, paths: Iterable[Path]) -> None:
        """Note files of one folder that only their suffixes tell apart."""
        stems: dict[str, Path] = {}
        for path in paths:
            if (first := stems.setdefault(path.stem, path)) != path:
                self.report(f"{kind} that only their suffixes tell apart", f"{first.relative_to(root)} and {path.name}")

    def rows(self) -> list[tuple[str, Row]]:
        """Return (split, row) of everything."""
        return [("training", row) for row in self.training] + [("evaluation", row) for row in self.evaluation]


def sentences(problems: dict[str, list[str]]) -> list[str]:
    """Return each kind with its count and its first few cases."""
    return [
        f"{kind}: {len(cases)} ({', '.join(cases[:MAX_EXAMPLES])}{', …' if len(cases) > MAX_EXAMPLES else ''})"
        for kind, cases in problems.items()
    ]
