"""What a run folder holds, read for its report: every part may be missing, and a damaged one is said, not fatal."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etherdiff.adapters.drift import LayerDrift, adapter_drift, full_drift
from etherdiff.adapters.io import FULL, load_adapter, read_adapter
from etherdiff.config import RunConfig
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import Base, load_base
from etherdiff.images.png import read_png_settings
from etherdiff.images.reading import list_images
from etherdiff.runs.folder import RunFolder
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.use.proof import trained_on

_NUMBERED = re.compile(r"(\d+)-(.*)")
_STEP = re.compile(r"step-(\d+)")
Images = dict[int, Path]
"""Seed -> image."""


@dataclass(frozen=True)
class PromptImages:
    """The images of one prompt from several models."""

    prompt: str
    rows: dict[str, Images]
    """Whose they are, the base's first -> images."""


@dataclass(frozen=True)
class Contents:
    """A run, as far as it has got."""

    path: Path
    """As the user named it."""
    config: RunConfig
    provenance: dict[str, Any]
    curves: list[dict[str, Any]] = field(default_factory=list)
    """Lines of metrics.jsonl, all with a step."""
    cost: dict[str, Any] = field(default_factory=dict)
    """cost.json."""
    eval_cost: dict[str, Any] = field(default_factory=dict)
    """eval/cost.json."""
    result: dict[str, Any] | None = None
    """eval/metrics.json."""
    best: dict[str, Any] | None = None
    """best/best.json."""
    sheet: Path | None = None
    """eval/sheet.png: of a controllable run, controls beside generated and real images."""
    evaluated: list[PromptImages] = field(default_factory=list)
    sampled: list[PromptImages] = field(default_factory=list)
    """Sample images of training: the base's and those of each step."""
    subject: list[Path] = field(default_factory=list)
    """The images that were trained on, where they are still there."""
    trainable: int | None = None
    adapter_bytes: int | None = None
    drift: dict[str, LayerDrift] = field(default_factory=dict)
    why_no_drift: str = ""
    damaged: list[str] = field(default_factory=list)
    """What could not be read, a sentence each."""


def read_contents(path: Path) -> Contents:
    """Everything in a run folder. UserError where it is none."""
    opened = Run.open(path)
    run, config, provenance = opened.folder, opened.config, opened.provenance.content()
    damaged: list[str] = []
    result = _read_object(path / "eval" / "metrics.json", damaged)
    base = _recorded_base(provenance)
    drift, why_no_drift = _drift(run, base)
    trainable, adapter_bytes = _adapter_size(run)
    sheet = path / "eval" / "sheet.png"
    return Contents(
        path=path,
        config=config,
        provenance=provenance,
        curves=_read_curves(run.metrics, damaged),
        cost=_read_object(run.cost, damaged) or {},
        eval_cost=_read_object(path / "eval" / "cost.json", damaged) or {},
        result=result,
        best=_read_object(path / "best" / "best.json", damaged),
        sheet=sheet if sheet.is_file() else None,
        evaluated=[] if sheet.is_file() else _evaluated(path / "eval", config.method, result or {}),
        sampled=_sampled(run.samples),
        subject=_subject_images(config),
        trainable=trainable,
        adapter_bytes=adapter_bytes,
        drift=drift,
        why_no_drift=why_no_drift,
        damaged=damaged,
    )


def mapping(value: Any) -> dict[str, Any]:
    """A dictionary as it is; an empty one for anything else that a file may hold in its place."""
    return dict(value) if isinstance(value, Mapping) else {}


def sequence(value: Any) -> list[Any]:
    """A list as it is; an empty one for anything else."""
    return list(value) if isinstance(value, list | tuple) else []


