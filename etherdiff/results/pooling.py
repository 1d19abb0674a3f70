"""Pool the runs of a row into one number with an interval; find the range of a setting with good scores.

- Several subjects: the seeds of each are averaged first, then `combine_subjects` pools them. Subjects are resampled (prompts,
  where there are too few subjects). The interval covers other subjects.
- One subject or dataset, several seeds: their mean, with the t interval over seeds. It covers other seeds.
- One run: its own interval, which covers other prompts or images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from etherdiff.eval.compare import combine_subjects
from etherdiff.eval.intervals import LEVEL, MIN_PROMPTS, Interval, bootstrap_mean
from etherdiff.eval.metrics import metric_of
from etherdiff.runs.result import PromptScore, Score, SetScores
from etherdiff.runs.run import Run


@dataclass(frozen=True)
class Cell:
    """A number in a row."""

    mean: float
    low: float | None
    high: float | None
    """Ends of the 95% interval; None if there is none."""
    over: str
    """Number and kind of the interval's units: "6 subjects", "3 seeds"; empty without an interval."""
    values: dict[str, float]
    """Run -> number."""
    differs: bool = False
    """Whether a part was computed differently from the rest of the table."""


class Scored(NamedTuple):
    """The scores of one run, or of its reference images."""

    run: str
    subject: str
    result: SetScores


def scored(runs: Sequence[Run]) -> list[Scored]:
    """Return the runs that were scored, with their own scores."""
    return [Scored(run.name, run.subject_name, run.result) for run in runs if run.result]


def pool_scores(everything: Sequence[Scored], name: str) -> Cell | None:
    """Pool a score of the runs that have it; None where none has, or where it cannot be averaged (FID over subjects).

    The runs may differ in subject and seed only.
    """
    of_subjects: dict[str, list[SetScores]] = {}
    values: dict[str, float] = {}
    for run, subject, result in everything:
        if name in result.scores:
            of_subjects.setdefault(subject, []).append(result)
            values[run] = result.scores[name].mean
    if not values:
        return None
    first = next(iter(of_subjects.values()))[0]
    if len(values) == 1:
        return _own_cell(first.scores[name], values)
    if len(of_subjects) == 1:
        return _over_seeds(list(values.values()), values)
    if metric_of(name).compares == "sets":
        return None
    results = {subject: _averaged(of, name, first.scores[name].identity) for subject, of in of_subjects.items()}
    pooled = combine_subjects(results)["scores"][name]
    unit = pooled["interval"]["over"]
    count = len(results) if unit == "subjects" else sum(len(one["per_prompt"]) for one in results.values())
    return Cell(pooled["mean"], pooled["low"], pooled["high"], _counted(count, unit, pooled["low"]), values)


def pool_numbers(numbers: Mapping[str, tuple[str, float]]) -> Cell | None:
    """Pool numbers without intervals of their own: run -> subject, number. None if there is none.

    Averaged over subjects (each the mean of its seeds), else over seeds. No interval if all are equal, or subjects are too few.
    """
    values = {run: number for run, (_, number) in numbers.items()}
    if not values:
        return None
    of_subjects: dict[str, list[float]] = {}
    for subject, number in numbers.values():
        of_subjects.setdefault(subject, []).append(number)
    means = [math.fsum(of) / len(of) for of in of_subjects.values()]
    if len(set(values.values())) == 1:
        return Cell(means[0], None, None, "", values)
    if len(means) == 1:
        return _over_seeds(list(values.values()), values)
    drawn = bootstrap_mean(means, [1] * len(means)) if len(means) >= MIN_PROMPTS else None
    low, high = drawn or (None, None)
    return Cell(math.fsum(means) / len(means), low, high, _counted(len(means), "subjects", low), values)


def t_interval(values: Sequence[float]) -> Interval | None:
    """Return mean ± t · s / √n of independent values, t with n - 1 degrees of freedom; None for fewer than two."""
    from scipy import stats

    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * math.sqrt(variance / count)
    return mean - reach, mean + reach


