"""Semantic segmentation: a map of classes, shown in the colours of a palette (ADE20K's, the tiny world's, or a file's)."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from etherdiff.system.terminal import in_threads
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
_GREY_MODES = ("1", "L", "P")  # whose values may be colours as well
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
    path = Path(named)
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


@dataclass(frozen=True)
class _Stored:
    """An image file's pixels as they are stored."""

    mode: str
    values: NDArray[Any]
    colours: NDArray[np.uint8] | None
    """(H, W, 3): of a picture, and what a palette or a grey stands for."""
    opacity: NDArray[Any] | None = None
    """Of a picture that is not opaque."""
    lossy: str = ""
    """Name of the format, where it changes values."""


def _stored(file: Path | BytesIO) -> _Stored:
    with Image.open(file, formats=_FORMATS) as opened:
        lossy = _lossy_format(opened, file)
        is_opaque_grey = opened.mode == "LA" and opened.getchannel("A").getextrema() == (255, 255)
        image: Image.Image = opened.getchannel("L") if is_opaque_grey else opened
        if image.mode in _VALUE_MODES:
            colours = np.asarray(image.convert("RGB")) if image.mode in _GREY_MODES else None
            return _Stored(image.mode, np.asarray(image), colours, lossy=lossy)
        rgba = np.asarray(image.convert("RGBA"))
        opacity = rgba[..., 3] if image.has_transparency_data and (rgba[..., 3] < 255).any() else None
        return _Stored(image.mode, rgba, rgba[..., :3], opacity, lossy)


def _lossy_format(image: Image.Image, file: Path | BytesIO) -> str:
    """Return the name of a format that changes values; empty for others."""
    if image.format in ("JPEG", "MPO"):
        return "JPEG"
    if image.format == "TIFF" and image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp"):
        return "TIFF with lossy compression"
    if image.format == "WEBP":
        content = file.getvalue() if isinstance(file, BytesIO) else file.read_bytes()
        start = 12  # chunks follow: their type, their size, and as many bytes, padded to an even number
        while start < len(content):
            if content[start : start + 4] == b"VP8 ":
                return "lossy WebP"
            size = int.from_bytes(content[start + 4 : start + 8], "little")
            start += 8 + size + size % 2
    return ""


