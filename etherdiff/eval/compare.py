"""Whether scores may be compared, and what is made of those that may: `etherdiff compare`, and means over subjects.

Two scores of one name are comparable when their identities are equal. An identity has the definition, the network (name,
revision, weight hash, feature, preprocessing), the real images, the prompts and their form, the seeds and the sampler. The
number of scored images and the version of etherdiff count as well. Versions of other libraries only change the rounding:
they are reported as a warning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Group
from rich.table import Table

from etherdiff.eval.intervals import DRAWS, MIN_PROMPTS, bootstrap_mean, interval_text
from etherdiff.eval.metrics import metric_of
from etherdiff.eval.scores import interval_fields
from etherdiff.runs.result import (
    SUBJECTS_OWN,
    EvalResult,
    Score,
    differences,
    read_result,
    score_differences,
    version_differences,
)
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.system.files import digest
from etherdiff.system.text import listed

K = TypeVar("K")
FACTS = ("subject", "dataset", "method", "base_model", "checkpoint", "step")
BASE = "the base"
ADVICE = "score them in the same way (etherdiff eval), or pass --anyway to show them all, with differing scores marked"


@dataclass
class ComparedRun:
    """One run's scores, or those of the base that all of them share."""

    name: str
    facts: dict[str, Any]
    scores: dict[str, Score]
    differs: dict[str, list[str]] = field(default_factory=dict)
    """Score -> how its computation differs from the first run's; empty where all are comparable."""
    rounding: list[str] = field(default_factory=list)
    """Versions that differ from the first run's."""


def compare(runs: Sequence[Path], anyway: bool = False) -> list[ComparedRun]:
    """Compare each run with the first; a column per run, and one for the base if all runs have the same base scores.

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
        _note_differences(columns[0], column)
    first = columns[0].name
    wrong = [f"{one.name} was scored differently from {first}: {text}" for one in columns for text in difference_messages(one)]
    if wrong and not anyway:
        raise UserError([*wrong, ADVICE])
    base = _shared_base(list(results.values()))
    return [base, *columns] if base else columns


def difference_messages(column: ComparedRun) -> list[str]:
    """Return a sentence for each difference, with the scores that it concerns."""
    return [f"{difference} ({', '.join(scores)})" for difference, scores in by_difference(column.differs).items()]


def by_difference(found: Mapping[K, Sequence[str]]) -> dict[str, list[K]]:
    """Group keys (scores, or runs and scores) by each difference that they have."""
    concerned: dict[str, list[K]] = {}
    for key, differing in found.items():
        for difference in differing:
            concerned.setdefault(difference, []).append(key)
    return concerned


def row_names(columns: Sequence[ComparedRun]) -> list[str]:
    """Return every score that any column has."""
    return list(dict.fromkeys(name for column in columns for name in column.scores))


def cell(column: ComparedRun, score: str) -> str:
    """Return mean and interval, marked with * where computed differently; empty where there is no such score."""
    one = column.scores.get(score)
    if one is None:
        return ""
    mark = "*" if column.differs.get(score) else ""
    return f"{one.mean:.4f}{mark} {interval_text(one.low, one.high)}"


def as_table(columns: Sequence[ComparedRun]) -> Group:
    """Return a table for the terminal."""
    table = Table()
    table.add_column("")
    for column in columns:
        table.add_column(column.name, justify="right")
    for fact in _present_facts(columns):
        table.add_row(fact.replace("_", " "), *(str(column.facts.get(fact, "")) for column in columns))
    table.add_section()
    for score in row_names(columns):
        table.add_row(score, *(cell(column, score) for column in columns))
    return Group(table, *remarks(columns))


def as_markdown(columns: Sequence[ComparedRun]) -> str:
    """Return a Markdown table."""
    rows = [["", *(column.name for column in columns)], ["---", *["---:"] * len(columns)]]
    rows += [
        [fact.replace("_", " "), *(str(column.facts.get(fact, "")) for column in columns)] for fact in _present_facts(columns)
    ]
    rows += [[score, *(cell(column, score) for column in columns)] for score in row_names(columns)]
    lines = ["| " + " | ".join(_escaped(text) for text in row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {_escaped(remark)}" for remark in remarks(columns))]).rstrip()


def as_json(columns: Sequence[ComparedRun]) -> dict[str, Any]:
    """Return everything, for programs."""
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
    """Return the notes below the table."""
    lines = [f"* {column.name} was computed differently: {text}" for column in columns for text in difference_messages(column)]
    versions = [
        f"{c.name}: other versions, which may change the last digits: {', '.join(c.rounding)}" for c in columns if c.rounding
    ]
    return lines + versions


def _names(runs: Sequence[Path]) -> dict[Path, str]:
    """Return the folders' names; their paths where names repeat."""
    names = [run.resolve().name for run in runs]
    return {run: name if names.count(name) == 1 else str(run) for run, name in zip(runs, names, strict=True)}


def _facts(result: EvalResult) -> dict[str, Any]:
    return {fact: value for fact in FACTS if (value := getattr(result.run, fact)) is not None}


def _present_facts(columns: Sequence[ComparedRun]) -> list[str]:
    """Return the facts that any run has: a subject's run has no dataset, and a controllable one no subject."""
    return [fact for fact in FACTS if any(fact in column.facts for column in columns)]


def _note_differences(first: ComparedRun, column: ComparedRun) -> None:
    for score in (name for name in first.scores if name in column.scores):
        one, other = first.scores[score], column.scores[score]
        if found := score_differences(one, other):
            column.differs[score] = found
        texts = [f"{name} {version} ({before})" for name, version, before in version_differences(one, other)]
        column.rounding += [text for text in texts if text not in column.rounding]


