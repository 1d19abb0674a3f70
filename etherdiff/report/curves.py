"""How training went: losses and scores over steps, the best step marked."""

from collections.abc import Mapping, Sequence
from typing import Any

from etherdiff.report.charts import Mark, Point, Series, chart
from etherdiff.report.contents import Contents
from etherdiff.report.markup import Html, details, foreign, join, table, tag
from etherdiff.report.numbers import counted, number, score

MAX_POINTS = 240
"""Points of a curve; more are averaged in groups."""
NEIGHBOURS = 12
"""Points on either side that the smoothed loss averages."""
LABELS = {"dino": "DINO", "clip_t": "CLIP-T", "clip_i": "CLIP-I", "validation_loss": "validation loss", "loss": "training loss"}
NO_CURVE = ("step", "learning_rate", "loss", "validation_loss")


def curves_section(contents: Contents) -> Html | None:
    """Charts of everything that metrics.jsonl logs; None where it logs nothing."""
    rows = contents.curves
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if number(value) is not None))
    marks, steps = _best_mark(contents.best), (0, rows[-1]["step"])
    charts = [_loss_chart(rows, marks, steps)]
    for name in names:
        if name not in NO_CURVE:
            series = Series(LABELS.get(name, name), points(rows, name), dots=True)
            charts.append(chart(LABELS.get(name, name), [series], "step", marks, steps))
    skipped = sum("loss" in row and number(row["loss"]) is None for row in rows)
    told = [
        _best(contents.best),
        tag("p", f"{counted(skipped, 'step')} skipped: the loss or its gradient was NaN or infinite.") if skipped else None,
    ]
    return join(*told, tag("div", *charts, class_="charts"), _numbers(rows, [n for n in names if n not in NO_CURVE[:3]]))


def points(rows: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """(step, value) wherever the value is a finite number."""
    return [(row["step"], value) for row in rows if (value := number(row.get(name))) is not None]


def thinned(values: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most `most` points: each the mean of neighbours."""
    size = -(-len(values) // most) or 1
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def smoothed(values: Sequence[Point], neighbours: int = NEIGHBOURS) -> list[Point]:
    """Each value averaged with as many neighbours on its left as on its right."""
    found = []
    for place, (x, _) in enumerate(values):
        reach = min(neighbours, place, len(values) - 1 - place)
        window = values[place - reach : place + reach + 1]
        found.append((x, sum(y for _, y in window) / len(window)))
    return found


def _loss_chart(rows: Sequence[Mapping[str, Any]], marks: Sequence[Mark], steps: tuple[float, float]) -> Html:
    loss, validation = thinned(points(rows, "loss")), points(rows, "validation_loss")
    is_noisy = len(loss) > 2 * NEIGHBOURS
    series = [
        Series("each step", loss if is_noisy else [], faint=True),
        Series("training loss, smoothed" if is_noisy else "training loss", smoothed(loss) if is_noisy else loss),
        Series("validation loss", validation, colour=1, dots=True),
    ]
    return chart("Loss", series, "step", marks, steps)


def _best_mark(best: Mapping[str, Any] | None) -> list[Mark]:
    step = number((best or {}).get("step"))
    return [] if step is None else [Mark(step, f"best: {step:,.0f}")]


def _best(best: Mapping[str, Any] | None) -> Html | None:
    step, value = (number((best or {}).get(key)) for key in ("step", "score"))
    if best is None or step is None:
        return None
    why = best.get("why")
    scored = f", with a score of {score(value)}" if value is not None else ""
    return tag("p", tag("strong", f"Best step: {step:,.0f}"), scored, ". ", foreign(why) if isinstance(why, str) else None)


def _numbers(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Html | None:
    """The steps that were evaluated, as a table."""
    evaluated = [row for row in rows if any(number(row.get(name)) is not None for name in names)]
    if not names or not evaluated:
        return None
    head = ["step", *(LABELS.get(name, name) for name in names)]
    cells = [[f"{row['step']:,}", *(score(number(row.get(name))) for name in names)] for row in evaluated]
    return details("The numbers", table(head, cells, "numbers", "Evaluations by step"))
