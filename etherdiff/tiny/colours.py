"""The tiny world's ten colours: how they vary around their names, and what to call a pixel."""

import colorsys
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
RGB = tuple[float, float, float]

_HSV = {
    "red": (0.0, 0.85, 0.87),
    "orange": (0.075, 0.9, 0.95),
    "yellow": (0.15, 0.85, 0.96),
    "green": (0.34, 0.75, 0.7),
    "cyan": (0.5, 0.75, 0.87),
    "blue": (0.62, 0.8, 0.82),
    "purple": (0.77, 0.65, 0.68),
    "pink": (0.905, 0.5, 0.97),
    "white": (0.0, 0.02, 0.96),
    "black": (0.0, 0.05, 0.12),
}
COLOURS = tuple(_HSV)
HUED = COLOURS[:8]
_HUES = np.array([_HSV[name][0] for name in HUED])
_JITTER = (0.018, 0.08, 0.05)  # of hue, saturation and value; half the way to the nearest other hue at most


def sample_colour(name: str, rng: np.random.Generator) -> RGB:
    """An RGB colour in [0, 1] that goes by this name: each thing has its own."""
    hue, saturation, value = (centre + width * rng.uniform(-1, 1) for centre, width in zip(_HSV[name], _JITTER, strict=True))
    if name not in HUED:
        saturation = min(saturation, 0.08)
    return colorsys.hsv_to_rgb(hue % 1.0, float(np.clip(saturation, 0, 1)), float(np.clip(value, 0, 1)))


def as_array(rgb: RGB) -> FloatArray:
    """(3,) float32."""
    return np.array(rgb, np.float32)


def name_colours(pixels: NDArray[np.uint8]) -> NDArray[np.intp]:
    """The index in `COLOURS` of each pixel, (..., 3) uint8 to (...): by hue, which shade hardly changes."""
    rgb = pixels.astype(np.float32) / 255
    value, low = rgb.max(-1), rgb.min(-1)
    spread = value - low
    safe = np.where(spread == 0, 1, spread)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.where(
        value == red,
        (green - blue) / safe % 6,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    distance = np.abs((hue[..., None] / 6 - _HUES + 0.5) % 1 - 0.5)
    named = distance.argmin(-1)
    grey = spread < 0.28 * value
    named = np.where(grey, COLOURS.index("white"), named)
    return np.where((value < 0.28) | (grey & (value < 0.4)), COLOURS.index("black"), named)
