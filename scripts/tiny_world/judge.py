"""Whether a picture shows what was asked of the tiny world: its sky, its ground, its things and their colours."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from etherdiff.tiny.things import COLOURS, HSV, HUED, Thing
from etherdiff.tiny.world import CLASSES, GROUNDS, SKIES

MIN_PIXELS = 20
"""A kind is there from this many pixels on (0.5% of the picture; the smallest things drawn have about 100)."""


_HUES = np.array([HSV[name][0] for name in HUED])


@dataclass(frozen=True)
class Judgement:
    """One answer for the sky and the ground, and one for each kind of thing that was asked for."""

    sky: bool
    ground: bool
    kinds: tuple[bool, ...]
    colours: tuple[bool, ...]
    """False too where the thing itself is missing."""


def judge(
    image: NDArray[np.uint8], segmentation: NDArray[np.uint8], sky: str, ground: str, things: Sequence[Thing]
) -> Judgement:
    """Hold a picture, (64, 64, 3), and what a segmenter sees in it, (64, 64), against what was asked for.

    The largest sky and the largest ground have to be the ones asked for. Of a kind's pixels, the most frequent colour
    names have to be those of the things of this kind, outlines left out: one for a plain thing, two for a patterned one.
    """
    areas = Counter({CLASSES[index]: int(count) for index, count in enumerate(np.bincount(segmentation.ravel(), minlength=21))})
    kinds = sorted({thing.kind for thing in things})
    present = tuple(areas[kind] >= MIN_PIXELS for kind in kinds)
    return Judgement(
        sky=max(SKIES, key=lambda name: areas[name]) == sky,
        ground=max(GROUNDS, key=lambda name: areas[name]) == ground,
        kinds=present,
        colours=tuple(
            there and _has_colours(image[segmentation == CLASSES.index(kind)], [t for t in things if t.kind == kind])
            for kind, there in zip(kinds, present, strict=True)
        ),
    )


def _has_colours(pixels: NDArray[np.uint8], things: Sequence[Thing]) -> bool:
    asked = {colour for thing in things for colour in (thing.colour, thing.second) if colour}
    outlines = {thing.outline for thing in things if thing.outline} - asked
    seen = Counter(COLOURS[index] for index in name_colours(pixels).ravel() if COLOURS[index] not in outlines)
    return {colour for colour, _ in seen.most_common(len(asked))} == asked


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
