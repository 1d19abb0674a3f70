"""Checkpoints, whole or absent, in safetensors and JSON; and how a stopped run comes back from one.

    step-000200/  parameters.safetensors  optimizer.safetensors  [ema.safetensors]  state.json  manifest.json
                  [metrics.jsonl  run.yaml  best/: what the run folder held at this step]

The position in the data needs no file: it follows from the step (see randomness.py).
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from etherdiff.config import PerturbConfig, TrainConfig
from etherdiff.runs.folder import SEAL, RunFolder, installed_versions, is_sealed, restore_metrics
from etherdiff.runs.run import Provenance, Run
from etherdiff.system.errors import UserError
from etherdiff.system.files import file_hash, remove_temporary, save_tensors, staged_folder, write_text
from etherdiff.system.terminal import is_main_process, say, warn
from etherdiff.system.text import program
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


def reopen(path: Path) -> tuple[Run, TrainConfig]:
    """Open a stopped run and its configuration, mend its folder, set its number of threads. UserError where it cannot go on.

    Of several processes the first mends; the run folder has to be locked.
    """
    folder = RunFolder(path)
    _refuse_links(folder)
    if is_main_process():
        remove_temporary(path, also_of_live_processes=True)
    copy = _whole_copy(folder)
    run = Run.open(path, copy)
    if copy is not None:
        warn(f"{folder.settings} is not what the run wrote: put back from {copy.parent.name}")
        if is_main_process():
            write_text(folder.settings, copy.read_text(encoding="utf-8"))
    if isinstance(run.config, PerturbConfig):
        raise UserError(f"{path} was made by etherdiff perturb, all at once: there is nothing to go on with")
    threads = run.provenance.threads
    if threads is not None and 0 < threads != torch.get_num_threads():
        say(f"computing with {threads} threads, as this run did: sums differ with their number")
        torch.set_num_threads(threads)
    _warn_of_versions(run.provenance)
    return run, run.config


def _refuse_links(run: RunFolder) -> None:
    """UserError where a link leads outside: a run folder from elsewhere must not make a resumed run write somewhere else."""
    inside = run.path.resolve()
    for path in sorted(run.path.rglob("*")):
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):  # of a loop, resolve() would raise
            raise UserError(f"{path} is a link that leads outside the run folder: remove it, or put there what it leads to")


def _whole_copy(run: RunFolder) -> Path | None:
    """Return the newest whole checkpoint's copy of run.yaml where that is damaged; None where it is as it was written."""
    if is_sealed(run.settings):
        return None
    newest, _ = newest_checkpoint(run.checkpoints)
    if newest is not None and is_sealed(newest / "run.yaml"):
        return newest / "run.yaml"
    if run.settings.is_file() and run.settings.read_bytes().startswith(SEAL.encode()):
        raise UserError(f"{run.settings} is not what the run wrote, and no whole checkpoint has a copy: start the run again")
    return None  # older than the seal


def _warn_of_versions(provenance: Provenance) -> None:
    recorded, now = provenance.versions, installed_versions()
    changed = [f"{name} {recorded[name]} (now {now[name]})" for name in now if recorded.get(name, now[name]) != now[name]]
    if changed:
        warn(f"this run began with {', '.join(changed)}: what follows may differ in the last bits from one never stopped")


def check_machine(run: Run, accelerator: Accelerator) -> None:
    """UserError unless there are as many processes as before, which share each batch; warn of another device."""
    began, now = run.provenance.processes, accelerator.num_processes
    if began is not None and began != now:
        raise UserError(
            f"{run.path} was begun by {began} processes and is resumed by {now}, which would change its batches. Use: "
            f"torchrun --nproc-per-node {began} -m {program('resume', run.path)}"
        )
    device = run.provenance.device
    if device is not None and device != accelerator.device.type:
        warn(f"this run began on {device} and goes on on {accelerator.device.type}: the last bits will differ")


def resume_from_checkpoint(state: TrainingState, run: RunFolder, accelerator: Accelerator) -> None:
    """Put the newest whole checkpoint back, or start again where there is none."""
    path, passed_over = newest_checkpoint(run.checkpoints)
    for damaged in passed_over:
        warn(f"passed over checkpoint {damaged}")
    if path is None:
        warn(f"{run.path} has no whole checkpoint; starting at step 0")
    else:
        try:
            load_checkpoint(state, path, accelerator)
        except ValueError as error:
            raise UserError(f"{error}: it was written by another run") from error
        say(f"resuming at step {state.step} from {path}")
    if accelerator.is_main_process:
        restore_metrics(run, path and path / "metrics.jsonl", state.step)
        restore_best(run, path)
    accelerator.wait_for_everyone()


def restore_best(run: RunFolder, checkpoint: Path | None) -> None:
    """Put best/ back to what it was at a checkpoint: the step of a later one may not come again."""
    if checkpoint is None or not (checkpoint / "best").is_dir():
        shutil.rmtree(run.best, ignore_errors=True)
        return
    with staged_folder(run.best) as staged:
        shutil.copytree(checkpoint / "best", staged, dirs_exist_ok=True)
