"""`etherdiff compare`: scores of several runs in one table, if they were computed the same way.

Two scores of one name may stand in a row when their identities are equal: definition, network (name, revision, weight hash,
feature, preprocessing), real images, prompts and their form, seeds, sampler, and the number of images that were scored, and
etherdiff's own version, whose code they are. Other libraries' versions change a score by rounding and are only warned of.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from etherdiff.eval.intervals import interval_text
from etherdiff.runs.result import EvalResult, Score, read_result, score_differences, version_differences
from etherdiff.system.errors import UserError

FACTS = ("subject", "dataset", "method", "base_model", "checkpoint", "step")
BASE = "the base"


@dataclass
class ComparedRun:
    """One run's scores, or those of the base that all of them share."""

    name: str
    facts: dict[str, Any]
    scores: dict[str, Score]
    differs: dict[str, list[str]] = field(default_factory=dict)
    """Score -> how it was computed otherwise than the first run's; empty where all may be compared."""
    rounding: list[str] = field(default_factory=list)
    """Versions that differ from the first run's."""


def compare(runs: Sequence[Path], anyway: bool = False) -> list[ComparedRun]:
    """A column per run, each held against the first, and one of the base where all were judged beside the same.

    Raises:
        UserError: fewer than two runs, one that is not scored, or (unless `anyway`) scores that were not computed the same way.
    """
    if len(runs) < 2:
        raise UserError("give two run folders or more to compare")
    results, problems = {}, []
    for run in runs:
        try:
            results[run] = read_result(run)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    names = _names(runs)
    columns = [ComparedRun(names[run], _facts(result), result.scores) for run, result in results.items()]
    for column in columns[1:]:
        _hold_against(columns[0], column)
    wrong = [f"{column.name} was not scored as {columns[0].name} was: {text}" for column in columns for text in told(column)]
    if wrong and not anyway:
        raise UserError([*wrong, "score them alike (etherdiff eval), or pass --anyway to see them beside each other, marked"])
    base = _shared_base(list(results.values()))
    return [base, *columns] if base else columns


def told(column: ComparedRun) -> list[str]:
    """What differs, a sentence for each kind of difference, with the scores that it concerns."""
    scores: dict[str, list[str]] = {}
    for score, found in column.differs.items():
        for difference in found:
            scores.setdefault(difference, []).append(score)
    return [f"{difference} ({', '.join(names)})" for difference, names in scores.items()]


def row_names(columns: Sequence[ComparedRun]) -> list[str]:
    """Every score that one of them has."""
    return list(dict.fromkeys(name for column in columns for name in column.scores))


def cell(column: ComparedRun, score: str) -> str:
    """Mean and interval, marked with * where it was computed otherwise; empty where there is no such score."""
    one = column.scores.get(score)
    if one is None:
        return ""
    mark = "*" if column.differs.get(score) else ""
    return f"{one.mean:.4f}{mark} {interval_text(one.low, one.high)}"


def as_table(columns: Sequence[ComparedRun]) -> Group:
    """For a terminal."""
    table = Table()
    table.add_column("")
    for column in columns:
        table.add_column(column.name, justify="right")
    for fact in _told_facts(columns):
        table.add_row(fact.replace("_", " "), *(str(column.facts.get(fact, "")) for column in columns))
    table.add_section()
    for score in row_names(columns):
        table.add_row(score, *(cell(column, score) for column in columns))
    return Group(table, *remarks(columns))


def as_markdown(columns: Sequence[ComparedRun]) -> str:
    """A table for a README or an issue."""
    rows = [["", *(column.name for column in columns)], ["---", *["---:"] * len(columns)]]
    rows += [
        [fact.replace("_", " "), *(str(column.facts.get(fact, "")) for column in columns)] for fact in _told_facts(columns)
    ]
    rows += [[score, *(cell(column, score) for column in columns)] for score in row_names(columns)]
    lines = ["| " + " | ".join(_escaped(text) for text in row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {_escaped(remark)}" for remark in remarks(columns))]).rstrip()


def as_json(columns: Sequence[ComparedRun]) -> dict[str, Any]:
    """Everything, for programs."""
    kept = ("mean", "low", "high", "n")
    return {
        "columns": [{"name": column.name, **column.facts} for column in columns],
        "scores": {
            score: {c.name: {key: getattr(c.scores[score], key) for key in kept} for c in columns if score in c.scores}
            for score in row_names(columns)
        },
        "differences": {column.name: column.differs for column in columns if column.differs},
        "versions": {column.name: column.rounding for column in columns if column.rounding},
    }


def remarks(columns: Sequence[ComparedRun]) -> list[str]:
    """What a reader of the table has to know."""
    lines = [f"* {column.name} was computed otherwise: {text}" for column in columns for text in told(column)]
    versions = [
        f"{c.name}: other versions, which may change the last digits: {', '.join(c.rounding)}" for c in columns if c.rounding
    ]
    return lines + versions


def _names(runs: Sequence[Path]) -> dict[Path, str]:
    """The folders' names; their paths where names repeat."""
    names = [run.resolve().name for run in runs]
    return {run: name if names.count(name) == 1 else str(run) for run, name in zip(runs, names, strict=True)}


def _facts(result: EvalResult) -> dict[str, Any]:
    return {fact: value for fact in FACTS if (value := getattr(result.run, fact)) is not None}


def _told_facts(columns: Sequence[ComparedRun]) -> list[str]:
    """Those that any of them has: a subject's run has no dataset, and a controllable one no subject."""
    return [fact for fact in FACTS if any(fact in column.facts for column in columns)]


def _hold_against(first: ComparedRun, column: ComparedRun) -> None:
    for score in (name for name in first.scores if name in column.scores):
        one, other = first.scores[score], column.scores[score]
        if found := score_differences(one, other):
            column.differs[score] = found
        texts = [f"{name} {version} ({before})" for name, version, before in version_differences(one, other)]
        column.rounding += [text for text in texts if text not in column.rounding]


def _shared_base(results: Sequence[EvalResult]) -> ComparedRun | None:
    """The base's scores, where every run has the same."""
    bases = [result.base for result in results if result.base]
    means = [{name: one.mean for name, one in base.scores.items()} for base in bases]
    if len(bases) < len(results) or any(mean != means[0] for mean in means):
        return None
    run = results[0].run
    return ComparedRun(BASE, {"subject": run.subject, "base_model": run.base_model}, bases[0].scores)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