def _over_seeds(numbers: Sequence[float], values: dict[str, float]) -> Cell:
    low, high = t_interval(numbers) or (None, None)
    return Cell(math.fsum(numbers) / len(numbers), low, high, _counted(len(numbers), "seeds", low), values)


def _averaged(results: Sequence[SetScores], name: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return a subject's runs as one result for `combine_subjects`: means over its seeds, per subject and per prompt.

    identity: that of the row's first run; `check_identities` compares the others, unless `anyway`.
    """
    scores = [result.scores[name] for result in results]
    prompts: dict[str, list[PromptScore]] = {}
    for prompt in (prompt for result in results for prompt in result.per_prompt):
        if one := prompt.scores.get(name):
            prompts.setdefault(prompt.prompt, []).append(one)
    return {
        "scores": {name: {**_mean_of(scores), "n": sum(one.n for one in scores), "identity": identity}},
        "per_prompt": [{"scores": {name: _mean_of(of)}} for of in prompts.values()],
        "left_out": {},
    }


def _mean_of(scores: Sequence[Score | PromptScore]) -> dict[str, float]:
    count = len(scores)
    return {
        "mean": math.fsum(one.mean for one in scores) / count,
        "pairs": math.fsum(one.pairs or 0 for one in scores) / count,
    }


def _own_cell(score: Score, values: dict[str, float]) -> Cell:
    """Return a run's own interval, with the number of images or prompts if it is known."""
    unit = str(score.interval.get("over", ""))
    count = {"images": score.n, "prompts": dict(score.identity.get("prompts") or {}).get("n")}.get(unit)
    over = "" if score.low is None else unit if count is None else f"{count} {unit}"
    return Cell(score.mean, score.low, score.high, over, values)


def _counted(count: int, unit: str, low: float | None) -> str:
    return "" if low is None else f"{count} {unit}"


# --- Plateaus ---------------------------------------------------------------------------------------------------------


SHARE = 0.9
"""Default share of the best score that is good enough."""


@dataclass(frozen=True)
class Plateau:
    """A range of a setting in which a score is good enough."""

    low: float
    high: float
    """Ends of the range."""
    open_low: bool
    open_high: bool
    """Whether the score was still good enough at the last tried setting."""

    @property
    def decades(self) -> float:
        """log₁₀ of high / low; a lower bound if an end is open."""
        return math.log10(self.high / self.low)

    @property
    def is_lower_bound(self) -> bool:
        return self.open_low or self.open_high


def find_plateau(
    points: Sequence[tuple[float, float | None]], higher_is_better: bool = True, share: float = SHARE
) -> Plateau | None:
    """Find the unbroken range around the best score in which the score stays good enough.

    Good enough is `share` of the best or more; if lower is better, the best over `share` or less. Between two tried settings
    the score is interpolated linearly over the logarithm of the setting.

    Args:
        points: setting (> 0) and score, in order of the setting; None where the run failed: the range ends at the setting
            before, since the score between is unknown.

    Returns:
        None if there is no score, or the best is not above 0.
    """
    known = [(at, score) for at, score in points if score is not None]
    if not known:
        return None
    best_at, best = (max if higher_is_better else min)(known, key=lambda point: point[1])
    if best <= 0:
        return None
    limit = best * share if higher_is_better else best / share
    place = next(number for number, (at, _) in enumerate(points) if at == best_at)
    high, open_high = _end(points[place:], limit, higher_is_better)
    low, open_low = _end(points[place::-1], limit, higher_is_better)
    return Plateau(low, high, open_low, open_high)


def _end(points: Sequence[tuple[float, float | None]], limit: float, higher_is_better: bool) -> tuple[float, bool]:
    """Return where the score, good enough at the first point, stops being so; and whether that is the last point."""
    (at, score), *others = points
    assert score is not None
    for further, other in others:
        if other is None:
            return at, False
        if other < limit if higher_is_better else other > limit:
            share = (score - limit) / (score - other)
            return 10 ** (math.log10(at) + share * (math.log10(further) - math.log10(at))), False
        at, score = further, other
    return at, True
