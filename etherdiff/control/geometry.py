"""Where the pixels of an image go when it is scaled and cut to a square, for what has to go with it."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from etherdiff.images.crops import crop_window

Box = tuple[float, float, float, float]
_EXIF_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)  # orientations that swap width and height


def crop_box(size: tuple[int, int], resolution: int) -> Box:
    """(left, top, right, bottom) of the square, in pixels of an image of `size` (width, height).

    It is what `images.resize_and_crop(image, resolution, "center")` scales to resolution x resolution.
    """
    scale = resolution / min(size)
    (left, right), (top, bottom) = (crop_window(length, scale, resolution, 0.5) for length in size)
    return left, top, right, bottom


def crop_labels(labels: NDArray[np.uint8], resolution: int) -> NDArray[np.uint8]:
    """(H, W) to (resolution, resolution): of each pixel's middle, the label there."""
    image = Image.fromarray(labels)
    square = image.resize((resolution, resolution), Image.Resampling.NEAREST, box=crop_box(image.size, resolution))
    return np.asarray(square)


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) as a viewer shows the image, from its header only. OSError where it cannot be read."""
    with Image.open(path) as image:
        lying = image.getexif().get(_EXIF_ORIENTATION) in _LYING
        return (image.height, image.width) if lying else image.size
