"""Images inside the page, as small as they have to be for it to stay within its budget."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from etherdiff.images.reading import UnreadableImage, read_image

BUDGET = 12_000_000
"""Characters of the page that images may take."""
SIDES = (320, 224, 160, 112)
"""Longest sides in pixels that thumbnails come in."""
SMALL = 128
"""Images up to this side are kept to the pixel, as PNG, and shown in squares."""
QUALITY = 82
_TYPICAL = 0.35  # characters of the page per pixel of a JPEG: base64 of a quarter of a byte


@dataclass(frozen=True)
class Thumbnail:
    """An image, or why there is none."""

    alt: str
    source: str = ""
    """A data: address; empty where the image is not shown."""
    width: int = 0
    height: int = 0
    is_pixelated: bool = False
    why_not: str = ""
    badge: str = ""
    """What is written on the image."""


class Album:
    """Turns files into pictures. It is told how many will come, and chooses the side that all have room in.

    Should they be larger than is typical, what no longer fits is named instead of shown.
    """

    def __init__(self, expected: int, budget: int = BUDGET) -> None:
        self.budget = budget
        self.spent = 0
        self.not_shown = 0
        fitting = (side for side in SIDES if expected * side * side * _TYPICAL <= budget)
        self.side = next(fitting, SIDES[-1])

    def picture(self, path: Path, alt: str, side: int | None = None, badge: str = "") -> Thumbnail:
        """Read an image; `side` is its longest side in pixels, if not that of all."""
        try:
            image = read_image(path)
        except UnreadableImage as error:
            return Thumbnail(alt, why_not=f"unreadable: {error.why}", badge=badge)
        content, kind = _encode(image, side or self.side)
        source = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
        if self.spent + len(source) > self.budget:
            self.not_shown += 1
            return Thumbnail(alt, why_not="not shown", badge=badge)
        self.spent += len(source)
        return Thumbnail(alt, source, image.width, image.height, kind == "png", badge=badge)


def _encode(image: Image.Image, side: int) -> tuple[bytes, str]:
    """File and kind of an RGB image, without what its file may hold besides; it is shrunk in place."""
    file = io.BytesIO()
    if max(image.size) <= SMALL:
        Image.frombytes("RGB", image.size, image.tobytes()).save(file, "PNG", optimize=True)
        return file.getvalue(), "png"
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    Image.frombytes("RGB", image.size, image.tobytes()).save(file, "JPEG", quality=QUALITY, optimize=True)
    return file.getvalue(), "jpeg"
