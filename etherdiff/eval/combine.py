"""Scores of several subjects as one table, and what makes two scores incomparable."""

from collections.abc import Mapping, Sequence
from typing import Any

from etherdiff.eval.intervals import DRAWS, MIN_PROMPTS, bootstrap_mean
from etherdiff.eval.metrics import metric_of
from etherdiff.eval.scores import interval_fields
from etherdiff.runs.result import SUBJECTS_OWN, differences
from etherdiff.system.errors import UserError
from etherdiff.system.files import digest


def combine_subjects(results: Mapping[str, dict[str, Any]], seed: int = 0, draws: int = DRAWS) -> dict[str, Any]:
    """One table over subjects: means over the pairs of all of them, as the paper's scripts pool them.

    Intervals draw subjects again; below `MIN_PROMPTS` subjects, the prompts of all of them, and then speak of these
    subjects only. FID is not pooled: it is no mean.

    Returns:
        scores as of `score_images`, and per_subject with the given results.

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


def _with(name: str, results: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {subject: result for subject, result in results.items() if name in result["scores"]}


def _mixed_identities(name: str, results: Mapping[str, dict[str, Any]]) -> list[str]:
    """What differs beyond the subject's own images and prompts."""
    (first, one), *others = [(subject, result["scores"][name]["identity"]) for subject, result in _with(name, results).items()]
    return [
        f"{name}: {subject} was not scored as {first} was: {', '.join(found)} differ"
        for subject, other in others
        if (found := differences(one, other, SUBJECTS_OWN))
    ]


def _pooled(name: str, results: Mapping[str, dict[str, Any]], seed: int, draws: int) -> dict[str, Any]:
    scored = list(_with(name, results).values())
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
    """The parts of the identity that each subject has its own of, as one for all of them."""
    identities = [result["scores"][name]["identity"] for result in scored]
    merged = {}
    for part in ("reference", "prompts"):
        if identities[0].get(part):
            sha256 = digest([identity[part]["sha256"] for identity in identities])
            merged[part] = identities[0][part] | {"n": sum(one[part]["n"] for one in identities), "sha256": sha256}
    return merged
