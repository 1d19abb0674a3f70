"""The tiny world's ten colours, and how they vary around their names."""

import colorsys
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
RGB = tuple[float, float, float]

HSV = {
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
COLOURS = tuple(HSV)
HUED = COLOURS[:8]
_JITTER = (0.018, 0.08, 0.05)  # of hue, saturation and value; half the way to the nearest other hue at most


def sample_colour(name: str, rng: np.random.Generator) -> RGB:
    """Return an RGB colour in [0, 1] that goes by this name: each thing has its own."""
    hue, saturation, value = (centre + width * rng.uniform(-1, 1) for centre, width in zip(HSV[name], _JITTER, strict=True))
    if name not in HUED:
        saturation = min(saturation, 0.08)
    return colorsys.hsv_to_rgb(hue % 1.0, float(np.clip(saturation, 0, 1)), float(np.clip(value, 0, 1)))


def as_array(rgb: RGB) -> FloatArray:
    """Return the colour as (3,) float32."""
    return np.array(rgb, np.float32)
