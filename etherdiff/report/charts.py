"""Charts as inline SVG: axes, ticks, labels, a legend. Colours come from the page's style, so they follow dark and light."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from etherdiff.report.markup import Html, foreign, join, tag
from etherdiff.report.numbers import short

WIDTH, HEIGHT = 420, 250
"""Units of the drawing: about as many pixels as it has on a phone, so that 12 stays readable there."""
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 14, 36
TICKS = 6
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line, or one cloud of dots, of a chart."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    """Which of the page's colours."""
    line: bool = True
    dots: bool = False
    faint: bool = False
    """A backdrop, without an entry in the legend."""
    names: Sequence[str] = ()
    """What each dot is, shown where the pointer rests on it; none: its numbers."""


@dataclass(frozen=True)
class Mark:
    """A vertical line at x with a word beside it."""

    x: float
    label: str


def ticks(low: float, high: float, about: int = TICKS) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, both inside or on the range."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [count * step for count in range(first, last + 1)]


def chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    marks: Sequence[Mark] = (),
    x_range: tuple[float, float] | None = None,
    from_zero: bool = False,
) -> Html:
    """A figure of one or more series over x; empty markup where there is no point.

    x_range: that several charts share; None: where the points are.
    from_zero: start the vertical axis at 0, for quantities whose size matters rather than their change.
    """
    drawn = [one for one in series if one.points]
    if not drawn:
        return Html()
    x_range = x_range or _range([x for one in drawn for x, _ in one.points], margin=0)
    values = [y for one in drawn for _, y in one.points]
    y_range = _range([0.0, *values] if from_zero else values, margin=0.06)
    if from_zero:
        y_range = (0.0, y_range[1])
    frame = _Frame(x_range, y_range)
    picture = tag(
        "svg",
        *_axes(frame, x_label),
        *(_mark(frame, mark) for mark in marks if x_range[0] <= mark.x <= x_range[1]),
        *(_series(frame, one) for one in drawn),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title}: {_in_words(drawn)}",
    )
    legend = [_key(one) for one in drawn if not one.faint]
    caption = tag("figcaption", tag("strong", title), tag("span", *legend, class_="legend") if len(legend) > 1 else None)
    return tag("figure", caption, picture, class_="chart")


def interval_bar(mean: float, low: float | None, high: float | None, domain: tuple[float, float], colour: int) -> Html:
    """A dot at the mean on its interval, within a domain that neighbouring bars share."""
    start, end = domain
    width = 200

    def at(value: float) -> float:
        return round(6 + (width - 12) * (value - start) / ((end - start) or 1), 1)

    line = tag("line", x1=at(low), x2=at(high), y1=9, y2=9, class_="interval") if low is not None and high is not None else None
    dot = tag("circle", cx=at(mean), cy=9, r=5)
    group = tag("g", line, dot, class_=f"colour-{colour}")
    axis = tag("line", x1=0, x2=width, y1=9, y2=9, class_="grid")
    return tag("svg", axis, group, viewBox=f"0 0 {width} 18", class_="bar", aria_hidden="true")


def share_bar(share: float) -> Html:
    """A bar as long as a share in [0, 1]."""
    bar = tag("rect", x=0, y=3, width=round(200 * min(max(share, 0.0), 1.0), 1), height=12, rx=2)
    return tag("svg", tag("g", bar, class_="colour-0"), viewBox="0 0 200 18", class_="bar", aria_hidden="true")


@dataclass(frozen=True)
class _Frame:
    """From values to places on the drawing."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        return _placed(value, self.x_range, LEFT, WIDTH - RIGHT)

    def y(self, value: float) -> float:
        return _placed(value, self.y_range, HEIGHT - BOTTOM, TOP)


def _placed(value: float, values: tuple[float, float], start: float, end: float) -> float:
    low, high = values
    share = (value - low) / (high - low) if high > low else 0.5
    return round(start + share * (end - start), 1)


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        room = abs(low) * 0.1 or 1.0
        return (low - room, high + room) if margin else (low, high)
    return low - margin * (high - low), high + margin * (high - low)


def _axes(frame: _Frame, x_label: str) -> list[Html]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    y_ticks, x_ticks = ticks(*frame.y_range), [x for x in ticks(*frame.x_range) if x == int(x)]
    found = []
    for value, label in zip(y_ticks, _labels(y_ticks), strict=True):
        y = frame.y(value)
        found.append(tag("line", x1=LEFT, x2=right, y1=y, y2=y, class_="grid"))
        found.append(tag("text", label, x=LEFT - 6, y=y + 4, text_anchor="end"))
    for value, label in zip(x_ticks, _labels(x_ticks), strict=True):
        x = frame.x(value)
        found.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
        found.append(tag("text", label, x=x, y=bottom + 17, text_anchor="middle"))
    found.append(tag("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
    found.append(tag("text", x_label, x=right, y=HEIGHT - 4, text_anchor="end", class_="label"))
    return found


def _labels(values: Sequence[float]) -> list[str]:
    """The ticks' numbers, all with as many decimals as their distance needs."""
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) if values else 1.0
    largest = max((abs(value) for value in values), default=0.0)
    if largest >= 1e6 or 0 < largest < 1e-3:
        return [f"{value:.1e}" if value else "0" for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return [f"{value + 0.0:,.{decimals}f}".replace("-", "−") for value in values]


def _mark(frame: _Frame, mark: Mark) -> Html:
    x = frame.x(mark.x)
    on_the_left = x > (LEFT + WIDTH - RIGHT) / 2
    line = tag("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, class_="mark")
    place = {"x": x - 5, "text_anchor": "end"} if on_the_left else {"x": x + 5, "text_anchor": "start"}
    return join(line, tag("text", mark.label, y=HEIGHT - BOTTOM - 7, class_="mark-label", **place))


def _series(frame: _Frame, one: Series) -> Html:
    placed = [(frame.x(x), frame.y(y)) for x, y in one.points]
    parts = []
    if one.line and len(placed) > 1:
        parts.append(tag("polyline", points=" ".join(f"{x},{y}" for x, y in placed)))
    if one.dots or len(placed) == 1:
        names = one.names or [f"{short(x)}: {short(y)}" for x, y in one.points]
        parts += [tag("circle", tag("title", name), cx=x, cy=y, r=3) for (x, y), name in zip(placed, names, strict=True)]
    return tag("g", *parts, class_=f"colour-{one.colour}" + (" faint" if one.faint else ""))


def _key(one: Series) -> Html:
    return tag("span", tag("i", class_=f"key colour-{one.colour}"), foreign(one.name), class_="entry")


def _in_words(series: Sequence[Series]) -> str:
    words = []
    for one in series:
        if not one.faint:
            (first_x, first_y), (last_x, last_y) = one.points[0], one.points[-1]
            words.append(f"{one.name} from {short(first_y)} at {short(first_x)} to {short(last_y)} at {short(last_x)}")
    return "; ".join(words)
