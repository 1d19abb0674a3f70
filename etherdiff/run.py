"""The main path: from a configuration to a saved adapter."""

import json
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from etherdiff.config import DreamBoothConfig, S2IConfig, TrainConfig
from etherdiff.families.sd1 import fingerprint, load_base
from etherdiff.report.reporting import show_report
from etherdiff.runs.base import refuse_other_base
from etherdiff.runs.faults import explained
from etherdiff.runs.folder import RunFolder, write_settings
from etherdiff.runs.run import Run
from etherdiff.system import signals
from etherdiff.system.devices import DTYPES, peak_memory
from etherdiff.system.errors import NotFiniteError, Stopped, UserError
from etherdiff.system.files import write_json
from etherdiff.system.locks import LOCK, run_lock
from etherdiff.system.terminal import say, warn
from etherdiff.tasks import plan_job
from etherdiff.tasks.task import Job
from etherdiff.train.batches import StepBatches
from etherdiff.train.checkpoint import newest_checkpoint, read_step
from etherdiff.train.loop import TrainingState, fit, make_accelerator, prepare_training
from etherdiff.train.recorder import Recorder
from etherdiff.train.resuming import check_machine, reopen, resume_from_checkpoint


def train_dreambooth(config: DreamBoothConfig) -> Path:
    """Fine-tune on a subject's images: see `train`."""
    return train(config)


def train_s2i(config: S2IConfig) -> Path:
    """Fine-tune on images and their control signals: see `train`."""
    return train(config)


def train(config: TrainConfig) -> Path:
    """Fine-tune; returns the run folder. UserError, before anything is loaded, where it cannot.

    RunError where memory, disk or numbers fail on the way; Stopped, with a checkpoint written, where a signal came.
    """
    job = plan_job(config)
    with run_lock(job.plan.output), explained(job.plan.config, job.plan.output):
        return train_job(job)


def resume(path: Path, steps: int | None = None, on_nan: str | None = None) -> Path:
    """Go on with a run where its newest whole checkpoint is; `steps` extends it, `on_nan` holds from there on."""
    run = RunFolder(path)
    if not run.settings.is_file() and not run.checkpoints.is_dir():
        raise UserError(f"{path} is not a run folder: it has no run.yaml")
    with run_lock(path):
        opened, config = reopen(path)
        newest, _ = newest_checkpoint(run.checkpoints)
        done = read_step(newest) if newest else 0
        changes = {name: value for name, value in (("steps", steps), ("on_nan", on_nan)) if value is not None}
        wanted = config.model_copy(update=changes)
        if wanted.steps < done:
            raise UserError(f"steps: {path} is at step {done} already; give more than that")
        job = plan_job(wanted, resuming=True)
        with explained(job.plan.config, path):
            return train_job(job, opened)


def train_job(job: Job[Any], resumed: Run | None = None) -> Path:
    """Train in a run folder that is locked; `resumed` is the run as it was recorded, where it goes on."""
    plan, config, run = job.plan, job.plan.config, RunFolder(job.plan.output)
    clock = Clock()
    accelerator = make_accelerator(config, run.logs)
    if resumed is not None:
        check_machine(resumed, accelerator)
    with clock("load"):
        model = load_base(plan.base)
        base_hashes = fingerprint(plan.base)
    recorded_base = {"name": plan.base.name, "fingerprint": base_hashes}
    if accelerator.is_main_process:
        open_run(run, job, base_hashes, resumed, accelerator)
    with clock("prepare"):
        data = job.prepare(model, base_hashes, accelerator)
        watchers = job.watch(model, run, recorded_base, accelerator)
        job.free_unused(model, watchers)
    # a frozen UNet can be held in half precision; one that is trained whole needs float32 weights under autocast
    model.unet.to(accelerator.device, torch.float32 if config.method == "full" else DTYPES[config.mixed_precision])
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    state = prepare_training(job.build(model), config, accelerator, job.groups())
    if resumed is not None:
        resume_from_checkpoint(state, run, accelerator)
    for number, line in enumerate(job.describe(accelerator)):
        say(line, style="" if number else "bold")
    validation = data.validation_batches()
    recorder = Recorder(config, run, validation, watchers.draw_samples, watchers.score_step, accelerator, started_at=state.step)
    with signals.deferred():
        with clock("train"), recorder:
            run_loop(state, data, config, accelerator, recorder)
        if accelerator.is_main_process:
            if state.step == config.steps:
                use_averaged_weights(state)
                job.save(run, recorded_base)
            write_cost(run, clock, config, state.step, recorder.steps_done, accelerator)
            if state.step == config.steps:
                job.conclude(run)
                show_report(run.path)
        end_tracker(accelerator)
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
    """The command that goes on with a run."""
    return f"go on with: etherdiff resume {run.path}"


def end_tracker(accelerator: Accelerator) -> None:
    """Close the tracker, whose failure is no failure of the run."""
    try:
        accelerator.end_training()
    except Exception as error:  # as in the recorder
        warn(f"the tracker failed at the end ({type(error).__name__}: {error})")


def open_run(run: RunFolder, job: Job[Any], hashes: dict[str, str], resumed: Run | None, accelerator: Accelerator) -> None:
    """Record what the run is told; one that is resumed must have the same base and data, and keeps its provenance."""
    base, config, digest = job.plan.base, job.plan.config, job.digest()
    if resumed is not None:
        refuse_other_base(resumed, base, hashes)
        if resumed.provenance.images not in (None, digest):
            raise UserError(f"{run.path} was trained on other images than {job.said_of_data()} holds now: put them back")
        write_settings(run, job.task, config, resumed.provenance.content())
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
        **job.facts(),
    }
    write_settings(run, job.task, config, facts)


def use_averaged_weights(state: TrainingState) -> None:
    """With EMA on, the average is the result."""
    if state.ema is not None:
        state.ema.copy_to(state.parameters.values())


class Clock:
    """Seconds spent per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def write_cost(run: RunFolder, clock: Clock, config: TrainConfig, step: int, steps_done: int, accelerator: Accelerator) -> None:
    """cost.json: seconds of all sessions that ended by themselves or by a signal, and the speed of this one."""
    images = steps_done * config.batch_size * config.gradient_accumulation * accelerator.num_processes
    on_gpu = accelerator.device.type == "cuda"
    earlier = read_seconds(run)
    cost = {
        "seconds": {stage: round(value + earlier.get(stage, 0.0), 3) for stage, value in clock.seconds.items()},
        "steps": step,
        "images_per_second": round(images / clock.seconds["train"], 4),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_memory(),
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name() if on_gpu else accelerator.device.type,
    }
    write_json(run.cost, cost)


def read_seconds(run: RunFolder) -> dict[str, float]:
    """Seconds per stage of the sessions before; none, with a warning, where the file is damaged."""
    if not run.cost.exists():
        return {}
    try:
        seconds = json.loads(run.cost.read_text(encoding="utf-8"))["seconds"]
        return {str(stage): float(value) for stage, value in seconds.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warn(f"{run.cost} cannot be read ({error}): the seconds of earlier sessions are left out")
        return {}
