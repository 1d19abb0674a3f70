"""Find the run folders to read. A run that cannot be used is listed with the reason, never skipped silently."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from etherdiff.runs.folder import SEAL, is_sealed
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.system.text import program

PARTS = ("run.yaml", "metrics.jsonl", "checkpoints", "adapter", "control_encoder")
"""Contents that identify the folder of a run."""
STATES = "states"
"""Folder in a sweep: states/NAME.json describes runs/NAME."""


@dataclass(frozen=True)
class LeftOut:
    """A run that is in no number of a table or figure."""

    name: str
    why: str
    run: Run | None = None
    """The run, if its settings can be read."""
    diverged: bool = False
    """Whether its loss or its weights became NaN or infinite."""


@dataclass(frozen=True)
class Collection:
    """The runs of a table or a figure."""

    runs: list[Run]
    left_out: list[LeftOut]


def collect(paths: Sequence[Path], scored: bool = True) -> Collection:
    """Read every run in the given folders. A folder is a run, or has runs at any depth.

    Args:
        scored: leave out what `etherdiff eval` has not scored.

    Raises:
        UserError: a path that is no folder or holds no run, or not one run that can be read.
    """
    problems = [f"{path}: there is no such folder" for path in paths if not path.is_dir()]
    found: dict[Path, Run | LeftOut] = {}
    for path in (path for path in paths if path.is_dir()):
        inside = dict(_read_all(path, scored))
        if not inside:
            problems.append(f"{path} holds no run folder")
        found |= {place: read for place, read in inside.items() if place not in found}
    if problems:
        raise UserError(problems)
    names = [one.name for one in found.values()]
    named = [replace(one, name=str(place)) if names.count(one.name) > 1 else one for place, one in found.items()]
    named = _with_subjects_told_apart(named)
    runs = [one for one in named if isinstance(one, Run)]
    left_out = [one for one in named if isinstance(one, LeftOut)]
    if not runs:
        raise UserError(["there is no run to read", *(f"left out: {one.name}: {one.why}" for one in left_out)])
    return Collection(runs, left_out)


def _with_subjects_told_apart(found: Sequence[Run | LeftOut]) -> list[Run | LeftOut]:
    """Name subjects (and datasets) by their paths where several share a name.

    They are one where the path or the images are the same: a subject may be moved between runs, or gain a photo.
    """
    firsts: dict[str, list[Run]] = {}
    paths: dict[Path, str] = {}
    for run in (one.run if isinstance(one, LeftOut) else one for one in found):
        if run is not None:
            known = firsts.setdefault(run.subject_name, [])
            first = next((other for other in known if _have_one_subject(run, other)), None)
            known += [] if first else [run]
            paths[run.path] = str((first or run).subject_path)

    def rename(run: Run) -> Run:
        return replace(run, subject_name=paths[run.path]) if len(firsts[run.subject_name]) > 1 else run

    return [rename(one) if isinstance(one, Run) else replace(one, run=one.run and rename(one.run)) for one in found]


def _have_one_subject(one: Run, other: Run) -> bool:
    images = one.provenance.images
    return one.subject_path == other.subject_path or (images is not None and images == other.provenance.images)


def _read_all(path: Path, scored: bool) -> Iterator[tuple[Path, Run | LeftOut]]:
    """Yield each run's real path and what was read; also runs that a sweep recorded as failed before they began."""
    for place, folders, _ in os.walk(path):
        folder = Path(place)
        if _looks_like_a_run(folder):
            folders.clear()
            yield folder.resolve(), read_run(folder, scored)
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for state in sorted((folder / STATES).glob("*.json")):
            run = folder / "runs" / state.stem
            if not _looks_like_a_run(run) and (failure := _read_failure(run)):
                yield run.resolve(), LeftOut(run.name, failure)


def _looks_like_a_run(folder: Path) -> bool:
    return any((folder / part).exists() for part in PARTS)


def read_run(path: Path, scored: bool) -> Run | LeftOut:
    """Read one run folder, or say why it is left out."""
    name, failure = path.resolve().name, _read_failure(path)
    try:
        run = Run.open(path)
    except UserError as error:
        return LeftOut(name, "; ".join([*error.problems, *([failure] if failure else [])]))
    if run.folder.settings.read_bytes().startswith(SEAL.encode()) and not is_sealed(run.folder.settings):
        return LeftOut(name, f"{run.folder.settings} is damaged: it is not what the run wrote")
    if run.diverged:
        return LeftOut(name, failure or "its loss became NaN or infinite", run, diverged=True)
    why = (failure or _why_unscored(run)) if scored and not run.folder.result.is_file() else _damage(run) if scored else None
    return LeftOut(name, why, run) if why else run


def _why_unscored(run: Run) -> str:
    """Return why a run has no scores; an unfinished run must be resumed first."""
    if any(result.is_dir() for result in run.results):
        return f"{run.path} has not been scored: {program('eval', run.path)}"
    return f"it has not finished: {program('resume', run.path)}"


def _damage(run: Run) -> str | None:
    """Return why a result must not be used."""
    try:
        judged = run.result.run if run.result else None
    except UserError as error:
        return str(error)
    steps = getattr(run.config, "steps", None)
    if judged and judged.checkpoint == "last" and None not in (judged.step, steps) and judged.step != steps:
        return f"it was scored at step {judged.step}, and now has {steps}: {program('eval', run.path, '--overwrite')}"
    return None


def _read_failure(path: Path) -> str | None:
    """Read the failure that the run's sweep recorded."""
    try:
        state = json.loads((path.parent.parent / STATES / f"{path.name}.json").read_text(encoding="utf-8"))
        return f"it failed: {_last_line(state.get('error'))}" if state.get("status") == "failed" else None
    except (OSError, ValueError, AttributeError):
        return None


def _last_line(text: Any) -> str:
    lines = [line.strip().removeprefix("error: ") for line in str(text or "").splitlines() if line.strip()]
    return lines[-1] if lines else "the sweep recorded no reason"
