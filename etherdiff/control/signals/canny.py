"""Canny edges, as ControlNet's detector finds them: OpenCV's, on the colours, at thresholds 100 and 200."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from etherdiff.control.signals.annotation import STEP, annotate
from etherdiff.control.signals.signal import Signal, crop_box
from etherdiff.images.reading import read_image, resize_and_crop
from etherdiff.system.errors import UserError
from etherdiff.system.files import staged_file

LOW, HIGH = 100.0, 200.0
"""Hysteresis thresholds on the gradient's magnitude: an edge starts above the higher and goes on above the lower."""
_WHITE = 128
_MAX_GREY = 0.25  # of the pixels: what scaling and JPEG leave around lines is less


def edges(image: NDArray[np.uint8], low: float = LOW, high: float = HIGH) -> NDArray[np.bool_]:
    """Return where an RGB image (H, W, 3) has edges: (H, W). UserError where controlnet-aux cannot be imported."""
    if not any(length % STEP for length in image.shape[:2]):
        return annotate("canny", image, low, high)[..., 0] > 0
    import cv2  # what controlnet-aux calls, after it has scaled the image to a multiple of STEP

    return np.asarray(cv2.Canny(np.ascontiguousarray(image), low, high)) > 0


@dataclass(frozen=True)
class Canny(Signal):
    """Control files are pictures with white edges on black.

    Those made here are of the square, at the resolution, that is trained on: scaling would blur or drop thin lines.
    """

    resolution: int = 512
    low: float = LOW
    high: float = HIGH

    name: ClassVar[str] = "canny"
    suffix: ClassVar[str | None] = ".png"

    @classmethod
    def choose(cls, palette: str | None, resolution: int) -> Self:
        return cls(resolution)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        return cls(settings["resolution"], settings["low"], settings["high"])

    def picture(self, control: Path, resolution: int) -> NDArray[np.uint8]:
        """Return white edges on black: (resolution, resolution, 3)."""
        lines = self.target(control, resolution).astype(np.uint8) * np.uint8(255)
        return np.repeat(lines[..., None], 3, axis=2)

    def target(self, control: Path, resolution: int) -> NDArray[np.bool_]:
        """Return where the edges are: (resolution, resolution). Shrunk, a pixel is an edge if any in it was."""
        lines = Image.fromarray((_grey(control) >= _WHITE).astype(np.float32))
        size = (resolution, resolution)
        return np.asarray(lines.resize(size, Image.Resampling.BOX, box=crop_box(lines.size, resolution))) > 1e-6

    def problems(self, control: Path) -> list[str]:
        """Find what is unreadable, or something else than white lines on black."""
        try:
            grey = _grey(control)
        except UserError as error:
            return error.problems
        between, white = float(((grey > 32) & (grey < 223)).mean()), float((grey >= _WHITE).mean())
        if between > _MAX_GREY:
            return [f"not an edge map: {between:.0%} of its pixels are grey"]
        return [f"not white lines on black: {white:.0%} of it is white"] if white > 0.5 else []

    def settings(self) -> dict[str, Any]:
        """Return the thresholds, and the resolution that edges are looked for at."""
        return {"signal": self.name, "low": self.low, "high": self.high, "resolution": self.resolution}

    def derive(self, image: Path, control: Path) -> None:
        """Write the edges of an image's square as a PNG, whole or not at all. UserError where it cannot be read."""
        square = resize_and_crop(read_image(image), self.resolution)
        found = edges(np.asarray(square), self.low, self.high)
        with staged_file(control) as staged:
            Image.fromarray(found.astype(np.uint8) * np.uint8(255)).save(staged, format="PNG")


def _grey(control: Path) -> NDArray[np.uint8]:
    return np.asarray(read_image(control).convert("L"))
