"""Scores with intervals beside the base's, the real images' and the paper's; what each prompt got; what was left out."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from etherdiff.eval.metrics import HELD_OUT, METRICS
from etherdiff.report.charts import interval_bar
from etherdiff.report.contents import Contents, mapping, sequence
from etherdiff.report.markup import Html, details, foreign, join, table, tag
from etherdiff.report.numbers import counted, number, score

NAMES = {name: metric.title for name, metric in METRICS.items() if metric.compares != "real x other real"}
REASONS = {
    "black": "black images, as a safety checker leaves them",
    "unreadable": "unreadable images",
    "bad_features": "images whose features are not finite",
    "no_face": "images in which no face is found",
    "missing": "prompts with another number of images than wanted",
    "long_prompts": "prompts longer than the text encoder reads",
}
TINY_NOTE = "On the tiny base these scores show the method at work; they say nothing about Stable Diffusion 1.5."
HEAD = ("", "mean", "95% interval", "", "paper", "n")
BESIDE = {
    "shuffled_images": "with another's control",
    "uncontrolled_images": "without control",
    "real_images": "real images",
}
"""Sets of images that a controllable run is scored beside -> what they are called."""
LISTED = 50
"""Entries of one kind that are named; the others are counted."""


def scores_section(contents: Contents) -> Html:
    """The table of scores; without an evaluation, how to make one."""
    result = contents.result
    if result is None:
        command = f"etherdiff eval {shlex.quote(str(contents.path))}"
        return join(
            tag("p", "This run has not been scored. This draws its evaluation images, scores them and writes this page anew:"),
            tag("pre", tag("code", command, dir="ltr")),
        )
    scores = mapping(result.get("scores"))
    groups = [name for name in scores if not name.endswith(HELD_OUT) and name not in _baselines()]
    base = mapping(mapping(result.get("base")).get("scores"))
    paper = _papers(result)
    beside = {BESIDE.get(name, name): mapping(found) for name, found in mapping(result.get("beside")).items()}
    bodies = [_score_rows(name, scores, base, paper, contents.config.method, beside) for name in groups]
    return join(
        tag("p", TINY_NOTE, class_="note") if contents.config.base == "tiny" else None,
        _grouped(HEAD, bodies) if bodies else tag("p", "There is no score."),
        _footnotes(result, paper),
        _not_scored(result),
        _left_out(result),
        details("How the scores were computed", *_identities(scores)),
    )


def per_prompt_section(contents: Contents) -> Html | None:
    """A row per prompt; each score's cells are tinted between its lowest and its highest."""
    rows = [mapping(row) for row in sequence((contents.result or {}).get("per_prompt"))]
    names = list(dict.fromkeys(name for row in rows for name in mapping(row.get("scores"))))
    if not rows or not names:
        return None
    columns = [[number(mapping(mapping(row.get("scores")).get(name)).get("mean")) for row in rows] for name in names]
    ranges = [_range(column) for column in columns]
    body = []
    for place, row in enumerate(rows):
        cells = [_tinted(column[place], low_high) for column, low_high in zip(columns, ranges, strict=True)]
        body.append([foreign(row.get("prompt") or "–"), _whole(row.get("n")), *cells])
    return table(["prompt", "images", *map(_title, names)], body, "numbers prompts", "Scores of each prompt")


def per_class_section(contents: Contents) -> Html | None:
    """A row per class of a segmentation map; None for any other run."""
    rows = [mapping(row) for row in sequence((contents.result or {}).get("per_class"))]
    if not rows:
        return None
    ious = [number(row.get("iou")) for row in rows]
    body = [
        [
            foreign(row.get("name") or "–"),
            _tinted(iou, (0.0, 1.0)),
            score(number(row.get("accuracy"))),
            _whole(row.get("pixels_wanted")),
        ]
        for row, iou in zip(rows, ious, strict=True)
    ]
    return table(["class", "IoU", "accuracy", "pixels in the maps"], body, "numbers prompts", "Scores of each class")


def headline(contents: Contents) -> dict[str, str]:
    """The scores that stand at the top of the page."""
    scores = mapping((contents.result or {}).get("scores"))
    found = {}
    for name in ("dino", "clip_i", "clip_t", "miou", "fid"):
        if (mean := number(mapping(scores.get(name)).get("mean"))) is not None:
            found[NAMES[name]] = score(mean)
    return found


def left_out_count(result: Mapping[str, Any]) -> int:
    """How many images and prompts are in no score, or not in all."""
    return sum(len(sequence(entries)) for _, of in _both(result) for entries in mapping(of.get("left_out")).values())


def _baselines() -> set[str]:
    return {entry.baseline for entry in METRICS.values() if entry.baseline}


def _title(name: str) -> str:
    plain = name.removesuffix(HELD_OUT)
    return NAMES.get(plain, plain) + (", held-out images" if name != plain else "")


def _papers(result: Mapping[str, Any]) -> dict[str, float]:
    """Score -> the paper's number, where it was computed in the same setting."""
    found = {}
    for name, one in mapping(mapping(result.get("paper")).get("scores")).items():
        value = number(mapping(one).get("value"))
        if value is not None and mapping(one).get("differs") == []:
            found[name] = value
    return found


