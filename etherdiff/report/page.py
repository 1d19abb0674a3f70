"""The report page: the contents of a run in the order and words of the templates."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etherdiff import __version__
from etherdiff.adapters.analysis import LayerDrift
from etherdiff.adapters.methods import METHODS
from etherdiff.report.charts import NEIGHBOURS, Chart, Mark, Point, Series, number, points, smoothed, thinned
from etherdiff.report.contents import Contents, Grid, Images
from etherdiff.report.html import Album, Thumbnail, foreign, parts, render
from etherdiff.report.scores import headline, left_out_count, per_class, per_prompt, score_title, scores_view
from etherdiff.runs.result import EvalResult
from etherdiff.system.text import counted, duration, score, short, size

MAX_PROMPTS = 40
MAX_SEEDS = 4
MAX_STEPS = 5
MAX_PHOTOS = 6
SHEET_SIDE = 1600
OPEN = 8
"""Number of prompts that are shown at once; the others are folded."""
BAD_IMAGES = ("black", "unreadable", "bad_features")
"""Kinds of images that are left out of scores."""
NO_CURVE = ("step", "learning_rate", "loss", "validation_loss")
NEVER_SAVED = ("overwrite", "dry_run")
LAYERS = "layer, in the network's order"
Row = Sequence[object]


@dataclass(frozen=True)
class Cells:
    """Cells for the template `table`; the first column has the names of the rows."""

    head: Row
    rows: Sequence[Row]
    kind: str
    """Classes of the style sheet."""
    label: str
    """Label for screen readers."""


@dataclass(frozen=True)
class Card:
    """The images of a prompt: name of the model or step -> a thumbnail per seed."""

    prompt: str
    rows: dict[str, list[Thumbnail]]


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    name: str
    """Name of its macro in the template, and of its anchor."""
    title: str
    content: Any


def make_page(contents: Contents) -> str:
    """Write the whole report. It depends on the run's files alone, not on the clock or the machine."""
    run = contents.run
    album = Album(expected_images(contents))
    sections = [
        *_pictures(contents, album),
        Section("scores", "Scores", scores_view(contents)),
        Section("prompts", "Prompt by prompt", per_prompt(contents.result)),
        Section("classes", "Class by class", per_class(contents.result)),
        Section("curves", "Learning curves", _curves(contents)),
        Section("cost", "Cost", _cost(contents)),
        Section("drift", "Drift from the base", _drift(contents)),
        Section("settings", "Settings", _settings(contents)),
    ]
    return render(
        "page.html.j2",
        title=f"{run.method_label} on {run.subject_name}",
        prompt=run.provenance.subject_prompt,
        facts=_key_facts(contents),
        warnings=_warnings(contents, album),
        sections=[section for section in sections if section.content],
        version=__version__,
        name=run.name,
    )


def _key_facts(contents: Contents) -> dict[str, object]:
    config, done = contents.run.config, contents.curves[-1]["step"] if contents.curves else 0
    seconds = contents.cost.seconds.get("train")
    return {
        "base": foreign(shown(config.base)),
        "steps": f"{done:,} of {config.steps:,}" if done < config.steps else f"{config.steps:,}",
        "trainable parameters": _trainable(contents),
        "training time": duration(seconds) if seconds is not None else None,
        **headline(contents.result),
    }


def _trainable(contents: Contents) -> str | None:
    return None if contents.trainable is None else f"{contents.trainable:,}"


def _warnings(contents: Contents, album: Album) -> list[str]:
    """Return the warnings at the top of the page."""
    found = list(contents.damaged)
    if album.not_shown:
        found.append(f"{counted(album.not_shown, 'image')} not shown, to keep the page small: they are in the run's folder")
    if count := left_out_count(contents.result):
        found.append(f"left out of the scores: {count:,} (images or prompts; see the scores for which)")
    return found


# --- Images ----------------------------------------------------------------------------------------------------------


def expected_images(contents: Contents) -> int:
    """Count about how many images the page will hold."""
    grids = [grid for group in (contents.evaluated, contents.sampled) for grid in group[:MAX_PROMPTS]]
    return MAX_PHOTOS + sum(min(len(images), MAX_SEEDS) for grid in grids for images in _rows(grid).values())


