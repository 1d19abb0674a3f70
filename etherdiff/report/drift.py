"""How far each layer has moved from the base: charts, and the numbers of every layer."""

import math
from collections.abc import Callable, Mapping, Sequence

from etherdiff.adapters.drift import LayerDrift
from etherdiff.adapters.methods import METHODS
from etherdiff.report.charts import Point, Series, chart
from etherdiff.report.contents import Contents
from etherdiff.report.markup import Html, details, facts, join, table, tag
from etherdiff.report.numbers import score


def drift_section(contents: Contents) -> Html:
    """‖T - I‖_F where the method multiplies, ‖W' - W‖_F always; or why it is not known."""
    found = contents.drift
    if not found:
        return tag("p", contents.why_no_drift, class_="note")
    multiplies = any(drift.input_side is not None or drift.output_side is not None for drift in found.values())
    method = METHODS.get(contents.config.method)
    bound = method and method.bound if multiplies else "The method adds to the weights: it has no transformation."
    transformation = chart(
        "Transformation distance ‖T − I‖",
        [
            _series("input side", found, lambda drift: drift.input_side, 0),
            _series("output side", found, lambda drift: drift.output_side, 1),
        ],
        "layer, in the network's order",
        from_zero=True,
    )
    weight = chart(
        "Weight distance ‖W′ − W‖ / ‖W‖",
        [_series("weight", found, _relative, 2)],
        "layer, in the network's order",
        from_zero=True,
    )
    return join(
        facts(_summary(found)),
        tag("p", bound, class_="note") if bound else None,
        tag("div", transformation, weight, class_="charts"),
        _layers(found, multiplies),
    )


def _relative(drift: LayerDrift) -> float | None:
    return drift.weight / drift.base_norm if drift.base_norm else None


def _series(name: str, found: Mapping[str, LayerDrift], value: Callable[[LayerDrift], float | None], colour: int) -> Series:
    points: list[Point] = []
    names = []
    for place, (layer, drift) in enumerate(found.items(), 1):
        distance = value(drift)
        if distance is not None and math.isfinite(distance):
            points.append((place, distance))
            names.append(f"{layer}: {score(distance)}")
    return Series(name, points, colour, line=False, dots=True, names=names)


def _summary(found: Mapping[str, LayerDrift]) -> dict[str, object]:
    sides = [side for drift in found.values() for side in (drift.input_side, drift.output_side) if side is not None]
    total = math.sqrt(sum(drift.weight**2 for drift in found.values()))
    norm = math.sqrt(sum(drift.base_norm**2 for drift in found.values()))
    return {
        "layers": f"{len(found):,}",
        "mean ‖T − I‖": score(_mean(sides)) if sides else None,
        "largest ‖T − I‖": score(max(sides)) if sides else None,
        "‖W′ − W‖, all layers": score(total),
        "relative to ‖W‖": f"{100 * total / norm:.2f}%" if norm else None,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _layers(found: Mapping[str, LayerDrift], multiplies: bool) -> Html:
    head = ["layer", *(["‖T − I‖ input", "‖T − I‖ output"] if multiplies else []), "‖W′ − W‖", "‖W‖"]
    rows: list[list[object]] = []
    for layer, drift in found.items():
        sides = [score(drift.input_side), score(drift.output_side)] if multiplies else []
        rows.append([layer, *sides, score(drift.weight), score(drift.base_norm)])
    return details(f"All {len(found):,} layers", table(head, rows, "numbers layers", "Drift of each layer"))