def _values(control: Path) -> set[int] | None:
    """Return the greys of a map of one channel; None of anything else, and where it cannot be read."""
    try:
        stored = despite_text(_stored, control)
    except Exception:  # Pillow's decoders raise nearly anything on damaged files; `read` says so
        return None
    shown = stored.values[..., None] if stored.colours is None else stored.colours
    is_grey = stored.mode not in _COLOUR_MODES and (shown == shown[..., :1]).all()
    return set(np.unique(shown[..., 0]).tolist()) if is_grey else None


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
    greys: bool = False
    """Whether maps of one channel hold the palette's greys, as masks of 0 and 255 do, and no label values."""

    name: ClassVar[str] = "segmentation"
    has_palette: ClassVar[bool] = True

    @classmethod
    def choose(cls, palette: str | None, resolution: int) -> Self:
        return cls(find_palette(palette or "ade20k"))

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        return cls(Palette.from_json(settings["palette"]), settings.get("greys", False))

    def settled(self, controls: Sequence[Path]) -> Self:
        """Read masks: where every map's values are greys of the palette, and not all of them are label values, colours count.

        Only palettes of files with such greys are looked for in the maps.
        """
        classes = len(self.palette.classes)
        greys = {colour[0] for colour in self.palette.colours if len(set(colour)) == 1}
        if IGNORED not in self.palette.ignored or max(greys, default=0) < classes:
            return self
        found = in_threads(_values, controls, "values of the label maps")
        every = set().union(*(values for values in found if values is not None))
        return replace(self, greys=every <= greys and max(every, default=0) >= classes)

    def read(self, control: Path) -> LabelMap:
        """Return the map at its own size. UserError where there is none to read."""
        try:
            stored = despite_text(_stored, control)
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            raise UserError(f"{control}: cannot be read as an image ({str(error) or type(error).__name__})") from error
        if stored.mode not in (*_VALUE_MODES, *_COLOUR_MODES):
            mode = stored.mode
            raise UserError(f"{control}: mode {mode} is neither a label map (one channel of integers) nor a picture (RGB)")
        found = self._interpret(stored)
        problems = found.problems
        if not problems and self.palette.first == 0 and (found.labels == IGNORED).all():  # ADE20K's 0 is anything else
            problems = (f"none of its pixels belongs to a class of {self.palette.name}",)
        if stored.lossy:
            problems += (f"{stored.lossy} changes the values where classes meet: save label maps as PNG",)
        return LabelMap(found.labels, problems)

    def labels(self, control: Path) -> NDArray[np.uint8]:
        """Return indices of classes (H, W), `IGNORED` where there is none. UserError where pixels are of no class."""
        found = self.read(control)
        if found.problems:
            raise UserError([f"{control}: {problem}" for problem in found.problems])
        return found.labels

    def picture(self, control: Path, resolution: int) -> NDArray[np.uint8]:
        """Return the classes' colours, black where a pixel belongs to none: (resolution, resolution, 3)."""
        return self._paint(crop_labels(self.labels(control), resolution))

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
        greys = {"greys": True} if self.greys else {}  # so that earlier runs keep their identity
        return {"signal": self.name, "palette": self.palette.as_json(), "palette_sha256": self.palette.digest(), **greys}

    def count(self, control: Path) -> dict[str, int]:
        """Count the pixels of each class by its index, and those of none by `IGNORED`."""
        counts = np.bincount(self.labels(control).ravel())
        return {str(label): int(counts[label]) for label in np.flatnonzero(counts)}

    def rare(self, counts: Sequence[Any]) -> dict[str, list[str]]:
        """Find classes that occur in no map."""
        found = {int(label) for count in counts for label in count or ()}
        missing = [name for index, name in enumerate(self.palette.classes) if index not in found]
        return {"classes that occur in no map to train on": missing} if missing and found else {}

    def shares(self, counts: Sequence[Any]) -> dict[str, float] | None:
        known = [count for count in counts if count is not None]
        if not known:
            return None
        total: Counter[str] = Counter()
        for count in known:
            total.update(count)
        shares = {name: total[str(index)] / total.total() for index, name in enumerate(self.palette.classes)}
        return shares | ({"none": total[str(IGNORED)] / total.total()} if total[str(IGNORED)] else {})

    def _paint(self, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        colours = np.zeros((IGNORED + 1, 3), np.uint8)
        colours[: len(self.palette.colours)] = self.palette.colours
        return colours[labels]

    def _interpret(self, stored: _Stored) -> LabelMap:
        if stored.colours is None or (stored.mode in ("1", "L") and not self.greys):
            return self._from_values(stored.values.astype(np.int64))
        by_colour = self._from_colours(stored.colours.astype(np.int64))
        if stored.opacity is not None:
            return self._with_transparency(by_colour, stored.opacity)
        if stored.mode in _COLOUR_MODES or self.greys:
            return by_colour
        return self._from_indices(stored.values.astype(np.int64), stored.colours, by_colour)

    def _from_indices(self, indices: NDArray[np.int64], colours: NDArray[np.uint8], by_colour: LabelMap) -> LabelMap:
        """Return what an image with a palette of its own holds: programs that make one of a picture number colours anyhow."""
        by_index = self._from_values(indices)
        if by_colour.problems or (by_colour.labels == IGNORED).all():
            return by_index
        if by_index.problems:
            return by_colour
        has_class = by_index.labels != IGNORED
        is_shown = (self._paint(by_index.labels) == colours).all(axis=-1)
        if np.where(has_class, is_shown, by_colour.labels == IGNORED).all():
            return by_index
        return LabelMap(
            by_index.labels, ("its indices and its colours say different classes: save it as greys (label values) or as RGB",)
        )

    def _with_transparency(self, found: LabelMap, opacity: NDArray[Any]) -> LabelMap:
        """Take what is transparent for none, where there is none and no class's colour lies below."""
        clear = opacity == 0
        if self.palette.ignored and not (opacity[~clear] < 255).any() and (found.labels[clear] == IGNORED).all():
            return found
        return LabelMap(found.labels, (f"{(opacity < 255).sum()} transparent pixels, whose class is unclear: save it opaque",))

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
