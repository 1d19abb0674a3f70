"""Ticks, ranges and what is left to the drawing."""

import xml.etree.ElementTree as ET

import pytest

from etherdiff.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Mark,
    Series,
    interval_bar,
    number,
    points,
    smoothed,
    thinned,
    ticks,
)
from etherdiff.report.html import parts
from etherdiff.system.text import counted, duration, listed, score, short, size

PARTS = parts()


def chart(*parts, **options) -> str:
    return PARTS.chart(Chart(*parts, **options))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1200, [0, 200, 400, 600, 800, 1000, 1200]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.131, 0.149, [0.135, 0.14, 0.145]),
        (-3, 3, [-3, -2, -1, 0, 1, 2, 3]),
        (1e-7, 3e-7, [1e-7, 1.5e-7, 2e-7, 2.5e-7, 3e-7]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round_numbers_inside(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def numbers_of(figure: str) -> list[float]:
    """All coordinates of the drawing; fails where it is no well-formed XML."""
    found = []
    for element in ET.fromstring(figure).iter():
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy"):
            if name in element.attrib:
                found.append(float(element.attrib[name]))
        for pair in element.attrib.get("points", "").split():
            found += map(float, pair.split(","))
    return found


@pytest.mark.parametrize(
    "values",
    [
        [(1, 0.5)],
        [(1, 0.5), (2, 0.5)],
        [(0, 0.0), (1, 0.0)],
        [(step, 1e-9 * step) for step in range(5)],
        [(step, -1e12 * step) for step in range(5)],
        [(step, (-1) ** step) for step in range(500)],
    ],
)
@pytest.mark.parametrize("from_zero", [False, True])
def test_everything_is_on_the_drawing(values, from_zero):
    if from_zero and min(y for _, y in values) < 0:
        return
    figure = chart("T <&> \"'", [Series("a <b>", values, dots=True)], "step", [Mark(1, "best")], from_zero=from_zero)
    assert all(-1 <= value <= max(WIDTH, HEIGHT) + 1 for value in numbers_of(figure))


def test_a_point_is_where_it_belongs():
    figure = chart("T", [Series("a", [(0, 0), (10, 1), (20, 4)], line=False, dots=True)], "x", from_zero=True)
    places = [(float(e.get("cx")), float(e.get("cy"))) for e in ET.fromstring(figure).iter("circle")]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert (y0 - y1) * 4 == pytest.approx(y0 - y2, abs=0.5)


def test_a_legend_where_there_are_two_and_nothing_where_there_is_nothing():
    two = [Series("one", [(0, 1), (1, 2)]), Series("two", [(0, 2), (1, 1)], colour=1)]
    assert chart("T", two, "x").count('class="entry"') == 2
    assert 'class="entry"' not in chart("T", two[:1], "x")
    assert chart("T", [Series("empty", [])], "x").strip() == ""


def test_the_template_draws_in_the_frame_that_places_are_computed_for():
    figure = chart("T", [Series("a", [(0, 0), (10, 1)])], "x", [Mark(0, "best")])
    assert f'viewBox="0 0 {WIDTH} {HEIGHT}"' in figure
    axis = ET.fromstring(figure).findall(".//line[@class='axis']")[-1]
    assert (axis.get("x1"), axis.get("x2"), axis.get("y1")) == (str(LEFT), str(WIDTH - RIGHT), str(HEIGHT - BOTTOM))
    mark = ET.fromstring(figure).find(".//line[@class='mark']")
    assert (mark.get("y1"), mark.get("y2")) == (str(TOP), str(HEIGHT - BOTTOM))


def test_bars():
    assert 'r="5"' in PARTS.interval_bar(interval_bar(0.5, None, None, (0.5, 0.5)), 0)
    assert 'width="100.0"' in PARTS.share_bar(0.5)
    bar = ET.fromstring(PARTS.interval_bar(interval_bar(0.5, 0.4, 0.6, (0, 1)), 0))
    assert [bar.find(".//line[@class='interval']").get(name) for name in ("x1", "x2")] == ["81.2", "118.8"]


def test_curves_are_thinned_and_smoothed():
    values = [(step, float(step)) for step in range(1000)]
    thin = thinned(values, 100)
    assert len(thin) == 100
    assert thin[0] == (4.5, 4.5)
    assert [y for _, y in smoothed(thin, 5)] == pytest.approx([y for _, y in thin])  # a line stays one, ends included
    assert points([{"step": 1, "loss": None}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 2}], "loss") == [(3, 2)]


def test_numbers():
    assert [number(value) for value in (1, 2.5, float("inf"), "3", None, True, 10**400)] == [
        1,
        2.5,
        None,
        None,
        None,
        None,
        None,
    ]
    assert [score(value) for value in (None, 0.6664, -0.5, 41.23)] == ["–", "0.666", "−0.500", "41.2"]
    assert [short(value) for value in (0, 1.2345, 123456.0, 1e-5)] == ["0", "1.23", "1.2e+05", "1.0e-05"]
    assert [duration(value) for value in (4.21, 59.99, 200, 3599.6, 7500)] == [
        "4.2 s", "1 min 00 s", "3 min 20 s", "1 h 00 min", "2 h 05 min",
    ]  # fmt: skip
    assert [size(value) for value in (12, 2048, 300 * 2**20, 9 * 2**30)] == ["12 bytes", "2.0 KiB", "300 MiB", "9.0 GiB"]


def test_lists():
    assert listed(["a", "b"]) == "a, b"
    assert listed([*"abcdefgh"]) == "a, b, c, d and 4 more"
    assert (counted(1, "image"), counted(1200, "image")) == ("1 image", "1,200 images")
