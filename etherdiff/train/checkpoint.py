"""Checkpoints: whole or absent, in safetensors and JSON.

    step-000200/  parameters.safetensors  optimizer.safetensors  [ema.safetensors]  state.json  manifest.json
                  [metrics.jsonl  run.yaml  best/: what the run folder held at this step]

The position in the data needs no file: it follows from the step (see randomness.py).
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from etherdiff.system.files import file_hash, save_tensors, staged_folder
from etherdiff.train.loop import TrainingState, restore_schedule

FORMAT = 2
FILES = {"parameters.safetensors", "optimizer.safetensors", "state.json"}
BEST = {f"best/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "base.json", "best.json")}
OPTIONAL = {"ema.safetensors", "metrics.jsonl", "run.yaml"} | BEST


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return folder / f"step-{step:06d}"


def save_checkpoint(state: TrainingState, folder: Path, accelerator: Accelerator, records: Sequence[Path] = ()) -> Path:
    """Write the state to a temporary folder, flush it, rename it into place: a kill at any moment leaves no half.

    records: files and folders of the run folder that are kept with it, where they are there.
    """
    path = checkpoint_path(folder, state.step)
    optimizer_tensors, optimizer_numbers = _optimizer_state(state)
    numbers: dict[str, Any] = {
        "format": FORMAT,
        "step": state.step,
        "optimizer": optimizer_numbers,
        "lr_scheduler": {k: v for k, v in state.lr_scheduler.state_dict().items() if not k.startswith("lr_lambdas")},
        "grad_scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "ema_step": state.ema.optimization_step if state.ema is not None else None,
    }
    with staged_folder(path) as staged:
        save_tensors(state.parameters, staged / "parameters.safetensors")
        save_tensors(optimizer_tensors, staged / "optimizer.safetensors")
        if state.ema is not None:
            averages = dict(zip(state.parameters, state.ema.shadow_params, strict=True))
            save_tensors(averages, staged / "ema.safetensors")
        for record in records:
            if record.is_dir():
                shutil.copytree(record, staged / record.name)
            elif record.exists():
                shutil.copyfile(record, staged / record.name)
        (staged / "state.json").write_text(json.dumps(numbers, indent=2, sort_keys=True))
        files = [path for path in sorted(staged.rglob("*")) if path.is_file()]
        manifest = {file.relative_to(staged).as_posix(): file_hash(file) for file in files}
        (staged / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return path


def load_checkpoint(state: TrainingState, path: Path, accelerator: Accelerator) -> None:
    """Put a checkpoint's state back, bit for bit. ValueError where it does not fit the task."""
    numbers = json.loads((path / "state.json").read_text())
    saved = load_file(path / "parameters.safetensors")
    if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in state.parameters.items()}:
        raise ValueError(f"checkpoint {path} holds other parameters than this run trains")
    with torch.no_grad():
        for name, parameter in state.parameters.items():
            parameter.copy_(saved[name])
    _restore_optimizer(state, load_file(path / "optimizer.safetensors"), numbers["optimizer"])
    restore_schedule(state.lr_scheduler, numbers["lr_scheduler"])
    if accelerator.scaler is not None and numbers["grad_scaler"] is not None:
        accelerator.scaler.load_state_dict(numbers["grad_scaler"])
    if state.ema is not None:
        shadow = load_file(path / "ema.safetensors")
        state.ema.shadow_params = [shadow[name].to(accelerator.device) for name in state.parameters]
        state.ema.optimization_step = numbers["ema_step"]
    state.step = numbers["step"]


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest whole checkpoint; also return a sentence about each newer one that was skipped."""
    passed_over: list[str] = []
    for path in sorted(folder.glob("step-*"), key=_step_of, reverse=True):
        damage = _damage(path)
        if damage is None:
            return path, passed_over
        passed_over.append(f"{path.name}: {damage}")
    return None, passed_over


def remove_old_checkpoints(folder: Path, keep: int, step: int) -> None:
    """Keep the newest `keep` of the checkpoints up to `step`; later ones, which a resumed run left behind, do not count."""
    older = sorted((path for path in folder.glob("step-*") if 0 <= _step_of(path) <= step), key=_step_of)
    for path in older[: max(len(older) - keep, 0)]:
        shutil.rmtree(path, ignore_errors=True)


def read_step(path: Path) -> int:
    """Return the step at which a whole checkpoint was written."""
    return int(json.loads((path / "state.json").read_text())["step"])


def _step_of(path: Path) -> int:
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def _damage(path: Path) -> str | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if not isinstance(manifest, dict) or not manifest.keys() >= FILES:
            return "its manifest does not name its files"
        if not manifest.keys() <= FILES | OPTIONAL:
            return "its manifest names files that are none of a checkpoint's"
        for name, expected in manifest.items():
            if file_hash(path / name) != expected:
                return f"{name} is not what was written"
        if json.loads((path / "state.json").read_text())["format"] != FORMAT:
            return "written in another format"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read ({error})"
    return None


def _optimizer_state(state: TrainingState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's tensors by `parameter/key`, and what else it keeps, by parameter and for its groups."""
    raw = state.optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in raw["param_groups"]]
    numbers: dict[str, Any] = {"groups": groups, "state": {}}
    for index, name in enumerate(state.parameters):
        for key, value in raw["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                numbers["state"].setdefault(name, {})[key] = value
    return tensors, numbers


def _restore_optimizer(state: TrainingState, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    names = list(state.parameters)
    restored: dict[int, dict[str, Any]] = {index: dict(numbers["state"].get(n, {})) for index, n in enumerate(names)}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        restored[names.index(name)][entry] = value
    present = state.optimizer.state_dict()["param_groups"]
    groups = [group | saved for group, saved in zip(present, numbers["groups"], strict=True)]
    state.optimizer.load_state_dict({"state": restored, "param_groups": groups})
