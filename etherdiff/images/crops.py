"""Cut images to squares, and turn them into arrays."""

from typing import Literal

import numpy as np
from PIL import Image


def resize_and_crop(
    image: Image.Image,
    size: int,
    crop: Literal["center", "random"] = "center",
    position: tuple[float, float] = (0.5, 0.5),
) -> Image.Image:
    """Scale `image` until its shorter side is `size` (Lanczos, antialiased), and cut a size x size window.

    Args:
        crop: "center", or "random": the window at `position`, which the caller draws.
        position: (u, v) in [0, 1]: 0 is the window furthest left / at the top, 1 furthest right / at the bottom.
            Not looked at for "center".

    Raises:
        ValueError: `size`, `crop` or `position` out of range.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if crop not in ("center", "random"):
        raise ValueError(f"crop must be 'center' or 'random', got {crop!r}")
    if not all(0 <= share <= 1 for share in position):
        raise ValueError(f"position must lie in [0, 1] x [0, 1], got {position}")
    u, v = (0.5, 0.5) if crop == "center" else position
    left, right = crop_window(image.width, size / min(image.size), size, u)
    top, bottom = crop_window(image.height, size / min(image.size), size, v)
    # One step: scaling a very long image whole, to cut most of it away, can take gigabytes.
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, right, bottom))


def crop_window(length: int, scale: float, size: int, share: float) -> tuple[float, float]:
    """Return start and end, in source pixels, of a window of `size` whole target pixels along one side of the image."""
    scaled = max(size, round(length * scale))
    start = round(share * (scaled - size))
    return start * length / scaled, (start + size) * length / scaled


def to_array(image: Image.Image) -> np.ndarray:
    """Convert an RGB image (H, W) to float32 (3, H, W) in [-1, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1) / 127.5 - 1.0)
