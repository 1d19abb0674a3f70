"""Semantic segmentation: a map of classes, shown in its palette's colours."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from etherdiff.control.geometry import crop_labels
from etherdiff.control.palettes import IGNORED, Palette
from etherdiff.control.signal import Signal
from etherdiff.system.errors import UserError

_VALUE_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
_COLOUR_MODES = ("RGB", "RGBA")
_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG")
_EXAMPLES = 5


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

    def read(self, control: Path) -> LabelMap:
        """The map at its own size. UserError where there is none to read."""
        try:
            with Image.open(control, formats=_FORMATS) as image:
                mode, pixels = image.mode, np.asarray(image)
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            raise UserError(f"{control}: cannot be read as an image ({str(error) or type(error).__name__})") from error
        if mode in _VALUE_MODES:
            return self._from_values(pixels.astype(np.int64))
        if mode in _COLOUR_MODES:
            return self._from_colours(pixels[..., :3].astype(np.int64))
        raise UserError(f"{control}: mode {mode} is neither a label map (one channel of integers) nor a picture (RGB)")

    def labels(self, control: Path) -> NDArray[np.uint8]:
        """(H, W): indices of classes, `IGNORED` where there is none. UserError where pixels are of no class."""
        found = self.read(control)
        if found.problems:
            raise UserError([f"{control}: {problem}" for problem in found.problems])
        return found.labels

    def picture(self, control: Path, resolution: int) -> NDArray[np.uint8]:
        """The classes' colours, black where a pixel belongs to none: (resolution, resolution, 3)."""
        colours = np.zeros((IGNORED + 1, 3), np.uint8)
        colours[: len(self.palette.colours)] = self.palette.colours
        return colours[crop_labels(self.labels(control), resolution)]

    def target(self, control: Path, resolution: int) -> NDArray[np.int64]:
        """(resolution, resolution): indices of classes, 255 where a pixel is to be ignored."""
        return crop_labels(self.labels(control), resolution).astype(np.int64)

    def problems(self, control: Path) -> list[str]:
        """Unreadable; label values, or colours, that are not the palette's."""
        try:
            return list(self.read(control).problems)
        except UserError as error:
            return error.problems

    def settings(self) -> dict[str, Any]:
        """The palette, whole, so that a run can be used where its palette file is not."""
        return {"signal": self.name, "palette": self.palette.as_json(), "palette_sha256": self.palette.digest()}

    def _from_values(self, values: NDArray[np.int64]) -> LabelMap:
        first, last = self.palette.first, self.palette.first + len(self.palette.classes) - 1
        wrong = (values < first) | (values > last)
        labels = np.where(wrong, IGNORED, values - first).astype(np.uint8)
        found, counts = np.unique(values[wrong & ~np.isin(values, self.palette.ignored)], return_counts=True)
        if not len(found):
            return LabelMap(labels, ())
        examples = _examples([f"{value} ({count} pixels)" for value, count in zip(found, counts, strict=True)])
        beside = "".join(f", and {value} for none" for value in self.palette.ignored)
        return LabelMap(labels, (f"label values outside {self.palette.name}, which has {first} to {last}{beside}: {examples}",))

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
    """One number for each colour (…, 3); black's is 0."""
    return colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]


def _triple(code: int) -> tuple[int, int, int]:
    return int(code) >> 16, int(code) >> 8 & 255, int(code) & 255


def _examples(values: list[str]) -> str:
    return ", ".join(values[:_EXAMPLES]) + (", …" if len(values) > _EXAMPLES else "")
