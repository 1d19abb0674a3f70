"""HTML from templates in which every value is escaped, so that no prompt or name can become markup; and embedded images."""

import base64
import io
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from etherdiff.images.reading import UnreadableImage, read_image
from etherdiff.system.text import counted, score

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy: nothing is fetched, and no script runs."""
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # not allowed in HTML or in UTF-8


def render(template: str, **values: Any) -> str:
    """Render a template of the folder `templates`."""
    return environment().get_template(template).render(values)


@cache
def environment() -> Environment:
    """Return the templates' environment, with the filters that they use."""
    made = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_fit,
        loader=PackageLoader("etherdiff.report"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["policy"] = POLICY
    made.filters |= {"foreign": foreign, "score": score, "counted": counted}
    return made


def foreign(value: object) -> Any:
    """Isolate the direction of text that users wrote: right-to-left letters do not reorder the text around them."""
    return parts().foreign(value)


def parts() -> Any:
    """Return the macros of `parts.html.j2`, whose values are markup."""
    return environment().get_template("parts.html.j2").module


def _fit(value: object) -> object:
    """Remove the characters that HTML must not contain; None becomes empty, markup stays."""
    if hasattr(value, "__html__"):
        return value
    return "" if value is None else _UNFIT.sub("�", str(value))


# --- Images -----------------------------------------------------------------------------------------------------------


BUDGET = 12_000_000
"""Maximum characters of all images in the page."""
SIDES = (320, 224, 160, 112)
"""Possible longest sides of thumbnails in pixels."""
SMALL = 128
"""Maximum side in pixels of images that are embedded unchanged, as PNG, and shown pixelated."""
QUALITY = 82
_TYPICAL = 0.35  # characters of the page per pixel of a JPEG: base64 of a quarter of a byte


@dataclass(frozen=True)
class Thumbnail:
    """An image, or the reason why there is none."""

    alt: str
    source: str = ""
    """data: URL; empty if the image is not shown."""
    width: int = 0
    height: int = 0
    is_pixelated: bool = False
    why_not: str = ""
    badge: str = ""
    """Text on the image."""


class Album:
    """Turns files into thumbnails, of a side that the expected number of images has room for.

    If images are larger than is typical, those beyond the budget are named instead of shown.
    """

    def __init__(self, expected: int, budget: int = BUDGET) -> None:
        self.budget = budget
        self.spent = 0
        self.not_shown = 0
        fitting = (side for side in SIDES if expected * side * side * _TYPICAL <= budget)
        self.side = next(fitting, SIDES[-1])

    def picture(self, path: Path, alt: str, side: int | None = None, badge: str = "") -> Thumbnail:
        """Read an image; `side` is its longest side in pixels, if it differs from the album's."""
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
    """Return file and kind of an RGB image, without the file's metadata; the image is shrunk in place."""
    file = io.BytesIO()
    if max(image.size) <= SMALL:
        Image.frombytes("RGB", image.size, image.tobytes()).save(file, "PNG", optimize=True)
        return file.getvalue(), "png"
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    Image.frombytes("RGB", image.size, image.tobytes()).save(file, "JPEG", quality=QUALITY, optimize=True)
    return file.getvalue(), "jpeg"
