"""Charts as coordinates, which a template turns into SVG; thinning and smoothing of curves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from etherdiff.system.text import short

WIDTH, HEIGHT = 420, 250
"""Size of the drawing, about its pixels on a phone, so that text of size 12 is readable there."""
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 14, 36
TICKS = 6
MAX_POINTS = 240
"""Points of a curve; more are averaged in groups."""
NEIGHBOURS = 12
"""Points on either side that a smoothed curve averages."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line, or one cloud of dots, of a chart."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    """Number of the colour in the style sheet."""
    line: bool = True
    dots: bool = False
    faint: bool = False
    """Whether it is a background, without an entry in the legend."""
    names: Sequence[str] = ()
    """Tooltip of each dot; empty: its numbers."""


@dataclass(frozen=True)
class Mark:
    """A vertical line at x with a label."""

    x: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A figure of one or more series over x."""

    title: str
    series: Sequence[Series]
    x_label: str
    marks: Sequence[Mark] = ()
    x_range: Point | None = None
    """Range that several charts share; None: the range of the points."""
    from_zero: bool = False
    """Whether the vertical axis starts at 0, for quantities whose size matters rather than their change."""

    @cached_property
    def drawn(self) -> list[Series]:
        """Series that have a point; a chart without any is not drawn."""
        return [one for one in self.series if one.points]

    @property
    def words(self) -> str:
        """Text of the chart for screen readers."""
        curves = [
            f"{one.name} from {short(one.points[0][1])} at {short(one.points[0][0])} "
            f"to {short(one.points[-1][1])} at {short(one.points[-1][0])}"
            for one in self.drawn
            if not one.faint
        ]
        return f"{self.title}: {'; '.join(curves)}"

    @cached_property
    def x_limits(self) -> Point:
        return self.x_range or _range([x for one in self.drawn for x, _ in one.points], margin=0)

    @cached_property
    def y_limits(self) -> Point:
        values = [y for one in self.drawn for _, y in one.points]
        low, high = _range([0.0, *values] if self.from_zero else values, margin=0.06)
        return (0.0 if self.from_zero else low), high

    def x(self, value: float) -> float:
        """Return the place of a value on the drawing."""
        return _placed(value, self.x_limits, LEFT, WIDTH - RIGHT)

    def y(self, value: float) -> float:
        return _placed(value, self.y_limits, HEIGHT - BOTTOM, TOP)

    def x_ticks(self) -> list[tuple[float, str]]:
        """Return place and label of each tick; x counts steps or layers, so ticks are whole numbers."""
        values = [x for x in ticks(*self.x_limits) if x == int(x)]
        return [(self.x(value), label) for value, label in zip(values, _labels(values), strict=True)]

    def y_ticks(self) -> list[tuple[float, str]]:
        values = ticks(*self.y_limits)
        return [(self.y(value), label) for value, label in zip(values, _labels(values), strict=True)]

    def visible_marks(self) -> list[tuple[float, str, bool]]:
        """Return place, label, and whether the label is on the left side of the line."""
        low, high = self.x_limits
        placed = [(self.x(mark.x), mark.label) for mark in self.marks if low <= mark.x <= high]
        return [(x, label, x > (LEFT + WIDTH - RIGHT) / 2) for x, label in placed]

    def polyline(self, one: Series) -> str:
        """Return the line through a series' points; empty where it has none."""
        if not one.line or len(one.points) < 2:
            return ""
        return " ".join(f"{self.x(x)},{self.y(y)}" for x, y in one.points)

    def dots(self, one: Series) -> list[tuple[float, float, str]]:
        """Return place and name of each dot; a single point is always a dot."""
        if not one.dots and (len(one.points) > 1 or not one.line):
            return []
        names = one.names or [f"{short(x)}: {short(y)}" for x, y in one.points]
        return [(self.x(x), self.y(y), name) for (x, y), name in zip(one.points, names, strict=True)]


def interval_bar(mean: float, low: float | None, high: float | None, domain: Point) -> tuple[float, float | None, float | None]:
    """Place a mean and its interval's ends on a bar of width 200; neighbouring bars share the domain."""
    places = [None if value is None else _placed(value, domain, 6, 194, flat=0) for value in (mean, low, high)]
    return places[0] or 0.0, places[1], places[2]


def points(rows: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """Find (step, value) wherever the value is a finite number."""
    return [(row["step"], value) for row in rows if (value := number(row.get(name))) is not None]


def number(value: Any) -> float | None:
    """Return a finite number; None for everything else that a file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def thinned(values: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """Return at most `most` points: each the mean of neighbours."""
    size = -(-len(values) // most) or 1
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def smoothed(values: Sequence[Point], neighbours: int = NEIGHBOURS) -> list[Point]:
    """Average each value with as many neighbours on its left as on its right."""
    found = []
    for place, (x, _) in enumerate(values):
        reach = min(neighbours, place, len(values) - 1 - place)
        window = values[place - reach : place + reach + 1]
        found.append((x, sum(y for _, y in window) / len(window)))
    return found


def ticks(low: float, high: float, about: int = TICKS) -> list[float]:
    """Choose round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [count * step for count in range(first, last + 1)]


def _placed(value: float, values: Point, start: float, end: float, flat: float = 0.5) -> float:
    """Return where a value of a range lies between two places; `flat`: the share if the range is a single value."""
    low, high = values
    share = (value - low) / (high - low) if high > low else flat
    return round(start + share * (end - start), 1)


def _range(values: Sequence[float], margin: float) -> Point:
    low, high = min(values), max(values)
    if low == high:
        room = abs(low) * 0.1 or 1.0
        return (low - room, high + room) if margin else (low, high)
    return low - margin * (high - low), high + margin * (high - low)


def _labels(values: Sequence[float]) -> list[str]:
    """Write the ticks' numbers, all with as many decimals as their distance needs."""
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) if values else 1.0
    largest = max((abs(value) for value in values), default=0.0)
    if largest >= 1e6 or 0 < largest < 1e-3:
        return [f"{value:.1e}" if value else "0" for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return [f"{value + 0.0:,.{decimals}f}".replace("-", "−") for value in values]
