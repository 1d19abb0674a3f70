"""What runs are sorted by: configuration keys, and a few names that are no keys but tell runs apart all the same."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etherdiff.adapters.methods import label_styles
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError

NEUTRAL = frozenset(
    {"output", "overwrite", "dry_run", "data_root", "captions", "tracker", "device", "checkpoint_every", "keep"}
    | {"eval_every", "eval_scores", "sample_every", "sample_prompts", "sample_count", "gradient_checkpointing", "skip_bad"}
)
"""Where a run lies and what is recorded of it: keys that its result does not depend on."""
REPEATED = frozenset({"seed", "subject", "class_noun"})
"""What runs of one row may differ in: their scores are averaged over it."""
Value = Any
"""Of a key: text, a number, a truth value or None."""


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
    """The value of a key; None where the run has no such key, or none is set."""
    if key in _SPECIAL:
        return _SPECIAL[key](run)
    value = getattr(run.config, key, None)
    return _short_path(value) if isinstance(value, Path) else value


def check_keys(keys: Sequence[str], runs: Sequence[Run], option: str) -> list[str]:
    """What is wrong with the keys given with an option, a sentence each."""
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
    """A value as a table tells it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def group(runs: Sequence[Run], keys: Sequence[str]) -> dict[tuple[Value, ...], list[Run]]:
    """Runs by their values of the keys, in an order that a reader expects: methods as in the paper, numbers by size."""
    found: dict[tuple[Value, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(_hashable(value_of(run, key)) for key in keys), []).append(run)
    return {values: found[values] for values in sorted(found, key=lambda values: [_order(value) for value in values])}


def refuse_mixtures(groups: Mapping[tuple[Value, ...], Sequence[Run]], keys: Sequence[str], option: str) -> None:
    """UserError where runs would be averaged that differ in more than seed and subject, or are the same run twice."""
    problems = []
    for values, runs in groups.items():
        name = " ".join(shown(value) for value in values)
        if differing := _differing(runs, keys):
            told = "; ".join(f"{key}: {', '.join(texts)}" for key, texts in differing.items())
            problems.append(f"the runs of {name!r} differ in {told}: name what tells them apart in --{option}")
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
    """Key -> the values that it has among the runs, where there are several and the key is none of those given."""
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
    """A path's last part; any other name as it is."""
    text = str(value)
    return Path(text).name if Path(text).is_absolute() else text


def _order(value: Value) -> tuple[int, float, str]:
    styles = label_styles()
    if value in styles:
        return 0, styles[value].place, ""
    if isinstance(value, int | float):
        return 1, float(value), ""
    return (3, 0.0, "") if value is None else (2, 0.0, str(value))
