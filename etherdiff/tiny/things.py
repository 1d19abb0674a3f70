"""The tiny world's things and subjects.

Things are of ten kinds, drawn from signed distances, each plain or patterned, with or without an outline. Their ten colours
vary around their names. A DreamBooth subject is one thing, whose pattern and colours no training scene combines.
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    """Draw an RGB colour in [0, 1] of this name: each thing has its own."""
    hue, saturation, value = (centre + width * rng.uniform(-1, 1) for centre, width in zip(HSV[name], _JITTER, strict=True))
    if name not in HUED:
        saturation = min(saturation, 0.08)
    return colorsys.hsv_to_rgb(hue % 1.0, float(np.clip(saturation, 0, 1)), float(np.clip(value, 0, 1)))


def as_array(rgb: RGB) -> FloatArray:
    """Return the colour as (3,) float32."""
    return np.array(rgb, np.float32)


PATTERNS = ("plain", "striped", "dotted", "two-tone", "checkered")
_PATTERN_SHARES = (0.4, 0.15, 0.15, 0.15, 0.15)


@dataclass(frozen=True)
class Thing:
    """One individual: what it is called, and the finer traits (exact colours, direction and period) that make it itself."""

    kind: str
    pattern: str
    colour: str
    second: str | None
    outline: str | None
    rgb: RGB
    second_rgb: RGB
    outline_rgb: RGB
    angle: float
    """Direction of the pattern, in radians."""
    period: float
    """Period of the pattern, in units of the thing's radius."""

    @property
    def combination(self) -> tuple[str, str, str, str | None]:
        """Kind, pattern and colours: training scenes leave out those of the subjects."""
        return (self.kind, self.pattern, self.colour, self.second)


def make_thing(
    rng: np.random.Generator, kind: str, pattern: str, colour: str, second: str | None, outline: str | None
) -> Thing:
    """Return a thing of these names with finer traits of its own."""
    return Thing(
        kind,
        pattern,
        colour,
        second,
        outline,
        sample_colour(colour, rng),
        sample_colour(second or colour, rng),
        sample_colour(outline or colour, rng),
        angle=float(rng.choice([0.0, np.pi / 4, np.pi / 2, -np.pi / 4])),
        period=float(rng.uniform(0.55, 0.85)),
    )


def sample_thing(rng: np.random.Generator, kind: str | None = None) -> Thing:
    """Draw any thing, or any of this kind; a subject's combination may come up."""
    colour, second, outline = rng.permutation(COLOURS)[:3]
    pattern = str(rng.choice(PATTERNS, p=_PATTERN_SHARES))
    return make_thing(
        rng,
        kind or str(rng.choice(KINDS)),
        pattern,
        str(colour),
        None if pattern == "plain" else str(second),
        str(outline) if rng.random() < 0.3 else None,
    )


def near_twin(rng: np.random.Generator, thing: Thing) -> Thing:
    """Draw another thing of the same kind that differs in one of pattern, first colour, second colour and outline."""
    colour, outline = (str(name) for name in rng.permutation([c for c in COLOURS if c not in _names(thing)])[:2])
    choice = rng.integers(3)
    if choice == 0:
        return replace(thing, colour=colour, rgb=sample_colour(colour, rng))
    if choice == 1 and thing.second is not None:
        return replace(thing, second=colour, second_rgb=sample_colour(colour, rng))
    if choice == 2 and thing.second is not None:
        pattern = str(rng.choice([p for p in PATTERNS[1:] if p != thing.pattern]))
        return replace(thing, pattern=pattern)
    if thing.outline is not None:
        return replace(thing, outline=None, outline_rgb=thing.rgb)
    return replace(thing, outline=outline, outline_rgb=sample_colour(outline, rng))


def _names(thing: Thing) -> tuple[str | None, ...]:
    return (thing.colour, thing.second, thing.outline)


def thing_colours(thing: Thing, x: FloatArray, y: FloatArray, distance: FloatArray, radius: float) -> FloatArray:
    """Return the thing's own colours at (x, y), without light: (h, w) coordinates in its frame to (h, w, 3) in [0, 1]."""
    colours = np.broadcast_to(as_array(thing.rgb), (*x.shape, 3))
    if thing.second:
        share = _PATTERN_SHARE[thing.pattern](thing, x, y, radius)[..., None]
        colours = colours * (1 - share) + as_array(thing.second_rgb) * share
    if thing.outline:
        width = max(0.17, 1.7 / radius)
        line = _coverage(-width - distance, radius)[..., None]
        colours = colours * (1 - line) + as_array(thing.outline_rgb) * line
    return colours