def _read_object(path: Path, damaged: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        damaged.append(f"{path.name} cannot be read ({error})")
        return None
    if not isinstance(content, dict):
        damaged.append(f"{path.name} is not a JSON object")
        return None
    return content


def _read_curves(path: Path, damaged: list[str]) -> list[dict[str, Any]]:
    """The lines with a step; of several with the same one (a resumed run logs again) the last holds."""
    if not path.is_file():
        return []
    rows: dict[int, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    bad = 0
    for line in lines:
        try:
            row = json.loads(line)
            rows[int(row["step"])] = rows.get(int(row["step"]), {}) | row
        except (ValueError, TypeError, KeyError, OverflowError):
            bad += 1
    if bad:
        damaged.append(f"{bad} of {len(lines)} lines of {path.name} cannot be read")
    return [rows[step] for step in sorted(rows)]


def _evaluated(folder: Path, method: str, result: Mapping[str, Any]) -> list[PromptImages]:
    """The base's images and the run's, by the prompts' numbers: their names differ, since the base's lack the identifier."""
    prompts = [mapping(row).get("prompt") for row in sequence(result.get("per_prompt"))]
    return _side_by_side({"base": folder / "base_images", method: folder / "images"}, prompts)


def _sampled(folder: Path) -> list[PromptImages]:
    """The base's samples and those of every step, in their order."""
    steps = {int(found[1]): path for path in _folders(folder) if (found := _STEP.fullmatch(path.name))}
    named = {f"step {step}": path for step, path in sorted(steps.items())}
    return _side_by_side({"base": folder / "base", **named}, []) if named else []


def _side_by_side(folders: Mapping[str, Path], prompts: Sequence[Any]) -> list[PromptImages]:
    """folders: whose images -> a folder of NNN-prompt/SEED.png. prompts: their texts by number, where they are known."""
    found: dict[int, PromptImages] = {}
    for name, folder in folders.items():
        for path in _folders(folder):
            numbered = _NUMBERED.fullmatch(path.name)
            images = _by_seed(path) if numbered else {}
            if not numbered or not images:
                continue
            number = int(numbered[1])
            text = prompts[number] if number < len(prompts) and isinstance(prompts[number], str) else None
            if name != "base" or number not in found:
                text = text or _prompt_inside(next(iter(images.values()))) or numbered[2]
                earlier = found[number].rows if number in found else {}
                found[number] = PromptImages(text, earlier)
            found[number].rows[name] = images
    return [found[number] for number in sorted(found)]


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _by_seed(folder: Path) -> Images:
    images = {int(path.stem): path for path in folder.glob("*.png") if path.stem.isdecimal() and path.stem.isascii()}
    return {seed: images[seed] for seed in sorted(images)}


def _prompt_inside(path: Path) -> str | None:
    try:
        prompt = mapping(read_png_settings(path)).get("prompt")
    except UserError:
        return None
    return prompt if isinstance(prompt, str) and prompt.strip() else None


def _subject_images(config: RunConfig) -> list[Path]:
    folder = Path(getattr(config, "subject", ""))
    try:
        return list_images(folder) if folder.is_absolute() and folder.is_dir() else []
    except (OSError, ValueError):
        return []


def _adapter_size(run: RunFolder) -> tuple[int | None, int | None]:
    """Trained numbers and bytes of the saved adapter; None where there is none."""
    try:
        saved = read_adapter(run.adapter)
        trained = saved.trained_parameters()
    except UserError:
        return None, None
    return trained, sum(path.stat().st_size for path in saved.folder.iterdir())


def _recorded_base(provenance: Mapping[str, Any]) -> Base | None:
    """The base where the run found it; nothing is downloaded. None where it is no more."""
    recorded = mapping(provenance.get("base")).get("path")
    if not isinstance(recorded, str) or not Path(recorded).is_absolute() or not Path(recorded).exists():
        return None
    try:
        return find_base(recorded)
    except UserError:
        return None


def _drift(run: RunFolder, base: Base | None) -> tuple[dict[str, LayerDrift], str]:
    """The saved adapter's drift from its base; or none, and why not."""
    if not run.adapter.is_dir():
        return {}, "There is no adapter yet: it is saved when the run ends."
    if base is None:
        return {}, "The base is no longer where the run found it, and the weight distance needs its weights."
    try:
        saved = read_adapter(run.adapter)
        if trained_on(saved, base) is False:
            return {}, "The base's weights are not those the adapter was trained on."
        unet = load_base(base).unet
        if saved.peft_type == FULL:
            return full_drift(unet.state_dict(), saved.tensors()), ""
        return adapter_drift(load_adapter(unet, run.adapter)), ""
    except (UserError, OSError, KeyError) as error:
        return {}, f"It could not be measured: {error}"
