"""The contents of a run folder for its report: every part may be missing, and damaged parts are listed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from etherdiff.adapters.analysis import LayerDrift
from etherdiff.adapters.io import read_adapter
from etherdiff.config import RunConfig, SubjectConfig
from etherdiff.images.writing import read_png_settings
from etherdiff.runs.folder import read_metrics
from etherdiff.runs.model import count_trained, find_local_base, measure_drift
from etherdiff.runs.result import Best, Cost, EvalResult, Record, read_record
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.system.files import data_root
from etherdiff.tasks.subjects import find_subject
from etherdiff.use.proof import trained_on

R = TypeVar("R", bound=Record)
_NUMBERED = re.compile(r"(\d+)-(.*)")
_STEP = re.compile(r"step-(\d+)")
Images = dict[int, Path]
"""Seed -> path of the image."""


@dataclass(frozen=True)
class Grid:
    """The images of one prompt from several models."""

    prompt: str
    rows: dict[str, Images]
    """Name of the model or step, the base first -> images."""


@dataclass(frozen=True)
class Contents:
    """The contents of a finished or unfinished run."""

    run: Run
    curves: list[dict[str, Any]] = field(default_factory=list)
    """Lines of metrics.jsonl."""
    cost: Cost = field(default_factory=Cost)
    eval_cost: Cost = field(default_factory=Cost)
    result: EvalResult | None = None
    """Scores, without damaged parts."""
    best: Best | None = None
    sheet: Path | None = None
    """Path of eval/sheet.png of a controllable run: controls, generated and real images."""
    evaluated: list[Grid] = field(default_factory=list)
    sampled: list[Grid] = field(default_factory=list)
    """Sample images of training, of the base and of each step."""
    subject: list[Path] = field(default_factory=list)
    """Training images that still exist."""
    trainable: int | None = None
    adapter_bytes: int | None = None
    drift: dict[str, LayerDrift] = field(default_factory=dict)
    why_no_drift: str = ""
    damaged: list[str] = field(default_factory=list)
    """Sentences about what cannot be read."""


def read_contents(path: Path) -> Contents:
    """Read everything in a run folder. UserError where it is not one."""
    run = Run.open(path)
    folder = run.folder
    damaged: list[str] = []
    result = _read(EvalResult, folder.result, damaged)
    drift, why_no_drift = _drift(run)
    trainable, adapter_bytes = _size(run)
    sheet = folder.eval / "sheet.png"
    return Contents(
        run=run,
        curves=read_metrics(folder, damaged),
        cost=_read(Cost, folder.cost, damaged) or Cost(),
        eval_cost=_read(Cost, folder.eval / "cost.json", damaged) or Cost(),
        result=result,
        best=_read(Best, folder.best / "best.json", damaged),
        sheet=sheet if sheet.is_file() else None,
        evaluated=[] if sheet.is_file() else _evaluated(folder.eval, run.method_label, result or EvalResult()),
        sampled=_sampled(folder.samples),
        subject=_subject_images(run.config),
        trainable=trainable,
        adapter_bytes=adapter_bytes,
        drift=drift,
        why_no_drift=why_no_drift,
        damaged=damaged,
    )


def _read(kind: type[R], path: Path, damaged: list[str]) -> R | None:
    if not path.is_file():
        return None
    try:
        record, wrong = read_record(kind, path)
    except UserError as error:
        damaged.append(str(error).removeprefix(f"{path.parent}/"))
        return None
    if wrong:
        damaged.append(f"{path.name} is not what etherdiff writes ({', '.join(wrong)})")
    return record


def _evaluated(folder: Path, method: str, result: EvalResult) -> list[Grid]:
    """Pair the base's images with the run's by prompt number: the names differ, since the base's lack the identifier."""
    prompts = [row.prompt for row in result.per_prompt]
    return _side_by_side({"base": folder / "base_images", method: folder / "images"}, prompts)


def _sampled(folder: Path) -> list[Grid]:
    """Return the base's samples and those of every step, in order."""
    steps = {int(found[1]): path for path in _folders(folder) if (found := _STEP.fullmatch(path.name))}
    named = {f"step {step}": path for step, path in sorted(steps.items())}
    return _side_by_side({"base": folder / "base", **named}, []) if named else []


def _side_by_side(folders: Mapping[str, Path], prompts: Sequence[str]) -> list[Grid]:
    """Return a grid per prompt. folders: row -> folder of NNN-prompt/SEED.png; prompts: texts by number, if known."""
    found: dict[int, Grid] = {}
    for name, folder in folders.items():
        for path in _folders(folder):
            numbered = _NUMBERED.fullmatch(path.name)
            images = _by_seed(path) if numbered else {}
            if not numbered or not images:
                continue
            number = int(numbered[1])
            text = prompts[number] if number < len(prompts) else None
            if name != "base" or number not in found:
                text = text or _prompt_inside(next(iter(images.values()))) or numbered[2]
                earlier = found[number].rows if number in found else {}
                found[number] = Grid(text, earlier)
            found[number].rows[name] = images
    return [found[number] for number in sorted(found)]


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _by_seed(folder: Path) -> Images:
    images = {int(path.stem): path for path in folder.glob("*.png") if path.stem.isdecimal() and path.stem.isascii()}
    return {seed: images[seed] for seed in sorted(images)}


def _prompt_inside(path: Path) -> str | None:
    try:
        prompt = dict(read_png_settings(path)).get("prompt")
    except (UserError, TypeError, ValueError):
        return None
    return prompt if isinstance(prompt, str) and prompt.strip() else None


def _subject_images(config: RunConfig) -> list[Path]:
    """Find the subject's photos on this machine; nothing is downloaded."""
    if not isinstance(config, SubjectConfig):
        return []
    try:
        return list(find_subject(config.subject, data_root(config.data_root), download=False).images)
    except UserError:
        return []


def _size(run: Run) -> tuple[int | None, int | None]:
    """Return trained numbers and bytes of the saved adapters; None if there is none, or one is damaged."""
    try:
        count = count_trained(run)
        files = [path for folder in run.adapters for path in read_adapter(folder).folder.iterdir()]
    except UserError:
        return None, None
    return count, sum(path.stat().st_size for path in files)


def _drift(run: Run) -> tuple[dict[str, LayerDrift], str]:
    """Return the saved adapters' drift from their base; or nothing, and why."""
    if not run.adapters:
        return {}, "There is no adapter yet: it is saved when the run ends."
    try:
        base = find_local_base(run)
        if any(trained_on(read_adapter(folder), base) is False for folder in run.adapters):
            return {}, "The base's weights are not those the adapter was trained on."
        return measure_drift(run), ""
    except (UserError, OSError, KeyError) as error:
        return {}, f"It could not be measured: {error}."
