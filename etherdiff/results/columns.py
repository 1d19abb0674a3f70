"""What the columns of a table or the panels of a figure can be: scores and facts, by name."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from etherdiff.eval.metrics import CONTROL_METRICS, HELD_OUT, METRICS
from etherdiff.report.scores import score_title
from etherdiff.results.facts import FACTS
from etherdiff.runs.run import Run

SUBJECT_COLUMNS = ("trainable_parameters", "dino", "dino_held_out", "clip_i", "clip_t", "lpips_to_real")
"""Of the paper's Table 2; and the score that does not reward copying."""


@dataclass(frozen=True)
class Quantity:
    """One quantity."""

    name: str
    label: str
    is_score: bool
    higher_is_better: bool | None
    """None for what is neither good nor bad."""
    unit: float = 1
    """What people read it in."""


def column(name: str) -> Quantity:
    """The quantity of a name that `column_problems` has nothing against."""
    if name in FACTS:
        entry = FACTS[name]
        return Quantity(name, entry.label, False, entry.higher_is_better, entry.unit)
    base = name.removesuffix(HELD_OUT)
    return Quantity(name, score_title(name), True, METRICS[base].higher_is_better)


def is_score(name: str) -> bool:
    """Whether a name is that of a score, against held-out images or not."""
    return name.removesuffix(HELD_OUT) in METRICS


def scores_behind(names: Sequence[str]) -> list[str]:
    """The scores that columns are, or are made of."""
    found = [FACTS[name].scores if name in FACTS else (name,) for name in names]
    return list(dict.fromkeys(score for scores in found for score in scores))


def column_problems(names: Sequence[str], option: str) -> list[str]:
    """What is wrong with the names given with an option, a sentence each."""
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
    """The paper's columns for the runs' task: those of its scores that any run has."""
    signals = dict.fromkeys(str(getattr(run.config, "signal", "")) for run in runs)
    if runs[0].task == "s2i":
        wanted = ["trainable_parameters", *(name for signal in signals for name in CONTROL_METRICS.get(signal, ()))]
    else:
        wanted = list(SUBJECT_COLUMNS)
    return [name for name in dict.fromkeys(wanted) if name in FACTS or any(name in run.scores for run in runs)]
