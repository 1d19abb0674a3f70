"""Which run folders there are to read, and which of them cannot be: those are named, with the reason, never passed over."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from etherdiff.config import AdapterConfig
from etherdiff.eval.results import eval_folder, read_result
from etherdiff.report.numbers import number
from etherdiff.runs.folder import SEAL, RunFolder, is_sealed, read_metrics, read_settings
from etherdiff.system.errors import UserError

PARTS = ("run.yaml", "metrics.jsonl", "checkpoints", "adapter", "control_encoder")
"""What shows that a folder is, or was, a run's."""
STATES = "states"
"""Of a sweep: states/NAME.json tells of runs/NAME."""
_DIVERGED = re.compile(r"NaN or infinite")
"""In the words of `train.loop` and `train.recorder`."""


@dataclass(frozen=True)
class Run:
    """A run folder whose settings could be read."""

    name: str
    """The folder's; its path where several of one name are read."""
    folder: RunFolder
    config: AdapterConfig
    provenance: dict[str, Any]
    result: dict[str, Any] | None = None
    """eval/metrics.json; None where only what training left is asked for."""

    @property
    def task(self) -> str:
        return str(self.provenance["task"])

    @property
    def subject(self) -> str:
        """What was trained on: the subject's, or the dataset's, name."""
        trained_on = getattr(self.config, "subject", None) or getattr(self.config, "dataset", "")
        return Path(str(trained_on)).name

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """Name -> mean, low, high, interval, n, pairs, identity."""
        return self.result["scores"] if self.result else {}

    @cached_property
    def curves(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl that tell a step; none where it is no text."""
        try:
            rows = read_metrics(self.folder)
        except (OSError, UnicodeDecodeError):
            return []
        return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


@dataclass(frozen=True)
class LeftOut:
    """A run that is in no number."""

    name: str
    why: str
    run: Run | None = None
    """Its settings, where those can be read."""
    diverged: bool = False
    """Whether its loss or its weights became NaN or infinite."""


@dataclass(frozen=True)
class Collection:
    """What a table or a figure is made of."""

    runs: list[Run]
    left_out: list[LeftOut]


def collect(paths: Sequence[Path], scored: bool = True) -> Collection:
    """Every run in the given folders, each of which is a run or holds some at any depth.

    Args:
        scored: leave out what `etherdiff eval` has not scored; else `result` is None in every run.

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
    runs = [one for one in named if isinstance(one, Run)]
    left_out = [one for one in named if isinstance(one, LeftOut)]
    if not runs:
        raise UserError(["there is no run to read", *(f"left out: {one.name}: {one.why}" for one in left_out)])
    return Collection(runs, left_out)


def _read_all(path: Path, scored: bool) -> Iterator[tuple[Path, Run | LeftOut]]:
    """Real path of each run in a folder -> what was read; also of the runs that a sweep says failed before they began."""
    for place, folders, _ in os.walk(path):
        folder = Path(place)
        if _looks_like_a_run(folder):
            folders.clear()
            yield folder.resolve(), read_run(folder, scored)
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for state in sorted((folder / STATES).glob("*.json")):
            run = folder / "runs" / state.stem
            if not _looks_like_a_run(run) and (why := _failure(run)):
                yield run.resolve(), LeftOut(run.name, why, diverged=_is_divergence(why))


def _looks_like_a_run(folder: Path) -> bool:
    return any((folder / part).exists() for part in PARTS)


def read_run(path: Path, scored: bool) -> Run | LeftOut:
    """One run folder, or why it is left out."""
    name, failure = path.resolve().name, _failure(path)
    try:
        run = Run(name, *read_settings(path))
    except UserError as error:
        return LeftOut(name, "; ".join([*error.problems, *([failure] if failure else [])]))
    if run.folder.settings.read_bytes().startswith(SEAL.encode()) and not is_sealed(run.folder.settings):
        return LeftOut(name, f"{run.folder.settings} is damaged: it is not what the run wrote")
    diverged = _diverged(run, failure)
    if diverged or not scored:
        return LeftOut(name, failure or "its loss became NaN or infinite", run, True) if diverged else run
    try:
        result = read_result(path)
    except UserError as error:
        return LeftOut(name, failure or _why_unscored(run, error), run)
    damage = _damage(run, result)
    return LeftOut(name, damage, run) if damage else replace(run, result=result)


def _why_unscored(run: Run, error: UserError) -> str:
    """A run that has not finished is to go on before it can be scored."""
    if (
        (eval_folder(run.folder.path) / "metrics.json").exists()
        or run.folder.adapter.is_dir()
        or run.folder.control_encoder.is_dir()
    ):
        return "; ".join(error.problems)
    return f"it has not finished: etherdiff resume {run.folder.path}"


def _failure(path: Path) -> str | None:
    """What the sweep that a run belongs to recorded of its failure."""
    try:
        state = json.loads((path.parent.parent / STATES / f"{path.name}.json").read_text(encoding="utf-8"))
        return f"it failed: {_last_line(state.get('error'))}" if state.get("status") == "failed" else None
    except (OSError, ValueError, AttributeError):
        return None


def _last_line(text: Any) -> str:
    lines = [line.strip().removeprefix("error: ") for line in str(text or "").splitlines() if line.strip()]
    return next((line for line in lines if _DIVERGED.search(line)), lines[-1] if lines else "the sweep recorded no reason")


def _diverged(run: Run, failure: str | None) -> bool:
    """Whether the sweep says so, or the last step that was logged has no loss."""
    return _is_divergence(failure) or (bool(run.curves) and "loss" in run.curves[-1] and run.curves[-1]["loss"] is None)


def _is_divergence(failure: str | None) -> bool:
    return failure is not None and bool(_DIVERGED.search(failure))


def _damage(run: Run, result: Mapping[str, Any]) -> str | None:
    """Why a result that could be read must not be used."""
    wrong = [name for name, one in result["scores"].items() if not _is_score(one)]
    wrong += [] if _are_prompts(result.get("per_prompt", [])) else ["per_prompt"]
    if wrong:
        return f"eval/metrics.json is not what etherdiff eval writes ({', '.join(wrong)}): score it again"
    scored, checkpoint, steps = result["run"].get("step"), result["run"].get("checkpoint"), getattr(run.config, "steps", None)
    if checkpoint == "last" and None not in (scored, steps) and scored != steps:
        return f"it was scored at step {scored}, and now has {steps}: etherdiff eval {run.folder.path} --overwrite"
    return None


def _is_score(one: Any) -> bool:
    if not isinstance(one, Mapping) or not isinstance(one.get("identity"), Mapping):
        return False
    ends = (one.get("low"), one.get("high"))
    return (
        number(one.get("mean")) is not None
        and (ends == (None, None) or all(number(end) is not None for end in ends))
        and isinstance(one.get("n"), int)
        and (one.get("pairs") is None or number(one["pairs"]) is not None)
    )


def _are_prompts(rows: Any) -> bool:
    """Whether they are a prompt and its scores each, as `combine_subjects` reads them."""
    if not isinstance(rows, list) or not all(
        isinstance(row, Mapping) and isinstance(row.get("scores"), Mapping) for row in rows
    ):
        return False
    scores = [one for row in rows for one in row["scores"].values() if one is not None]
    return all("prompt" in row for row in rows) and all(
        isinstance(one, Mapping) and None not in (number(one.get("mean")), number(one.get("pairs"))) for one in scores
    )