def _shared_base(results: Sequence[EvalResult]) -> ComparedRun | None:
    """Return the base's scores if every run has the same."""
    bases = [result.base for result in results if result.base]
    means = [{name: one.mean for name, one in base.scores.items()} for base in bases]
    if len(bases) < len(results) or any(mean != means[0] for mean in means):
        return None
    run = results[0].run
    return ComparedRun(BASE, {"subject": run.subject, "base_model": run.base_model}, bases[0].scores)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


# --- Several subjects -------------------------------------------------------------------------------------------------


def combine_subjects(results: Mapping[str, dict[str, Any]], seed: int = 0, draws: int = DRAWS) -> dict[str, Any]:
    """Pool the scores of several subjects: means over all their pairs, as the paper's scripts pool them.

    Intervals resample subjects. Below `MIN_PROMPTS` subjects they resample the prompts of all of them, and cover only these
    subjects. FID is not pooled: it is not a mean.

    Returns:
        scores as in `score_images`, and per_subject with the given results.

    Raises:
        UserError: no subject, or scores of one name that were not computed the same way.
    """
    if not results:
        raise UserError("no subject has been scored")
    everything = dict.fromkeys(name for result in results.values() for name in result["scores"])
    names = [name for name in everything if metric_of(name).compares != "sets"]
    problems = [problem for name in names for problem in _mixed_identities(name, results)]
    if problems:
        raise UserError(problems)
    return {
        "scores": {name: _pooled(name, results, seed, draws) for name in names},
        "per_subject": dict(results),
        "left_out": {subject: result["left_out"] for subject, result in results.items()},
        "not_scored": {name: "a score of sets is not pooled over subjects" for name in everything if name not in names},
    }


def _results_with(name: str, results: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {subject: result for subject, result in results.items() if name in result["scores"]}


def _mixed_identities(name: str, results: Mapping[str, dict[str, Any]]) -> list[str]:
    """List what differs apart from the subject's own images and prompts."""
    scored = _results_with(name, results).items()
    (first, one), *others = [(subject, result["scores"][name]["identity"]) for subject, result in scored]
    return [
        f"{name}: {subject} was scored differently from {first}: {', '.join(found)} differ"
        for subject, other in others
        if (found := differences(one, other, SUBJECTS_OWN))
    ]


def _pooled(name: str, results: Mapping[str, dict[str, Any]], seed: int, draws: int) -> dict[str, Any]:
    scored = list(_results_with(name, results).values())
    units, unit = [result["scores"][name] for result in scored], "subjects"
    pairs = sum(score["pairs"] for score in units)
    mean = sum(score["mean"] * score["pairs"] for score in units) / pairs
    identity = units[0]["identity"]
    if len(units) < MIN_PROMPTS and metric_of(name).compares != "real x other real":
        scores = [prompt["scores"].get(name) for result in scored for prompt in result["per_prompt"]]
        units, unit = [score for score in scores if score], "prompts"
    interval = bootstrap_mean([s["mean"] * s["pairs"] for s in units], [s["pairs"] for s in units], seed, draws)
    return {
        "mean": mean,
        **interval_fields(interval, unit, seed, draws),
        "n": sum(result["scores"][name]["n"] for result in scored),
        "pairs": pairs,
        "subjects": len(scored),
        "identity": identity | _digests(name, scored),
    }


def _digests(name: str, scored: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one digest for all subjects of each part of the identity that is the subject's own."""
    identities = [result["scores"][name]["identity"] for result in scored]
    merged = {}
    for part in ("reference", "prompts"):
        if identities[0].get(part):
            sha256 = digest([identity[part]["sha256"] for identity in identities])
            merged[part] = identities[0][part] | {"n": sum(one[part]["n"] for one in identities), "sha256": sha256}
    return merged


# --- Many runs --------------------------------------------------------------------------------------------------------


@dataclass
class Checked:
    """The differences between scores that should have been computed in the same way."""

    otherwise: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """(Folder of a run, score) -> how its computation differs from the first run's."""
    rounding: list[str] = field(default_factory=list)
    """Libraries whose versions differ, a sentence each."""

    def is_otherwise(self, runs: Sequence[Run], score: str) -> bool:
        """Say whether one of the runs' scores was computed differently."""
        return any((str(run.folder.path), score) in self.otherwise for run in runs)

    def sentences(self) -> list[str]:
        """Return what differs, with the runs and the scores that it concerns."""
        sentences = []
        for difference, concerned in by_difference(self.otherwise).items():
            runs, scores = (list(dict.fromkeys(names)) for names in zip(*concerned, strict=True))
            verb = "was" if len(runs) == 1 else "were"
            sentences.append(f"{listed(runs)} {verb} scored differently from the first run: {difference} ({', '.join(scores)})")
        return sentences


def check_identities(runs: Sequence[Run], scores: Sequence[str], anyway: bool) -> Checked:
    """Compare every run's scores with the first run's. UserError where they differ, unless `anyway`."""
    checked = Checked()
    for score in scores:
        with_it = [run for run in runs if score in run.scores]
        first: dict[str, Run] = {}
        for run in with_it:
            own = first.setdefault(run.subject_name, run)
            one, other, wholly_first = own.scores[score], run.scores[score], with_it[0].scores[score]
            found = score_differences(one, other) or score_differences(wholly_first, other, SUBJECTS_OWN)
            if found:
                checked.otherwise[str(run.folder.path), score] = found
            for name, version, before in version_differences(with_it[0].scores[score], run.scores[score]):
                text = f"{name} {version} and {before}, which may change the last digits"
                if text not in checked.rounding:
                    checked.rounding.append(text)
    if checked.otherwise and not anyway:
        raise UserError([*checked.sentences(), ADVICE])
    return checked