def _pictures(contents: Contents, album: Album) -> list[Section]:
    photos: dict[str, Any] = {"photos": [], "intro": "", "cards": [], "more": 0}
    if contents.subject:
        verb = "Trained on" if contents.run.config.steps else "Scored with"
        photos["intro"] = f"{verb} {counted(len(contents.subject), 'image')}:"
        photos["photos"] = [
            album.picture(path, f"training image {n}") for n, path in enumerate(contents.subject[:MAX_PHOTOS], 1)
        ]
    found = []
    if contents.sheet:
        sheet = album.picture(contents.sheet, "controls, generated and real images", SHEET_SIDE)
        found.append(Section("sheet", "Control and image", sheet))
    if contents.evaluated:
        note = "The base above, the adapted model below; a column per seed."
        cards = _cards(contents.evaluated, album, _refused(contents.result))
        found.append(Section("images", "Before and after", photos | {"note": note} | cards))
    if contents.sampled:
        note = "The same prompts and seeds at several steps, the base first."
        before = {"photos": [], "intro": "", "cards": []} if contents.evaluated else photos
        found.append(Section("samples", "During training", before | {"note": note} | _cards(contents.sampled, album, {})))
    if not found and photos["photos"]:
        found.append(Section("images", "The subject", photos | {"note": ""}))
    return found


def _cards(grids: Sequence[Grid], album: Album, refused: Mapping[tuple[bool, str, int], str]) -> dict[str, Any]:
    def pictures(name: str, images: Images, prompt: str) -> list[Thumbnail]:
        found = []
        for seed in list(images)[:MAX_SEEDS]:
            why = refused.get((name == "base", prompt, seed))
            alt, badge = f"{name}, seed {seed}: {prompt}", f"left out: {why}" if why else ""
            found.append(album.picture(images[seed], alt, badge=badge))
        return found

    cards = [
        Card(grid.prompt, {name: pictures(name, images, grid.prompt) for name, images in _rows(grid).items()})
        for grid in grids[:MAX_PROMPTS]
    ]
    return {"cards": cards, "open": OPEN, "more": len(grids) - len(cards)}


def _rows(grid: Grid) -> dict[str, Images]:
    """Choose the rows to show: all of a few, else the first, the last, and evenly spaced ones between."""
    names = list(grid.rows)
    if len(names) > MAX_STEPS:
        names = [names[round(place * (len(names) - 1) / (MAX_STEPS - 1))] for place in range(MAX_STEPS)]
    return {name: grid.rows[name] for name in names}


def _refused(result: EvalResult | None) -> dict[tuple[bool, str, int], str]:
    """Map (is it the base's, prompt, seed) of each image that is left out of scores to the reason."""
    found = {}
    for is_base, of in ((False, result), (True, result and result.base)):
        for reason in BAD_IMAGES if of else ():
            for entry in of.left_out.get(reason, []) if of else ():
                if isinstance(entry.get("prompt"), str) and isinstance(entry.get("seed"), int):
                    found[is_base, entry["prompt"], entry["seed"]] = reason.replace("_", " ")
    return found


# --- Training --------------------------------------------------------------------------------------------------------


def _curves(contents: Contents) -> dict[str, Any] | None:
    """Return charts of everything that metrics.jsonl logs; None if it logs nothing."""
    rows, best = contents.curves, contents.best
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if number(value) is not None))
    marks, steps = [Mark(best.step, f"best: {best.step:,}")] if best else [], (0, rows[-1]["step"])
    scored = [name for name in names if name not in NO_CURVE]
    charts = [
        Chart("Loss", _losses(rows), "step", marks, steps),
        *(
            Chart(score_title(name), [Series(score_title(name), points(rows, name), dots=True)], "step", marks, steps)
            for name in scored
        ),
    ]
    evaluated = [name for name in names if name not in NO_CURVE[:3]]
    cells = [
        [f"{row['step']:,}", *(score(number(row.get(name))) for name in evaluated)]
        for row in rows
        if any(number(row.get(name)) is not None for name in evaluated)
    ]
    return {
        "best": best,
        "skipped": sum("loss" in row and number(row["loss"]) is None for row in rows) - contents.run.diverged,
        "diverged_at": rows[-1]["step"] if contents.run.diverged else None,
        "charts": [chart for chart in charts if chart.drawn],
        "numbers": Cells(["step", *map(score_title, evaluated)], cells, "numbers", "Evaluations by step") if cells else None,
    }


