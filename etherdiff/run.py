"""The main path: from a configuration to a saved adapter."""

import json
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from etherdiff import signals
from etherdiff.adapters.io import save_adapter
from etherdiff.adapters.methods import add_adapter, trainable_parameters
from etherdiff.config import DreamBoothConfig
from etherdiff.devices import DTYPES
from etherdiff.errors import NotFiniteError, Stopped, UserError
from etherdiff.faults import explained
from etherdiff.files import write_text
from etherdiff.locks import LOCK, run_lock
from etherdiff.models import StableDiffusion, fingerprint, load_base
from etherdiff.reporting import show_report
from etherdiff.resuming import check_machine, reopen, resume_from_checkpoint
from etherdiff.runfolder import RunFolder, write_adapter_manifest, write_settings
from etherdiff.tiny import RANDOM_WEIGHTS_NOTICE
from etherdiff.train.checkpoint import newest_checkpoint, read_step
from etherdiff.train.dreambooth import DreamBoothData, DreamBoothTask
from etherdiff.train.loop import TrainingState, fit, make_accelerator, prepare_training
from etherdiff.train.plan import DreamBoothPlan, plan_dreambooth
from etherdiff.train.prepare import pixels_digest, prepare_data
from etherdiff.train.recorder import Recorder
from etherdiff.train.samples import Sampler
from etherdiff.ui import say, warn

if TYPE_CHECKING:
    from etherdiff.best import StepScorer
    from etherdiff.eval.network import Backbone


def train_dreambooth(config: DreamBoothConfig) -> Path:
    """Fine-tune on a subject's images; returns the run folder. UserError, before anything is loaded, where it cannot.

    RunError where memory, disk or numbers fail on the way; Stopped, with a checkpoint written, where a signal came.
    """
    plan = plan_dreambooth(config)
    with run_lock(plan.output), explained(plan.config, plan.output):
        return train_planned(plan)


def resume(path: Path, steps: int | None = None, on_nan: str | None = None) -> Path:
    """Go on with a run where its newest whole checkpoint is; `steps` extends it, `on_nan` holds from there on."""
    run = RunFolder(path)
    if not run.settings.is_file() and not run.checkpoints.is_dir():
        raise UserError(f"{path} is not a run folder: it has no run.yaml")
    with run_lock(path):
        run, config, provenance = reopen(path)
        newest, _ = newest_checkpoint(run.checkpoints)
        done = read_step(newest) if newest else 0
        changes = {name: value for name, value in (("steps", steps), ("on_nan", on_nan)) if value is not None}
        wanted = config.model_copy(update=changes)
        if wanted.steps < done:
            raise UserError(f"steps: {path} is at step {done} already; give more than that")
        assert isinstance(wanted, DreamBoothConfig)
        plan = plan_dreambooth(wanted, resuming=True)
        with explained(plan.config, path):
            return train_planned(plan, provenance)


def train_planned(plan: DreamBoothPlan, provenance: dict[str, Any] | None = None) -> Path:
    """Train in a run folder that is locked; `provenance` is what a run that goes on had recorded."""
    plan, backbones = settle_scores(plan)
    config, run = plan.config, RunFolder(plan.output)
    clock = Clock()
    accelerator = make_accelerator(config, run.logs)
    if provenance is not None:
        check_machine(run, provenance, accelerator)
    with clock("load"):
        model = load_base(plan.base)
        base_hashes = fingerprint(plan.base)
    recorded_base = {"name": plan.base.name, "fingerprint": base_hashes}
    if accelerator.is_main_process:
        open_run(run, plan, base_hashes, provenance, accelerator)
    with clock("prepare"):
        data = prepare_data(plan, model, base_hashes, accelerator)
        sampler = make_sampler(plan, model, run, accelerator)
        scorer = make_scorer(plan, model, backbones, recorded_base, accelerator)
        free_unused(model, keep_vae=sampler is not None or scorer is not None)
    # a frozen UNet can be held in half precision; one that is trained whole needs float32 weights under autocast
    model.unet.to(accelerator.device, torch.float32 if config.method == "full" else DTYPES[config.mixed_precision])
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    adapted = add_adapter(model.unet, config.method, plan.options, config.seed)
    if scorer is not None:
        scorer.adapted = adapted
    state = prepare_training(DreamBoothTask(model.unet, model.noise_scheduler, config.min_snr_gamma), config, accelerator)
    if provenance is not None:
        resume_from_checkpoint(state, run, accelerator)
    describe(plan, adapted, accelerator)
    draw_samples = sampler.draw_step if sampler else None
    score_step = scorer.score_step if scorer else None
    validation = data.validation_batches()
    recorder = Recorder(config, run, validation, draw_samples, score_step, accelerator, started_at=state.step)
    with signals.deferred():
        with clock("train"), recorder:
            train(state, data, config, accelerator, recorder)
        if accelerator.is_main_process:
            if state.step == config.steps:
                use_averaged_weights(state)
                save_result(run, adapted, recorded_base)
            write_cost(run, clock, config, state.step, recorder.steps_done, accelerator)
            if state.step == config.steps:
                conclude(run, scorer)
        end_tracker(accelerator)
        if state.step < config.steps:
            raise Stopped(signals.received() or signal.SIGTERM, f"stopped at step {state.step}; {how_to_go_on(run)}")
    return run.path


