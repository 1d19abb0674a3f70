"""Semantic segmentation: a map of classes, shown in the colours of a palette (ADE20K's, the tiny world's, or a file's)."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from etherdiff.control.signals.signal import Signal, crop_labels
from etherdiff.images.reading import despite_text
from etherdiff.system.errors import UserError
from etherdiff.system.files import ASSETS
from etherdiff.system.text import read_user_json

ADE20K = ASSETS / "ade20k.json"
"""The 150 classes of ADE20K's scene parsing benchmark, in the order of its label values 1 to 150 (0 is anything else), and
mmsegmentation's colours of them, which ControlNet's annotators draw too.

Road and skyscraper share a colour, so that a coloured map's skyscrapers are read as road; label maps distinguish them.
"""
IGNORED = 255
"""What a pixel that belongs to no class is in a target, whatever it is in the file."""
MAX_CLASSES = 255
_Colour = tuple[int, int, int]
_VALUE_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
_COLOUR_MODES = ("RGB", "RGBA")
_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG")
_EXAMPLES = 5


@dataclass(frozen=True)
class Palette:
    """The classes of a dataset, their colours, and the values that they have in its label maps."""

    name: str
    classes: tuple[str, ...]
    colours: tuple[_Colour, ...]
    """RGB of each class."""
    first: int = 0
    """The label value of class 0; the others count up."""
    ignored: tuple[int, ...] = (IGNORED,)
    """Label values of pixels that belong to no class."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Palette":
        """Return the palette whose `as_json()` this is. KeyError or TypeError where it is none."""
        classes, ignored = tuple(content["classes"]), tuple(content["ignored"])
        colours = tuple(tuple(colour) for colour in content["colours"])
        return cls(**{**content, "classes": classes, "ignored": ignored, "colours": colours})

    def as_json(self) -> dict[str, Any]:
        """Return everything of it, JSON-able."""
        return json.loads(json.dumps(asdict(self)))

    def digest(self) -> str:
        """Return the SHA-256 of what decides pictures and targets: everything but the name."""
        return hashlib.sha256(json.dumps({**self.as_json(), "name": None}, sort_keys=True).encode()).hexdigest()


def find_palette(named: str) -> Palette:
    """Find ade20k, tiny, or a JSON file: [[r, g, b], …] or {"class": [r, g, b], …}, in the order of the label values.

    Raises:
        UserError: neither a name nor a file, or not a palette.
    """
    if named == "ade20k":
        colours = json.loads(ADE20K.read_text(encoding="utf-8"))
        return Palette("ade20k", tuple(colours), tuple(map(_colour, colours.values())), first=1, ignored=(0,))
    if named == "tiny":
        from etherdiff.tiny.world import CLASSES, PALETTE

        return Palette("tiny", CLASSES, tuple(map(_colour, PALETTE.tolist())), ignored=())
    path = Path(named).expanduser()
    if not path.is_file():
        raise UserError(
            f'palette {named}: neither ade20k nor tiny nor a file; give a JSON file like {{"sky": [0, 90, 250], …}}'
        )
    return _from_content(path, read_user_json(path))


def _from_content(path: Path, content: Any) -> Palette:
    colours = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(colours, list) or not colours or not all(map(_is_colour, colours)):
        raise UserError(f'palette {path}: must be [[r, g, b], …] or {{"class": [r, g, b], …}} with integers from 0 to 255')
    if len(colours) > MAX_CLASSES:
        raise UserError(f"palette {path}: {len(colours)} classes, but {MAX_CLASSES} at most can be told apart")
    classes = tuple(content) if isinstance(content, dict) else tuple(f"class {index}" for index in range(len(colours)))
    palette = Palette(path.stem, classes, tuple(map(_colour, colours)))
    twice = [str(list(colour)) for colour, count in Counter(palette.colours).items() if count > 1]
    if twice:
        raise UserError(f"palette {path}: {', '.join(twice)} is the colour of more than one class")
    return palette


def _stored(file: Path | BytesIO) -> tuple[str, NDArray[Any]]:
    """Return an image's mode, and its pixels as they are stored."""
    with Image.open(file, formats=_FORMATS) as image:
        return image.mode, np.asarray(image)


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(part) is int and 0 <= part <= 255 for part in value)


def _colour(values: list[int]) -> _Colour:
    red, green, blue = values
    return red, green, blue


@dataclass(frozen=True)
class LabelMap:
    """What a label map holds."""

    labels: NDArray[np.uint8]
    """(H, W): indices of classes, `IGNORED` where there is none."""
    problems: tuple[str, ...]
    """What in it belongs to no class and is not to be ignored either."""