def _losses(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    loss = thinned(points(rows, "loss"))
    is_noisy = len(loss) > 2 * NEIGHBOURS
    return [
        Series("each step", loss if is_noisy else [], faint=True),
        Series("training loss, smoothed" if is_noisy else "training loss", smoothed(loss) if is_noisy else loss),
        Series("validation loss", points(rows, "validation_loss"), colour=1, dots=True),
    ]


def _cost(contents: Contents) -> dict[str, Any] | None:
    """Return time, speed, memory and parameters; None if nothing is known."""
    cost = contents.cost
    stages = cost.seconds | {f"eval: {stage}": value for stage, value in contents.eval_cost.seconds.items()}
    total = sum(stages.values())
    facts: dict[str, object] = {
        "training": f"{short(cost.images_per_second)} images/s" if cost.images_per_second is not None else None,
        "peak memory": size(cost.peak_memory_bytes) if cost.peak_memory_bytes is not None else None,
        "trainable parameters": _trainable(contents),
        "adapter on disk": size(contents.adapter_bytes) if contents.adapter_bytes else None,
        "device": foreign(cost.device) if cost.device else None,
        "processes": cost.processes if cost.processes and cost.processes > 1 else None,
    }
    rows = [(stage.replace("_", " "), duration(value), value / total if total else 0) for stage, value in stages.items()]
    if not rows and all(value is None for value in facts.values()):
        return None
    return {"facts": facts, "stages": rows, "total": duration(total) if len(rows) > 1 else None}


# --- What was learned, and from what -----------------------------------------------------------------------------------


def _drift(contents: Contents) -> dict[str, Any]:
    """Return ‖T - I‖_F where the method multiplies, and ‖W' - W‖_F; or why they are unknown."""
    found = contents.drift
    if not found:
        return {"why_not": contents.why_no_drift}
    sides = [side for drift in found.values() for side in (drift.input_side, drift.output_side) if side is not None]
    total, norm = (math.hypot(*of) for of in zip(*((d.weight, d.base_norm) for d in found.values()), strict=True))
    transformation = [
        _layer_series("input side", found, lambda drift: drift.input_side, 0),
        _layer_series("output side", found, lambda drift: drift.output_side, 1),
    ]
    weight = _layer_series("weight", found, lambda drift: drift.weight / drift.base_norm if drift.base_norm else None, 2)
    charts = [
        Chart("Transformation distance ‖T − I‖", transformation, LAYERS, from_zero=True),
        Chart("Weight distance ‖W′ − W‖ / ‖W‖", [weight], LAYERS, from_zero=True),
    ]
    head = ["layer", *(["‖T − I‖ input", "‖T − I‖ output"] if sides else []), "‖W′ − W‖", "‖W‖"]
    rows = [
        [
            layer,
            *([score(drift.input_side), score(drift.output_side)] if sides else []),
            score(drift.weight),
            score(drift.base_norm),
        ]
        for layer, drift in found.items()
    ]
    return {
        "why_not": "",
        "facts": {
            "layers": f"{len(found):,}",
            "mean ‖T − I‖": score(sum(sides) / len(sides)) if sides else None,
            "largest ‖T − I‖": score(max(sides)) if sides else None,
            "‖W′ − W‖, all layers": score(total),
            "relative to ‖W‖": f"{100 * total / norm:.2f}%" if norm else None,
        },
        "note": _about_transformations(contents, bool(sides)),
        "charts": [chart for chart in charts if chart.drawn],
        "layers": Cells(head, rows, "numbers layers", "Drift of each layer"),
    }


def _about_transformations(contents: Contents, multiplies: bool) -> str | None:
    if len(contents.run.adapters) > 1:
        return "Magnitudes on top of the adapter that they were learned on: the weights of both together are compared."
    if not multiplies:
        return "The method adds to the weights: it has no transformation."
    method = METHODS.get(contents.run.config.method)
    return method.bound if method else None


def _layer_series(
    name: str, found: Mapping[str, LayerDrift], value: Callable[[LayerDrift], float | None], colour: int
) -> Series:
    placed: list[Point] = []
    names = []
    for place, (layer, drift) in enumerate(found.items(), 1):
        distance = value(drift)
        if distance is not None and math.isfinite(distance):
            placed.append((place, distance))
            names.append(f"{layer}: {score(distance)}")
    return Series(name, placed, colour, line=False, dots=True, names=names)


def _settings(contents: Contents) -> dict[str, Cells]:
    """Return settings that differ from the defaults, the others, and the provenance. Paths are cut to their names."""
    config = contents.run.config
    given: list[Row] = []
    others: list[Row] = []
    for name, option in type(config).model_fields.items():
        if name not in NEVER_SAVED:
            value = getattr(config, name)
            row = [parts().code(name), foreign(shown(value)), option.description]
            (others if value == option.default else given).append(row)
    head = ["option", "value", "what it is"]
    facts = [[name, foreign(shown(value))] for name, value in _flat(contents.run.provenance.content())]
    return {
        "given": Cells(head, given, "settings", "Settings that differ from the defaults"),
        "others": Cells(head, others, "settings", "Settings at their defaults"),
        "provenance": Cells(["fact", "value"], facts, "settings", "Provenance"),
    }


def shown(value: Any) -> str:
    """Write a setting as text; of an absolute path the last part."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " · ".join(shown(one) for one in value)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    text = str(value)
    return f"…/{Path(text).name}" if Path(text).is_absolute() and Path(text).name else text


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested names joined by dots."""
    found: list[tuple[str, Any]] = []
    for name, value in content.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [(f"{prefix}{name}", value)]
    return found