def train(
    state: TrainingState, data: DreamBoothData, config: DreamBoothConfig, accelerator: Accelerator, recorder: Recorder
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
        if config.on_nan == "skip":
            raise
        recorder.checkpoint(state)
        raise NotFiniteError(f"{error}; or {how_to_go_on(recorder.run)} --on-nan skip") from error
    recorder.checkpoint(state)


def how_to_go_on(run: RunFolder) -> str:
    """The command that goes on with a run."""
    return f"go on with: etherdiff resume {run.path}"


def save_result(run: RunFolder, adapted: nn.Module, base: dict[str, Any]) -> None:
    """The adapter, then what its files are: a kill in between leaves an adapter that nothing is recorded of."""
    run.adapter_manifest.unlink(missing_ok=True)
    save_adapter(adapted, run.adapter, base)
    write_adapter_manifest(run)


def end_tracker(accelerator: Accelerator) -> None:
    """Close the tracker, whose failure is no failure of the run."""
    try:
        accelerator.end_training()
    except Exception as error:  # as in the recorder
        warn(f"the tracker failed at the end ({type(error).__name__}: {error})")


def open_run(
    run: RunFolder, plan: DreamBoothPlan, hashes: dict[str, str], provenance: dict[str, Any] | None, accelerator: Accelerator
) -> None:
    """Record what the run is told; one that is resumed must have the same base and images, and keeps its provenance."""
    images = pixels_digest(plan.images)
    if provenance is not None:
        recorded = provenance.get("base", {}).get("fingerprint", {})
        changed = sorted(name for name in hashes if hashes[name] != recorded.get(name))
        if changed:
            raise UserError(f"{run.path} was trained on other weights than {plan.base.name} holds now: {', '.join(changed)}")
        if provenance.get("images", images) != images:
            raise UserError(f"{run.path} was trained on other images than {plan.config.subject} holds now: put them back")
        write_settings(run, "dreambooth", plan.config, provenance)
        return
    for path in run.path.iterdir() if plan.config.overwrite else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    facts = {
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "base": {"name": plan.base.name, "path": str(plan.base.local_path), "fingerprint": hashes},
        "images": images,
        "subject_prompt": plan.subject_prompt,
        "class_prompt": plan.class_prompt,
    }
    write_settings(run, "dreambooth", plan.config, facts)


def make_sampler(plan: DreamBoothPlan, model: StableDiffusion, run: RunFolder, accelerator: Accelerator) -> Sampler | None:
    """What draws sample images, in the first process and where they are asked for; draws the base's at once."""
    if plan.config.sample_every is None or not accelerator.is_main_process:
        return None
    model.unet.to(accelerator.device)
    prompts = list(plan.config.sample_prompts or [plan.subject_prompt])
    try:
        return Sampler(plan.config, prompts, plan.resolution, model, run)
    except Exception as error:  # whatever a pipeline, a font or the disk raises
        warn(f"the base's sample images failed ({type(error).__name__}: {error}): training goes on without samples")
        return None


def settle_scores(plan: DreamBoothPlan) -> tuple[DreamBoothPlan, "dict[str, Backbone] | None"]:
    """The plan with `eval_scores` on or off, as it stays when the run is resumed, and the networks that score.

    UserError where a network that is asked for cannot be had.
    """
    if plan.config.eval_scores == "off":
        return plan, None
    from etherdiff.best import find_networks  # imports what only scoring needs

    backbones = find_networks(plan.config)
    settled = plan.config.model_copy(update={"eval_scores": "on" if backbones else "off"})
    return replace(plan, config=settled), backbones


def make_scorer(
    plan: DreamBoothPlan,
    model: StableDiffusion,
    backbones: "dict[str, Backbone] | None",
    base: dict[str, Any],
    accelerator: Accelerator,
) -> "StepScorer | None":
    """What scores along the way, in the first process."""
    if backbones is None or not accelerator.is_main_process:
        return None
    from etherdiff.best import StepScorer

    model.unet.to(accelerator.device)
    return StepScorer(plan, model, backbones, base)


def conclude(run: RunFolder, scorer: "StepScorer | None") -> None:
    """Say which step is best, and write the report."""
    if scorer is not None:
        from etherdiff.best import say_best

        say_best(run)
    show_report(run.path)


def free_unused(model: StableDiffusion, keep_vae: bool) -> None:
    """From here on only the UNet runs (and the decoder, where samples are drawn)."""
    model.text_encoder = None
    if not keep_vae:
        model.vae = None


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


def write_cost(
    run: RunFolder, clock: Clock, config: DreamBoothConfig, step: int, steps_done: int, accelerator: Accelerator
) -> None:
    """cost.json: seconds of all sessions that ended by themselves or by a signal, and the speed of this one."""
    images = steps_done * config.batch_size * config.gradient_accumulation * accelerator.num_processes
    on_gpu = accelerator.device.type == "cuda"
    in_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    earlier = read_seconds(run)
    cost = {
        "seconds": {stage: round(value + earlier.get(stage, 0.0), 3) for stage, value in clock.seconds.items()},
        "steps": step,
        "images_per_second": round(images / clock.seconds["train"], 4),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else in_memory,
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name() if on_gpu else accelerator.device.type,
    }
    write_text(run.cost, json.dumps(cost, indent=2) + "\n")


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


def describe(plan: DreamBoothPlan, adapted: nn.Module, accelerator: Accelerator) -> None:
    """What is about to be trained, in a few lines."""
    config = plan.config
    count = sum(p.numel() for p in trainable_parameters(adapted).values())
    say(f"{config.method} on {plan.base.name}: {count:,} trainable parameters ({config.targets})", style="bold")
    class_part = f", {config.class_images} class images {plan.class_prompt!r}" if config.prior_preservation else ""
    say(f"{len(plan.images)} images of {plan.subject_prompt!r} at {plan.resolution} px{class_part}")
    size = config.batch_size * config.gradient_accumulation * accelerator.num_processes
    say(f"{config.steps} steps of {size}, learning rate {config.learning_rate:g}; the text encoder is not trained")
    if plan.base.name == "tiny":
        warn(RANDOM_WEIGHTS_NOTICE)
