"""What a control signal is: a file that goes with an image and says where things are. One signal per file in this folder."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from etherdiff.images.reading import IMAGE_SUFFIXES, crop_window, despite_text
from etherdiff.system.errors import UserError

Size = tuple[int, int]
"""(width, height) in pixels."""
_EXIF_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)  # orientations that swap width and height


class Signal(ABC):
    """One kind of control. Every method brings its file to a square as images are brought: scaled, then cut in the middle."""

    name: ClassVar[str]
    has_palette: ClassVar[bool] = False
    suffixes: ClassVar[tuple[str, ...]] = IMAGE_SUFFIXES
    """Suffixes, in lower case, of control files."""
    suffix: ClassVar[str | None] = None
    """Suffix of the control files that can be computed from images; None where they cannot."""

    @classmethod
    @abstractmethod
    def choose(cls, palette: str | None, resolution: int) -> Self:
        """Return the signal as a dataset's options ask for it; resolution: that missing controls are computed at."""

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Return the signal whose `settings()` these are."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what decides pictures and targets besides the file: JSON-able, recorded with a run."""

    @abstractmethod
    def picture(self, control: Path, resolution: int) -> NDArray[np.uint8]:
        """Return what the hint encoder sees: (resolution, resolution, 3), RGB. UserError where the file is not this signal."""

    @abstractmethod
    def target(self, control: Path, resolution: int) -> NDArray[Any]:
        """Return what a generated image is compared with, at the same geometry: its form is the signal's own."""

    @abstractmethod
    def problems(self, control: Path) -> list[str]:
        """Return everything wrong with a control file, a sentence each; empty where it is good."""

    # --- Control files that a dataset lacks -------------------------------------------------------------------------

    def can_derive(self) -> bool:
        """Return whether `derive` makes control files here."""
        return self.suffix is not None

    def derive(self, image: Path, control: Path) -> None:
        """Make the control file of an image. UserError for signals that cannot be computed from an image."""
        raise UserError(f"{image} has no {self.name} beside it, and {self.name} cannot be computed from an image here")

    def settled(self, controls: Sequence[Path]) -> Self:
        """Return the signal as a dataset's control files are to be read, where one file alone does not say it."""
        return self

    def completed(self, control: Path, image: Path) -> Path:
        """Return the control file with everything it needs to know of its image. OSError where the image cannot be read."""
        return control

    # --- What `data check` finds in good control files --------------------------------------------------------------

    def size(self, control: Path) -> Size | None:
        """Return the size that must equal the image's; None where none must."""
        return despite_text(_size, control)

    def count(self, control: Path) -> Any:
        """Count in a file what `odd`, `rare` and `shares` look at; JSON-able."""
        return None

    def odd(self, counts: Sequence[Any]) -> dict[str, list[tuple[int, str]]]:
        """Return what is unusual: kind -> (place in `counts`, what it is). None counts for a file that is not good."""
        return {}

    def rare(self, counts: Sequence[Any]) -> dict[str, list[str]]:
        """Return what is in no file of those to train on: kind -> names. It need not be wrong."""
        return {}

    def shares(self, counts: Sequence[Any]) -> dict[str, float] | None:
        """Return the share of each class in all pixels; None where there are no classes."""
        return None


# --- Where the pixels of an image go when it is scaled and cut to a square -------------------------------------------


def crop_box(size: Size, resolution: int) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of the square, in pixels of an image of `size`.

    It is what `images.reading.resize_and_crop(image, resolution, "center")` scales to resolution x resolution.
    """
    scale = resolution / min(size)
    (left, right), (top, bottom) = (crop_window(length, scale, resolution, 0.5) for length in size)
    return left, top, right, bottom


def crop_labels(labels: NDArray[np.uint8], resolution: int) -> NDArray[np.uint8]:
    """Scale (H, W) to (resolution, resolution): of each pixel's middle, the label there."""
    image = Image.fromarray(labels)
    square = image.resize((resolution, resolution), Image.Resampling.NEAREST, box=crop_box(image.size, resolution))
    return np.asarray(square)


def _size(file: Path | BytesIO) -> Size:
    with Image.open(file) as image:
        return image.size


def upright_size(path: Path) -> Size:
    """Return the size as a viewer shows the image, from its header only. OSError where it cannot be read."""
    try:
        return despite_text(_upright_size, path)
    except (ValueError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from error


def _upright_size(file: Path | BytesIO) -> Size:
    with Image.open(file) as image:
        lying = image.getexif().get(_EXIF_ORIENTATION) in _LYING
        return (image.height, image.width) if lying else image.size
