"""Bring a stopped run back: its settings, its threads, its checkpoint and what it had logged by then."""

import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator

from etherdiff.config import PerturbConfig, TrainConfig
from etherdiff.runs.folder import SEAL, RunFolder, installed_versions, is_sealed, restore_metrics
from etherdiff.runs.run import Provenance, Run
from etherdiff.system.errors import UserError
from etherdiff.system.files import remove_temporary, staged_folder, write_text
from etherdiff.system.terminal import is_main_process, say, warn
from etherdiff.system.text import program
from etherdiff.train.checkpoint import load_checkpoint, newest_checkpoint
from etherdiff.train.loop import TrainingState


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
