"""The JSON files of a run folder as typed records, and the rules by which two scores are comparable.

Files are read leniently: unknown keys stay, damaged parts are named.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from etherdiff.system.errors import UserError
from etherdiff.system.text import program

R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """Part of a file."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)


class Score(Record):
    """A score of a set of images."""

    mean: float
    low: float | None = None
    """Lower end of the 95% interval; None where there is no interval."""
    high: float | None = None
    interval: dict[str, Any] = Field(default_factory=dict)
    """level, over (what is drawn again), draws, seed."""
    n: int
    """Number of images."""
    pairs: float | None = None
    """Number of pairs behind the mean."""
    identity: dict[str, Any]
    """How the score was computed."""

    @model_validator(mode="after")
    def _has_both_ends(self) -> "Score":
        if (self.low is None) != (self.high is None):
            raise ValueError("an interval has two ends")
        return self


class PromptScore(Record):
    """A score of one prompt's images."""

    mean: float
    pairs: float
    n: int | None = None


class PromptScores(Record):
    """All scores of one prompt's images."""

    prompt: str
    n: int | None = None
    """Number of images."""
    scores: dict[str, PromptScore | None]


class ClassScore(Record):
    """A class of segmentation maps."""

    name: str
    iou: float | None = None
    accuracy: float | None = None
    pixels_wanted: int | None = None


class SetScores(Record):
    """The scores of one set of images."""

    scores: dict[str, Score] = Field(default_factory=dict)
    per_prompt: list[PromptScores] = Field(default_factory=list)
    per_class: list[ClassScore] = Field(default_factory=list)
    left_out: dict[str, list[dict[str, Any]]] = Field(default_factory=dict)
    """Reason -> the images or prompts that are in no score, or not in all."""
    not_scored: dict[str, str] = Field(default_factory=dict)
    """Score -> why there is none."""


class EvaluatedRun(Record):
    """The run that was evaluated."""

    subject: str | None = None
    dataset: str | None = None
    method: str | None = None
    base_model: str | None = None
    checkpoint: str | None = None
    """last, best or step-N."""
    step: int | None = None


class PaperScore(Record):
    """A number that the paper prints."""

    value: float
    differs: list[str]
    """Why it was measured differently from the run's; empty where it was not."""


class Paper(Record):
    """The paper's row for the run's method."""

    scope: str | None = None
    """Data and settings behind the paper's numbers."""
    scores: dict[str, PaperScore] = Field(default_factory=dict)


class EvalResult(SetScores):
    """eval/metrics.json."""

    base: SetScores | None = None
    """Scores of the base's images."""
    beside: dict[str, SetScores] = Field(default_factory=dict)
    """Further sets of images of a controllable run -> their scores."""
    run: EvaluatedRun = Field(default_factory=EvaluatedRun)
    paper: Paper = Field(default_factory=Paper)


class Best(Record):
    """best/best.json."""

    step: int
    score: float
    """√(DINO · CLIP-T)."""
    dino: float | None = None
    clip_t: float | None = None
    reference: str | None = None
    """The images that DINO compares with."""
    why: str = ""


class Cost(Record):
    """cost.json of training or of an evaluation."""

    seconds: dict[str, float] = Field(default_factory=dict)
    """Stage -> seconds."""
    steps: int | None = None
    images_per_second: float | None = None
    peak_memory_bytes: float | None = None
    processes: int | None = None
    device: str | None = None


def read_record(kind: type[R], path: Path) -> tuple[R, list[str]]:
    """Read a file; also list the names of damaged parts, which the record is without. UserError where nothing can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read (it is not a JSON object)")
    damaged: dict[str, None] = {}
    try:
        return kind.model_validate(content), []
    except ValidationError as error:
        for place in (detail["loc"] for detail in error.errors()):
            inside_scores = place[0] == "scores" and len(place) > 1
            (content["scores"] if inside_scores else content).pop(place[inside_scores], None)
            damaged[str(place[inside_scores])] = None
    try:
        return kind.model_validate(content), list(damaged)
    except ValidationError as error:  # something that it needs is missing
        raise UserError(f"{path} cannot be read (it has no {', '.join(damaged)})") from error


def read_best(folder: Path) -> Best | None:
    """Read best.json of a run's best/; None where there is none. UserError where it cannot be read."""
    path = folder / "best.json"
    return read_record(Best, path)[0] if path.is_file() else None


