"""Scores with intervals, compared with the base, real images and the paper; scores of prompts; what is left out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from etherdiff.eval.metrics import HELD_OUT, METRICS
from etherdiff.report.charts import Point, interval_bar
from etherdiff.report.contents import Contents
from etherdiff.runs.result import EvalResult, Score, SetScores
from etherdiff.system.text import counted, program, score

TITLES = {"loss": "training loss", **{name: metric.title for name, metric in METRICS.items()}}
REASONS = {
    "black": "black images, as a safety checker leaves them",
    "unreadable": "unreadable images",
    "bad_features": "images whose features are not finite",
    "no_face": "images in which no face is found",
    "missing": "prompts with another number of images than wanted",
    "long_prompts": "prompts longer than the text encoder reads",
}
SETS = {
    "shuffled_images": "with another's control",
    "uncontrolled_images": "without control",
    "real_images": "real images",
}
"""Set of images that a controllable run is compared with -> label."""
HEADLINE = ("dino", "clip_i", "clip_t", "miou", "fid")
BASELINES = {entry.baseline for entry in METRICS.values() if entry.baseline}
MAX_LISTED = 50
"""Maximum entries of one kind that are listed; the others are counted."""


@dataclass(frozen=True)
class ScoreRow:
    """A mean with its interval."""

    whose: str
    score: Score
    paper: float | None
    is_run: bool
    bar: tuple[float, float | None, float | None]


def score_title(name: str) -> str:
    """Return the title of a score or a curve."""
    plain = name.removesuffix(HELD_OUT)
    return TITLES.get(plain, plain.replace("_", " ")) + (", held-out images" if name != plain else "")


def headline(result: EvalResult | None) -> dict[str, str]:
    """Return the scores at the top of the page."""
    scores = result.scores if result else {}
    return {score_title(name): score(scores[name].mean) for name in HEADLINE if name in scores}


def left_out_count(result: EvalResult | None) -> int:
    """Count the images and prompts that are left out of scores."""
    return sum(len(entries) for _, of in _both(result) for entries in of.left_out.values())


def scores_view(contents: Contents) -> dict[str, Any]:
    """Return the values of the template `scores`; without an evaluation, the command for one."""
    result = contents.result
    if result is None:
        return {"command": program("eval", contents.run.path)}
    paper = {name: one.value for name, one in result.paper.scores.items() if not one.differs}
    names = [name for name in result.scores if not name.endswith(HELD_OUT) and name not in BASELINES]
    return {
        "command": "",
        "is_tiny": contents.run.config.base == "tiny",
        "groups": [(_group_title(name), _rows(name, result, paper, contents.run.method_label)) for name in names],
        "note": _note(result, bool(paper)),
        "not_scored": [(score_title(name) + of, why) for of, found in _both(result) for name, why in found.not_scored.items()],
        "left_out": _left_out(result) if left_out_count(result) else [],
        "identities": [_identity(name, one) for name, one in result.scores.items()],
    }


def per_prompt(result: EvalResult | None) -> dict[str, Any] | None:
    """Return a row per prompt; the cells of a score are tinted between its lowest and its highest."""
    rows = result.per_prompt if result else []
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    if not names:
        return None
    columns = [[one.mean if (one := row.scores.get(name)) else None for row in rows] for name in names]
    tinted = [_tinted(column, _range(column)) for column in columns]
    cells = [[column[place] for column in tinted] for place in range(len(rows))]
    return {"titles": [score_title(name) for name in names], "rows": list(zip(rows, cells, strict=True))}


def per_class(result: EvalResult | None) -> list[Any]:
    """Return a row per class of a segmentation map; none for any other run."""
    rows = result.per_class if result else []
    return list(zip(rows, _tinted([row.iou for row in rows], (0.0, 1.0)), strict=True))


def _both(result: EvalResult | None) -> list[tuple[str, SetScores]]:
    """Return the results of the run's images and of the base's, with the suffix of their titles."""
    return [] if result is None else [("", result), *([(" (base)", result.base)] if result.base else [])]


def _group_title(name: str) -> tuple[str, str]:
    """Return a score's title and definition."""
    entry = METRICS.get(name)
    better = "" if entry is None else "higher is better" if entry.higher_is_better else "lower is better"
    return score_title(name), f"{entry.definition}, {better}" if entry else ""


def _rows(name: str, result: EvalResult, paper: dict[str, float], method: str) -> list[ScoreRow]:
    """Return a score's part of the table: this run, the base, both to held-out images, real images, further sets."""
    base = result.base.scores if result.base else {}
    baseline = (METRICS[name].baseline if name in METRICS else None) or ""
    candidates = {
        method: (result.scores.get(name), paper.get(name)),
        "base": (base.get(name), None),
        f"{method}, to held-out images": (result.scores.get(name + HELD_OUT), None),
        "base, to held-out images": (base.get(name + HELD_OUT), None),
        "real images": (result.scores.get(baseline), paper.get(baseline)),
        **{SETS.get(of, of): (found.scores.get(name), None) for of, found in result.beside.items()},
    }
    present = {whose: (one, printed) for whose, (one, printed) in candidates.items() if one is not None}
    ends = [value for one, _ in present.values() for value in (one.mean, one.low, one.high) if value is not None]
    domain = (min(ends), max(ends))
    return [
        ScoreRow(whose, one, printed, whose.startswith(method), interval_bar(one.mean, one.low, one.high, domain))
        for whose, (one, printed) in present.items()
    ]


def _note(result: EvalResult, has_paper: bool) -> str:
    """Return what was scored, what the intervals are over, and the setting of the paper's numbers."""
    units = dict.fromkeys(str(one.interval["over"]) for one in result.scores.values() if "over" in one.interval)
    sentences = [
        f"Scored: {result.run.checkpoint}, step {result.run.step}." if result.run.step is not None else "",
        f"An interval says how the score would move with other {' or '.join(units)}." if units else "",
        f"The paper's: {result.paper.scope}."
        if has_paper
        else "The paper's numbers are shown only where everything is as in the paper.",
    ]
    return " ".join(text for text in sentences if text)


def _left_out(result: EvalResult) -> list[tuple[str, int, int, list[str], int]]:
    """Return for each reason: the number of the run's and of the base's images, the first of them, the number of others."""
    own, base = result.left_out, result.base.left_out if result.base else {}
    found = []
    for reason in dict.fromkeys([*own, *base]):
        entries = [*own.get(reason, []), *base.get(reason, [])]
        named = [", ".join(f"{name.replace('_', ' ')} {value}" for name, value in one.items()) for one in entries[:MAX_LISTED]]
        counts = len(own.get(reason, [])), len(base.get(reason, []))
        found.append((REASONS.get(reason, reason.replace("_", " ")), *counts, named, len(entries) - len(named)))
    return found


def _identity(name: str, one: Score) -> tuple[str, str, str]:
    """Return a score's title, what it is a mean of, and how it was computed."""
    counts = [counted(one.n, "image"), *([counted(round(one.pairs), "pair")] if one.pairs is not None else [])]
    return score_title(name), ", ".join(counts), json.dumps(one.identity, indent=2, ensure_ascii=False)


def _range(values: Sequence[float | None]) -> Point:
    known = [value for value in values if value is not None]
    return min(known, default=0.0), max(known, default=0.0)


def _tinted(values: Sequence[float | None], low_high: Point) -> list[tuple[str, int]]:
    """Return each value as text, with its place between low and high in percent."""
    low, high = low_high
    return [
        (score(value), 0 if value is None or high == low else round(100 * (value - low) / (high - low))) for value in values
    ]
