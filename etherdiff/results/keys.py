"""What runs are sorted by (configuration keys, and a few other names) and what columns can show (scores and facts)."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etherdiff.adapters.methods import label_styles
from etherdiff.eval.metrics import CONTROL_METRICS, HELD_OUT, METRICS
from etherdiff.report.scores import score_title
from etherdiff.results.facts import FACTS
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError

NEUTRAL = frozenset(
    {"output", "overwrite", "dry_run", "data_root", "captions", "tracker", "device", "checkpoint_every", "keep"}
    | {"eval_every", "eval_scores", "sample_every", "sample_prompts", "sample_count", "gradient_checkpointing", "skip_bad"}
)
"""Keys that the result does not depend on: the place of a run, and what it records."""
REPEATED = frozenset({"seed", "subject", "class_noun"})
"""Keys that may differ within a row: scores are averaged over them."""
Value = Any
"""Value of a key: text, a number, a boolean or None."""


_SPECIAL: dict[str, Callable[[Run], Value]] = {
    "run": lambda run: run.name,
    "task": lambda run: run.task,
    "method": lambda run: run.method_label,
    "subject": lambda run: run.subject_name,
    "dataset": lambda run: run.subject_name,
    "base": lambda run: _short_path(run.config.base),
    "refit": lambda run: getattr(run.config, "refit", None) is not None,
    "checkpoint": lambda run: run.result and run.result.run.checkpoint,
    "checkpoint_step": lambda run: run.result and run.result.run.step,
}


def value_of(run: Run, key: str) -> Value:
    """Return the value of a key; None where the run has no such key, or none is set."""
    if key in _SPECIAL:
        return _SPECIAL[key](run)
    value = getattr(run.config, key, None)
    return _short_path(value) if isinstance(value, Path) else value


def check_keys(keys: Sequence[str], runs: Sequence[Run], option: str) -> list[str]:
    """Return what is wrong with the keys of an option, a sentence each."""
    known = {*_SPECIAL, *(name for run in runs for name in type(run.config).model_fields)}
    found = []
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f" (there are: {', '.join(sorted(known))})"
            found.append(f"--{option} {key}: runs have no such key{hint}")
    if len(set(keys)) < len(keys):
        found.append(f"--{option}: {', '.join(keys)} names a key twice")
    return found


def shown(value: Value) -> str:
    """Write a value for a table."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def group(runs: Sequence[Run], keys: Sequence[str]) -> dict[tuple[Value, ...], list[Run]]:
    """Group runs by their values of the keys; methods in the paper's order, numbers by size."""
    found: dict[tuple[Value, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(_hashable(value_of(run, key)) for key in keys), []).append(run)
    return {values: found[values] for values in sorted(found, key=lambda values: [_order(value) for value in values])}


def refuse_mixtures(groups: Mapping[tuple[Value, ...], Sequence[Run]], keys: Sequence[str], option: str) -> None:
    """Raise UserError if runs to average differ in more than seed and subject, or are the same run twice."""
    problems = []
    for values, runs in groups.items():
        name = " ".join(shown(value) for value in values)
        if differing := _differing(runs, keys):
            differences = "; ".join(f"{key}: {', '.join(texts)}" for key, texts in differing.items())
            problems.append(f"the runs of {name!r} differ in {differences}: add what distinguishes them to --{option}")
            continue
        seen: dict[tuple[Value, ...], str] = {}
        for run in runs:
            mine = (value_of(run, "subject"), value_of(run, "seed"))
            if mine in seen:
                problems.append(f"{seen[mine]} and {run.folder.path} are the same run twice: leave one of them out")
            seen[mine] = str(run.folder.path)
    if problems:
        raise UserError(problems)


def _differing(runs: Sequence[Run], keys: Sequence[str]) -> dict[str, list[str]]:
    """Return the keys with several values among the runs, except `keys`, each with its values."""
    fields = dict.fromkeys(name for run in runs for name in type(run.config).model_fields)
    compared = [name for name in ("task", *fields) if name not in NEUTRAL | REPEATED | {*keys}]
    found = {}
    for name in dict.fromkeys(compared):
        texts = list(dict.fromkeys(shown(_hashable(value_of(run, name))) for run in runs))
        if len(texts) > 1:
            found[name] = texts
    weights = {str(run.provenance.base.fingerprint) for run in runs}
    return found | ({"the base's weights": ["of other files"]} if len(weights) > 1 else {})


def _hashable(value: Value) -> Value:
    return tuple(value) if isinstance(value, list) else value


def _short_path(value: Any) -> str:
    """Return a path's last part; any other name as it is."""
    text = str(value)
    return Path(text).name if Path(text).is_absolute() else text


def _order(value: Value) -> tuple[int, float, str]:
    styles = label_styles()
    if value in styles:
        return 0, styles[value].place, ""
    if isinstance(value, int | float):
        return 1, float(value), ""
    return (3, 0.0, "") if value is None else (2, 0.0, str(value))


# --- Columns ----------------------------------------------------------------------------------------------------------


SUBJECT_COLUMNS = ("trainable_parameters", "dino", "dino_held_out", "clip_i", "clip_t", "lpips_to_real")
"""Columns of the paper's Table 2, and the score that does not reward copying."""


@dataclass(frozen=True)
class Quantity:
    """A column of a table, or a panel of a figure."""

    name: str
    label: str
    is_score: bool
    higher_is_better: bool | None
    """None if it is neither good nor bad."""
    unit: float = 1
    """Unit of the shown number."""


def column(name: str) -> Quantity:
    """Return the quantity of a valid name (see `column_problems`)."""
    if name in FACTS:
        entry = FACTS[name]
        return Quantity(name, entry.label, False, entry.higher_is_better, entry.unit)
    base = name.removesuffix(HELD_OUT)
    return Quantity(name, score_title(name), True, METRICS[base].higher_is_better)


def is_score(name: str) -> bool:
    """Say whether a name is that of a score, against held-out images or not."""
    return name.removesuffix(HELD_OUT) in METRICS


def scores_behind(names: Sequence[str]) -> list[str]:
    """Return the scores that columns show or are computed from."""
    found = [FACTS[name].scores if name in FACTS else (name,) for name in names]
    return list(dict.fromkeys(score for scores in found for score in scores))


def column_problems(names: Sequence[str], option: str) -> list[str]:
    """Return what is wrong with the names of an option, a sentence each."""
    known = [*METRICS, *FACTS]
    found = []
    for name in names:
        if not is_score(name) and name not in FACTS:
            close = difflib.get_close_matches(name.replace("-", "_"), [*known, *(f"{one}{HELD_OUT}" for one in METRICS)], n=1)
            hint = f"; did you mean {close[0]}?" if close else f" (there are: {', '.join(known)}, and scores with {HELD_OUT})"
            found.append(f"--{option} {name}: there is no such score or fact{hint}")
    if len(set(names)) < len(names):
        found.append(f"--{option}: {', '.join(names)} names a column twice")
    return found


def usual_columns(runs: Sequence[Run]) -> list[str]:
    """Return the paper's columns for the runs' task, if any run has the score."""
    signals = dict.fromkeys(str(getattr(run.config, "signal", "")) for run in runs)
    if runs[0].task == "s2i":
        wanted = ["trainable_parameters", *(name for signal in signals for name in CONTROL_METRICS.get(signal, ()))]
    else:
        wanted = list(SUBJECT_COLUMNS)
    return [name for name in dict.fromkeys(wanted) if name in FACTS or any(name in run.scores for run in runs)]