@dataclass(frozen=True)
class Segmentation(Signal):
    """Control files are label maps (greys or palette indices, 8 or 16 bits), or pictures in the palette's colours."""

    palette: Palette

    name: ClassVar[str] = "segmentation"
    has_palette: ClassVar[bool] = True

    @classmethod
    def choose(cls, palette: str | None, resolution: int) -> Self:
        return cls(find_palette(palette or "ade20k"))

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        return cls(Palette.from_json(settings["palette"]))

    def read(self, control: Path) -> LabelMap:
        """Return the map at its own size. UserError where there is none to read."""
        try:
            mode, pixels = despite_text(_stored, control)
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            raise UserError(f"{control}: cannot be read as an image ({str(error) or type(error).__name__})") from error
        if mode in _VALUE_MODES:
            return self._from_values(pixels.astype(np.int64))
        if mode in _COLOUR_MODES:
            return self._from_colours(pixels[..., :3].astype(np.int64))
        raise UserError(f"{control}: mode {mode} is neither a label map (one channel of integers) nor a picture (RGB)")

    def labels(self, control: Path) -> NDArray[np.uint8]:
        """Return indices of classes (H, W), `IGNORED` where there is none. UserError where pixels are of no class."""
        found = self.read(control)
        if found.problems:
            raise UserError([f"{control}: {problem}" for problem in found.problems])
        return found.labels

    def picture(self, control: Path, resolution: int) -> NDArray[np.uint8]:
        """Return the classes' colours, black where a pixel belongs to none: (resolution, resolution, 3)."""
        colours = np.zeros((IGNORED + 1, 3), np.uint8)
        colours[: len(self.palette.colours)] = self.palette.colours
        return colours[crop_labels(self.labels(control), resolution)]

    def target(self, control: Path, resolution: int) -> NDArray[np.int64]:
        """Return (resolution, resolution) indices of classes, 255 where a pixel is to be ignored."""
        return crop_labels(self.labels(control), resolution).astype(np.int64)

    def problems(self, control: Path) -> list[str]:
        """Find what is unreadable; label values, or colours, that are not the palette's."""
        try:
            return list(self.read(control).problems)
        except UserError as error:
            return error.problems

    def settings(self) -> dict[str, Any]:
        """Return the palette, whole, so that a run can be used where its palette file is not."""
        return {"signal": self.name, "palette": self.palette.as_json(), "palette_sha256": self.palette.digest()}

    def count(self, control: Path) -> NDArray[np.int64]:
        """Count the pixels of each class and, last, of none."""
        return np.bincount(self.labels(control).ravel(), minlength=IGNORED + 1)

    def shares(self, counts: Sequence[Any]) -> dict[str, float] | None:
        known = [count for count in counts if count is not None]
        if not known:
            return None
        total = np.sum(known, axis=0)
        shares = {name: float(count / total.sum()) for name, count in zip(self.palette.classes, total, strict=False)}
        return shares | ({"none": float(total[IGNORED] / total.sum())} if total[IGNORED] else {})

    def _from_values(self, values: NDArray[np.int64]) -> LabelMap:
        first, last = self.palette.first, self.palette.first + len(self.palette.classes) - 1
        wrong = (values < first) | (values > last)
        labels = np.where(wrong, IGNORED, values - first).astype(np.uint8)
        found, counts = np.unique(values[wrong & ~np.isin(values, self.palette.ignored)], return_counts=True)
        if not len(found):
            return LabelMap(labels, ())
        examples = _examples([f"{value} ({count} pixels)" for value, count in zip(found, counts, strict=True)])
        ignored = "".join(f", and {value} for none" for value in self.palette.ignored)
        return LabelMap(
            labels, (f"label values outside {self.palette.name}, which has {first} to {last}{ignored}: {examples}",)
        )

    def _from_colours(self, pixels: NDArray[np.int64]) -> LabelMap:
        known = _code(np.array(self.palette.colours, np.int64))
        order = np.argsort(known, kind="stable")  # of two classes of one colour, the first
        codes = _code(pixels)
        place = np.minimum(np.searchsorted(known[order], codes), len(known) - 1)
        inside = known[order][place] == codes
        labels = np.where(inside, order[place], IGNORED).astype(np.uint8)
        black_is_none = codes == 0 if self.palette.ignored else np.zeros_like(inside)
        found, counts = np.unique(codes[~inside & ~black_is_none], return_counts=True)
        if not len(found):
            return LabelMap(labels, ())
        most = np.argsort(-counts, kind="stable")
        examples = _examples([f"{_triple(found[i])} ({counts[i]} pixels)" for i in most])
        return LabelMap(labels, (f"{len(found)} colours outside {self.palette.name}: {examples}",))


def _code(colours: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return one number for each colour (…, 3); black's is 0."""
    return colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]


def _triple(code: int) -> tuple[int, int, int]:
    return int(code) >> 16, int(code) >> 8 & 255, int(code) & 255


def _examples(values: list[str]) -> str:
    return ", ".join(values[:_EXAMPLES]) + (", …" if len(values) > _EXAMPLES else "")