def _score_rows(
    name: str,
    scores: Mapping[str, Any],
    base: Mapping[str, Any],
    paper: Mapping[str, float],
    method: str,
    beside: Mapping[str, Mapping[str, Any]],
) -> Html:
    """A score's part of the table: this run, the base, both to held-out images, real images; or the sets beside it."""
    entry = METRICS.get(name)
    baseline = entry.baseline or "" if entry else ""
    candidates = {
        method: (mapping(scores.get(name)), paper.get(name)),
        "base": (mapping(base.get(name)), None),
        f"{method}, to held-out images": (mapping(scores.get(name + HELD_OUT)), None),
        "base, to held-out images": (mapping(base.get(name + HELD_OUT)), None),
        "real images": (mapping(scores.get(baseline)), paper.get(baseline)),
        **{who: (mapping(mapping(found.get("scores")).get(name)), None) for who, found in beside.items()},
    }
    present = {who: found for who, found in candidates.items() if number(found[0].get("mean")) is not None}
    ends = [number(one.get(key)) for one, _ in present.values() for key in ("mean", "low", "high")]
    known = [value for value in ends if value is not None]
    domain = (min(known, default=0.0), max(known, default=1.0))
    better = "" if entry is None else ", higher is better" if entry.higher_is_better else ", lower is better"
    definition = tag("span", f"{entry.definition}{better}", class_="definition") if entry else None
    title = tag("tr", tag("th", tag("span", _title(name)), " ", definition, scope="rowgroup", colspan=len(HEAD)))
    rows = [_score_row(who, one, printed, domain, who.startswith(method)) for who, (one, printed) in present.items()]
    return tag("tbody", title, *rows)


def _score_row(who: str, one: Mapping[str, Any], printed: float | None, domain: tuple[float, float], is_run: bool) -> Html:
    mean, low, high = (number(one.get(key)) for key in ("mean", "low", "high"))
    assert mean is not None
    cells = [
        score(mean),
        "–" if low is None or high is None else f"{score(low)} … {score(high)}",
        interval_bar(mean, low, high, domain, 0 if is_run else 2),
        score(printed),
        _whole(one.get("n")),
    ]
    return tag("tr", tag("th", who, scope="row"), *(tag("td", cell) for cell in cells))


def _grouped(head: Sequence[str], bodies: Sequence[Html]) -> Html:
    header = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    grid = tag("table", header, *bodies, class_="numbers scores")
    return tag("div", grid, class_="scroll", tabindex="0", role="region", aria_label="Scores")


def _footnotes(result: Mapping[str, Any], paper: Mapping[str, float]) -> Html:
    """What was scored, what the intervals are over, and whose setting the paper's numbers have."""
    run = mapping(result.get("run"))
    intervals = [mapping(mapping(one).get("interval")).get("over") for one in mapping(result.get("scores")).values()]
    over = " or ".join(dict.fromkeys(unit for unit in intervals if isinstance(unit, str)))
    told = [f"Scored: {run.get('checkpoint')}, step {run.get('step')}." if run.get("step") is not None else ""]
    told.append(f"An interval says how the score would move with other {over}." if over else "")
    scope = mapping(result.get("paper")).get("scope")
    told.append(
        f"The paper's: {scope}." if paper else "The paper's numbers stand here only where everything is as in the paper."
    )
    return tag("p", foreign(" ".join(text for text in told if text)), class_="note")


def _not_scored(result: Mapping[str, Any]) -> Html | None:
    told = [
        tag("li", tag("strong", _title(name)), whose, ": ", foreign(why))
        for whose, of in _both(result)
        for name, why in mapping(of.get("not_scored")).items()
    ]
    return join(tag("h3", "Not scored"), tag("ul", *told)) if told else None


def _both(result: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What is said of the run's images, and of the base's."""
    return [("", mapping(result)), (" (base)", mapping(result.get("base")))]


def _left_out(result: Mapping[str, Any]) -> Html:
    """Counts of what is in no score, with the entries themselves."""
    if not left_out_count(result):
        return tag("p", "Nothing was left out of the scores.", class_="note")
    own, base = (mapping(of.get("left_out")) for _, of in _both(result))
    rows: list[list[object]] = []
    for reason in dict.fromkeys([*own, *base]):
        of_run, of_base = sequence(own.get(reason)), sequence(base.get(reason))
        kind = REASONS.get(reason, reason.replace("_", " "))
        rows.append([kind, f"{len(of_run):,}", f"{len(of_base):,}", _which([*of_run, *of_base])])
    head = ["", "of the run", "of the base", ""]
    return join(tag("h3", "Left out of the scores"), table(head, rows, "numbers left-out", "Left out of the scores"))


def _which(entries: Sequence[Any]) -> Html | None:
    if not entries:
        return None
    named = [tag("li", foreign(_described(mapping(entry)))) for entry in entries[:LISTED]]
    if len(entries) > LISTED:
        named.append(tag("li", f"and {len(entries) - LISTED:,} more, in eval/metrics.json"))
    return details("which", tag("ul", *named))


def _described(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in entry.items())


def _identities(scores: Mapping[str, Any]) -> list[Html]:
    found = []
    for name, one in scores.items():
        identity = mapping(mapping(one).get("identity"))
        text = json.dumps(identity, indent=2, ensure_ascii=False)
        title = tag("strong", _title(name) if name not in _baselines() else name.replace("_", " "))
        images = counted(int(n), "image") if (n := number(mapping(one).get("n"))) is not None else None
        pairs = counted(int(n), "pair") if (n := number(mapping(one).get("pairs"))) is not None else None
        of = ", ".join(part for part in (images, pairs) if part)
        found.append(join(tag("p", title, f" of {of}" if of else None), tag("pre", text, class_="identity")))
    return found


def _range(values: Sequence[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None]
    return min(known, default=0.0), max(known, default=0.0)


def _tinted(value: float | None, low_high: tuple[float, float]) -> Html:
    low, high = low_high
    share = 0 if value is None or high == low else round(100 * (value - low) / (high - low))
    return tag("span", score(value), class_="tint", style=f"--share: {share}%")


def _whole(value: Any) -> str:
    found = number(value)
    return "–" if found is None else f"{found:,.0f}"