def thing_distance(kind: str, x: FloatArray, y: FloatArray) -> FloatArray:
    """Return the signed distance to the outline of this kind of thing, negative inside; coordinates in radii, y downwards."""
    return _DISTANCES[kind](x, y).astype(np.float32)


def _coverage(distance: FloatArray, radius: float) -> FloatArray:
    """Return the anti-aliased share of a pixel inside, from a distance in radii."""
    return np.clip(0.5 - distance * radius, 0, 1)


# --- patterns: how much of the second colour there is at a point ---------------------------------------------------------


def _turned(thing: Thing, x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    cos, sin = np.float32(np.cos(thing.angle)), np.float32(np.sin(thing.angle))
    return cos * x + sin * y, cos * y - sin * x


def _striped(thing: Thing, x: FloatArray, y: FloatArray, radius: float) -> FloatArray:
    across, _ = _turned(thing, x, y)
    return _coverage(np.abs((across / thing.period) % 1 - 0.5) * thing.period - thing.period / 4, radius)


def _dotted(thing: Thing, x: FloatArray, y: FloatArray, radius: float) -> FloatArray:
    a, b = _turned(thing, x, y)
    spacing = thing.period
    near_a, near_b = (np.abs(t / spacing - np.round(t / spacing)) * spacing for t in (a, b))
    return _coverage(np.hypot(near_a, near_b) - 0.3 * spacing, radius)


def _two_tone(thing: Thing, x: FloatArray, y: FloatArray, radius: float) -> FloatArray:
    across, _ = _turned(thing, x, y)
    return _coverage(-across, radius)


def _checkered(thing: Thing, x: FloatArray, y: FloatArray, radius: float) -> FloatArray:
    a, b = _turned(thing, x, y)
    side = thing.period * 0.8
    edge = [np.abs(t / side - np.round(t / side)) * side for t in (a, b)]
    odd = (np.floor(a / side) + np.floor(b / side)) % 2
    return _coverage(np.minimum(*edge) * (1 - 2 * odd), radius)


_PATTERN_SHARE: dict[str, Callable[[Thing, FloatArray, FloatArray, float], FloatArray]] = {
    "striped": _striped,
    "dotted": _dotted,
    "two-tone": _two_tone,
    "checkered": _checkered,
}

# --- kinds: signed distances to their outlines ------------------------------------------------------------------------------


def _circle(x: FloatArray, y: FloatArray, cx: float, cy: float, r: float) -> FloatArray:
    return np.hypot(x - cx, y - cy) - r


def _rectangle(x: FloatArray, y: FloatArray, cx: float, cy: float, half_width: float, half_height: float) -> FloatArray:
    dx, dy = np.abs(x - cx) - half_width, np.abs(y - cy) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _polygon(x: FloatArray, y: FloatArray, vertices: list[tuple[float, float]]) -> FloatArray:
    """Return the exact distance to a simple polygon: the nearest edge, and the parity of the edges crossed to its right."""
    points = np.stack([x, y], -1)[..., None, :]
    start = np.array(vertices, np.float32)
    edge = np.roll(start, -1, 0) - start
    offset = points - start
    along = np.clip((offset * edge).sum(-1) / (edge * edge).sum(-1), 0, 1)
    nearest = np.sqrt(((offset - along[..., None] * edge) ** 2).sum(-1).min(-1))
    below = offset[..., 1] < 0
    to_the_right = (offset[..., 0] * edge[:, 1] < offset[..., 1] * edge[:, 0]) == (edge[:, 1] > 0)
    crosses = (below != np.roll(below, -1, -1)) & to_the_right
    return np.where(crosses.sum(-1) % 2 == 1, -nearest, nearest)


_STAR = [(float(np.sin(k * np.pi / 5) * r), float(-np.cos(k * np.pi / 5) * r) + 0.08) for k, r in enumerate([1.08, 0.48] * 5)]
_HOUSE = [(-0.75, 0.9), (-0.75, -0.05), (-1.0, -0.05), (0.0, -1.0), (1.0, -0.05), (0.75, -0.05), (0.75, 0.9)]
_CONE = [(-0.9, 0.85), (0.0, -1.05), (0.9, 0.85)]
_HEART_SIDE = 0.56


def _heart(x: FloatArray, y: FloatArray) -> FloatArray:
    s = np.float32(np.sqrt(0.5))
    a, b = s * (x + y - 0.15), s * (y - x - 0.15)  # the square stands on its corner
    square = np.maximum(np.abs(a), np.abs(b)) - _HEART_SIDE
    return np.minimum(square, np.minimum(np.hypot(a, b + _HEART_SIDE), np.hypot(a + _HEART_SIDE, b)) - _HEART_SIDE)


def _ball(x: FloatArray, y: FloatArray) -> FloatArray:
    return _circle(x, y, 0, 0, 0.95)


def _box(x: FloatArray, y: FloatArray) -> FloatArray:
    return _rectangle(x, y, 0, 0, 0.83, 0.83)


def _cone(x: FloatArray, y: FloatArray) -> FloatArray:
    return _polygon(x, y, _CONE)


def _star(x: FloatArray, y: FloatArray) -> FloatArray:
    return _polygon(x, y, _STAR)


def _ring(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.abs(_circle(x, y, 0, 0, 0.68)) - 0.3


def _mug(x: FloatArray, y: FloatArray) -> FloatArray:
    handle = np.abs(_circle(x, y, 0.5, 0.0, 0.4)) - 0.12
    return np.minimum(_rectangle(x, y, -0.2, 0, 0.62, 0.85), handle)


def _house(x: FloatArray, y: FloatArray) -> FloatArray:
    return _polygon(x, y, _HOUSE)


def _mushroom(x: FloatArray, y: FloatArray) -> FloatArray:
    cap = np.maximum(_circle(x, y, 0, 0.05, 1.0), y - 0.1)
    return np.minimum(cap, _rectangle(x, y, 0, 0.45, 0.3, 0.45))


def _fish(x: FloatArray, y: FloatArray) -> FloatArray:
    body = (np.hypot((x + 0.2) / 0.8, y / 0.58) - 1) * 0.58
    return np.minimum(body, _polygon(x, y, [(0.4, 0.0), (1.05, -0.6), (1.05, 0.6)]))


_DISTANCES: dict[str, Callable[[FloatArray, FloatArray], FloatArray]] = {
    "ball": _ball,
    "box": _box,
    "cone": _cone,
    "star": _star,
    "ring": _ring,
    "heart": _heart,
    "mug": _mug,
    "house": _house,
    "mushroom": _mushroom,
    "fish": _fish,
}
KINDS = tuple(_DISTANCES)


# --- DreamBooth subjects --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TinySubject:
    """An individual to learn: `split` says whether settings may be chosen on it (validation) or only judged (test)."""

    thing: Thing
    split: str

    @property
    def class_noun(self) -> str:
        """Class noun of the thing."""
        return self.thing.kind


_Row = tuple[str, str, str, str, str, str, str | None]
_TABLE: tuple[_Row, ...] = (  # name, split, kind, pattern, colours, outline
    ("candy_ball", "test", "ball", "striped", "pink", "cyan", None),
    ("ladybird_ball", "test", "ball", "dotted", "red", "black", "white"),
    ("chess_box", "test", "box", "checkered", "white", "purple", None),
    ("gift_box", "test", "box", "striped", "green", "red", "yellow"),
    ("traffic_cone", "test", "cone", "striped", "orange", "white", None),
    ("night_star", "test", "star", "two-tone", "blue", "yellow", None),
    ("swim_ring", "test", "ring", "striped", "red", "white", "blue"),
    ("spotted_heart", "test", "heart", "dotted", "pink", "white", None),
    ("picnic_mug", "test", "mug", "checkered", "yellow", "green", None),
    ("forest_house", "test", "house", "two-tone", "purple", "orange", "black"),
    ("toadstool", "test", "mushroom", "dotted", "red", "white", None),
    ("reef_fish", "test", "fish", "striped", "orange", "blue", None),
    ("beach_ball", "validation", "ball", "two-tone", "yellow", "purple", None),
    ("tiled_house", "validation", "house", "checkered", "cyan", "black", None),
    ("ink_mug", "validation", "mug", "dotted", "blue", "pink", "white"),
    ("moss_fish", "validation", "fish", "dotted", "green", "yellow", None),
)


def _make(index: int, row: _Row) -> TinySubject:
    _, split, kind, pattern, colour, second, outline = row
    return TinySubject(make_thing(np.random.Generator(np.random.Philox(index)), kind, pattern, colour, second, outline), split)


SUBJECTS: dict[str, TinySubject] = {row[0]: _make(index, row) for index, row in enumerate(_TABLE)}


def held_out_combinations() -> frozenset[tuple[str, str, str, str | None]]:
    """Return kind, pattern and colours of every subject, and the same with the two colours exchanged."""
    combinations = {subject.thing.combination for subject in SUBJECTS.values()}
    return frozenset(combinations | {(kind, pattern, b, a) for kind, pattern, a, b in combinations if b})