def read_result(run: Path) -> EvalResult:
    """Read a run's eval/metrics.json. UserError where it has none, or one that cannot be used."""
    path, advice = run / "eval" / "metrics.json", f"score it again with {program('eval', run, '--overwrite')}"
    if not run.is_dir():
        raise UserError(f"{run}: there is no such run folder")
    if not path.is_file():
        raise UserError(f"{run} has not been scored: {program('eval', run)}")
    try:
        result, damaged = read_record(EvalResult, path)
    except UserError as error:
        raise UserError(f"{error}: {advice}") from error
    damaged += [name for name in ("scores", "run") if name not in {*result.model_fields_set, *damaged}]
    if damaged:
        raise UserError(f"{path} is not what etherdiff eval writes ({', '.join(damaged)}): {advice}")
    return result


# --- Comparing identities -------------------------------------------------------------------------------------------


VERSIONS = "versions"
"""Part of an identity: the libraries' versions, which only move the last digits."""
SUBJECTS_OWN = (VERSIONS, "sha256", "n", "seeds")
"""Parts of an identity that differ from subject to subject."""


def differences(one: Any, other: Any, ignored: Sequence[str] = (VERSIONS,), path: str = "") -> list[str]:
    """List the dotted names of what differs between two identities; a key of `ignored` is left out at any depth."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [key for key in dict.fromkeys([*one, *other]) if key not in ignored]
        inner = (differences(one.get(key), other.get(key), ignored, f"{path}.{key}" if path else key) for key in keys)
        return [name for names in inner for name in names]
    return [] if one == other else [path]


def named_differences(one: Mapping[str, Any], other: Mapping[str, Any], ignored: Sequence[str] = ()) -> list[str]:
    """List what differs, as "generation.steps: 25, here 50"; long values are shortened, lists and mappings left out."""
    return [f"{path}{_both(_at(one, path), _at(other, path))}" for path in differences(one, other, ignored)]


def score_differences(one: Score, other: Score, ignored: Sequence[str] = (VERSIONS,)) -> list[str]:
    """List how two scores were computed differently; etherdiff's own version counts, since the code is its own."""
    return named_differences(_compared(one), _compared(other), ignored)


def version_differences(one: Score, other: Score) -> list[tuple[str, str, str]]:
    """List the libraries whose versions differ: name, the other's version, the one's."""
    before, now = dict(_library_versions(one.identity)), dict(_library_versions(other.identity))
    return [(name, version, before[name]) for name, version in now.items() if before.get(name, version) != version]


def _compared(score: Score) -> dict[str, Any]:
    own = score.identity.get(VERSIONS, {}).get("etherdiff")
    return {**score.identity, "etherdiff": own, "n": score.n}


def _library_versions(identity: Any) -> list[tuple[str, str]]:
    """Return every library's version in an identity, at any depth."""
    found: list[tuple[str, str]] = []
    for key, value in identity.items() if isinstance(identity, Mapping) else ():
        found += [(n, v) for n, v in value.items() if n != "etherdiff"] if key == VERSIONS else _library_versions(value)
    return found


def _both(one: Any, other: Any) -> str:
    if any(isinstance(value, list | dict) for value in (one, other)):
        return ""
    return f": {_short(one)}, here {_short(other)}"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return f"{text[:10]}…" if re.fullmatch(r"[0-9a-f]{16,}", text) else text


def _at(content: Any, path: str) -> Any:
    """Return the value at a dotted path; None where there is none. Keys may contain dots themselves."""
    if not path:
        return content
    for key in content if isinstance(content, Mapping) else ():
        if path == key or path.startswith(f"{key}."):
            return _at(content[key], path[len(key) + 1 :])
    return None
