"""The main path: from a configuration to a saved adapter."""

import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from etherdiff.config import TrainConfig
from etherdiff.eval.best import find_scorer
from etherdiff.families.sd1 import fingerprint, load_base
from etherdiff.report import show_report
from etherdiff.runs.folder import RunFolder, write_settings
from etherdiff.runs.model import refuse_other_base
from etherdiff.runs.run import Run
from etherdiff.system import signals
from etherdiff.system.devices import DTYPES, explained
from etherdiff.system.errors import NotFiniteError, Stopped, UserError
from etherdiff.system.locks import LOCK, run_lock
from etherdiff.system.terminal import say
from etherdiff.system.text import program
from etherdiff.tasks import plan_training
from etherdiff.tasks.task import Training
from etherdiff.train.batches import StepBatches
from etherdiff.train.checkpoint import check_machine, newest_checkpoint, read_step, reopen, resume_from_checkpoint
from etherdiff.train.loop import (
    TrainingState,
    fit,
    make_accelerator,
    prepare_training,
    use_averaged_weights,
    ways_to_save_memory,
)
from etherdiff.train.recorder import Clock, Recorder, write_cost


def train(config: TrainConfig) -> Path:
    """Fine-tune, and return the run folder. UserError, before anything is loaded, where that cannot be done.

    RunError where memory, disk or numbers fail on the way; Stopped, with a checkpoint written, where a signal came.
    """
    task = plan_training(config, find_scorer=find_scorer)
    with run_lock(task.plan.output), explained(task.plan.output, ways_to_save_memory(task.plan.config)):
        return train_task(task)


train_dreambooth = train_s2i = train  # the configuration says which task it is


def resume(path: Path, steps: int | None = None, on_nan: str | None = None) -> Path:
    """Resume a run from its newest whole checkpoint. `steps` extends it; `on_nan` holds from there on."""
    folder = RunFolder(path)
    if not folder.settings.is_file() and not folder.checkpoints.is_dir():
        raise UserError(f"{path} is not a run folder: it has no run.yaml")
    with run_lock(path):
        run, config = reopen(path)
        newest, _ = newest_checkpoint(folder.checkpoints)
        done = read_step(newest) if newest else 0
        changes = {name: value for name, value in (("steps", steps), ("on_nan", on_nan)) if value is not None}
        wanted = config.model_copy(update=changes)
        if wanted.steps < done:
            raise UserError(f"steps: {path} is at step {done} already; give more than that")
        task = plan_training(wanted, resuming=True, find_scorer=find_scorer)
        with explained(path, ways_to_save_memory(task.plan.config)):
            return train_task(task, run)


def train_task(task: Training[Any], resumed: Run | None = None) -> Path:
    """Train in a run folder that is locked; `resumed` is the run as it was recorded, where it goes on."""
    plan, config, run, clock = task.plan, task.plan.config, RunFolder(task.plan.output), Clock()
    accelerator = make_accelerator(config, run.logs)
    if resumed is not None:
        check_machine(resumed, accelerator)
    with clock("load"):
        model, hashes = load_base(plan.base), fingerprint(plan.base)
    base = {"name": plan.base.name, "fingerprint": hashes}
    if accelerator.is_main_process:
        open_run(run, task, hashes, resumed, accelerator)
    with clock("prepare"):
        data = task.prepare(model, hashes, accelerator)
        watchers = task.watch(model, run, base, accelerator)
        task.free_unused(model, watchers)
    # a frozen UNet can be held in half precision; one that is trained whole needs float32 weights under autocast
    model.unet.to(accelerator.device, torch.float32 if config.method == "full" else DTYPES[config.mixed_precision])
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    trainee = task.build(model)
    state = prepare_training(trainee.loss, config, accelerator, trainee.groups)
    if resumed is not None:
        resume_from_checkpoint(state, run, accelerator)
    for number, line in enumerate(task.describe(trainee, accelerator)):
        say(line, style="" if number else "bold")
    recorder = Recorder(config, run, data.validation_batches(), watchers, accelerator, started_at=state.step)
    with signals.deferred():
        with clock("train"), recorder:
            run_loop(state, data, config, accelerator, recorder)
        if accelerator.is_main_process:
            if state.step == config.steps:
                use_averaged_weights(state)
                task.save(trainee, run, base)
            write_cost(recorder, clock, state.step)
            if state.step == config.steps:
                task.conclude()
                show_report(run.path)
        recorder.end_tracker()
        if state.step < config.steps:
            raise Stopped(signals.received() or signal.SIGTERM, f"stopped at step {state.step}; {how_to_go_on(run)}")
    return run.path


def run_loop(
    state: TrainingState, data: StepBatches, config: TrainConfig, accelerator: Accelerator, recorder: Recorder
) -> None:
    """Train to the end, or until a signal stops it; either way the state is in a checkpoint afterwards."""
    process, processes = accelerator.process_index, accelerator.num_processes

    def stopping() -> bool:
        stopped = signals.received() is not None
        if processes == 1:
            return stopped
        # one process's signal is everyone's: all have to leave after the same step
        return bool(accelerator.reduce(torch.tensor(float(stopped), device=accelerator.device), "sum") > 0)

    recorder.catch_up(state)
    try:
        fit(state, lambda step: data.batches(step, process, processes), config, accelerator, recorder.on_step, stopping)
    except NotFiniteError as error:
        if config.on_nan == "stop":
            recorder.checkpoint(state)
        recorder.record_divergence(state.step + 1)
        if config.on_nan == "skip":
            raise
        raise NotFiniteError(f"{error}; or {how_to_go_on(recorder.run)} --on-nan skip") from error
    recorder.checkpoint(state)


def how_to_go_on(run: RunFolder) -> str:
    """Return the command that goes on with a run."""
    return f"go on with: {program('resume', run.path)}"


def open_run(
    run: RunFolder, task: Training[Any], hashes: dict[str, str], resumed: Run | None, accelerator: Accelerator
) -> None:
    """Record the run's settings. A resumed run must have the same base and data, and keeps its provenance."""
    base, config, digest = task.plan.base, task.plan.config, task.data_digest
    if resumed is not None:
        refuse_other_base(resumed, base, hashes)
        if resumed.provenance.images not in (None, digest):
            raise UserError(f"{run.path} was trained on other images than {task.data_name} holds now: put them back")
        write_settings(run, task.name, config, resumed.provenance.content())
        return
    for path in run.path.iterdir() if config.overwrite else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    facts = {
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "base": {"name": base.name, "path": str(base.local_path), "fingerprint": hashes},
        "images": digest,
        **task.facts(),
    }
    write_settings(run, task.name, config, facts)
