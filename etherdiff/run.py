"""The main path: from a configuration to a saved adapter."""

import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from etherdiff.adapters.io import save_adapter
from etherdiff.adapters.methods import add_adapter, trainable_parameters
from etherdiff.config import DreamBoothConfig
from etherdiff.devices import DTYPES
from etherdiff.errors import UserError
from etherdiff.models import StableDiffusion, fingerprint, load_base
from etherdiff.runfolder import RunFolder, read_settings, truncate_metrics, write_settings
from etherdiff.tiny import RANDOM_WEIGHTS_NOTICE
from etherdiff.train.checkpoint import load_checkpoint, newest_checkpoint, read_step
from etherdiff.train.dreambooth import DreamBoothTask
from etherdiff.train.loop import TrainingState, fit, make_accelerator, prepare_training
from etherdiff.train.plan import DreamBoothPlan, plan_dreambooth
from etherdiff.train.prepare import prepare_data
from etherdiff.train.recorder import Recorder
from etherdiff.train.samples import Sampler
from etherdiff.ui import say, warn


def train_dreambooth(config: DreamBoothConfig, resuming: bool = False) -> Path:
    """Fine-tune on a subject's images; returns the run folder. UserError, before anything is loaded, where it cannot."""
    plan = plan_dreambooth(config, resuming)
    config, run = plan.config, RunFolder(plan.output)
    clock = Clock()
    accelerator = make_accelerator(config, run.logs)
    with clock("load"):
        model = load_base(plan.base)
        base_hashes = fingerprint(plan.base)
    if accelerator.is_main_process:
        open_run(run, config, plan, base_hashes, resuming)
    with clock("prepare"):
        data = prepare_data(plan, model, base_hashes, accelerator)
        sampler = make_sampler(plan, model, run, accelerator)
        free_unused(model, keep_vae=sampler is not None)
    # a frozen UNet can be held in half precision; one that is trained whole needs float32 weights under autocast
    model.unet.to(accelerator.device, torch.float32 if config.method == "full" else DTYPES[config.mixed_precision])
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    adapted = add_adapter(model.unet, config.method, plan.options, config.seed)
    state = prepare_training(DreamBoothTask(model.unet, model.noise_scheduler, config.min_snr_gamma), config, accelerator)
    if resuming:
        resume_from_checkpoint(state, run, accelerator)
    describe(plan, adapted, accelerator)
    draw_samples = sampler.draw_step if sampler else None
    recorder = Recorder(config, run, data.validation_batches(), draw_samples, accelerator, started_at=state.step)
    process, processes = accelerator.process_index, accelerator.num_processes
    with clock("train"), recorder:
        fit(state, lambda step: data.batches(step, process, processes), config, accelerator, recorder.on_step)
    if accelerator.is_main_process:
        use_averaged_weights(state)
        save_adapter(adapted, run.adapter, {"name": plan.base.name, "fingerprint": base_hashes})
        write_cost(run, clock, config, recorder.steps_done, accelerator)
    accelerator.end_training()
    return run.path


def resume(path: Path, steps: int | None = None) -> Path:
    """Go on with a run where its newest whole checkpoint is; `steps` extends it."""
    run, config, _ = read_settings(path)
    if steps is not None:
        newest, _ = newest_checkpoint(run.checkpoints)
        done = read_step(newest) if newest else 0
        if steps < done:
            raise UserError(f"steps: {path} is at step {done} already; give more than that")
        config = config.model_copy(update={"steps": steps})
    assert isinstance(config, DreamBoothConfig)
    return train_dreambooth(config, resuming=True)


def open_run(run: RunFolder, config: DreamBoothConfig, plan: DreamBoothPlan, hashes: dict[str, str], resuming: bool) -> None:
    """Create the run folder and record what it is told; a resumed run must be on the same base."""
    if resuming:
        recorded = read_settings(run.path)[2].get("base", {}).get("fingerprint", {})
        changed = sorted(name for name in hashes if hashes[name] != recorded.get(name))
        if changed:
            raise UserError(f"{run.path} was trained on other weights than {plan.base.name} holds now: {', '.join(changed)}")
    elif config.overwrite and run.path.exists():
        shutil.rmtree(run.path)
    run.path.mkdir(parents=True, exist_ok=True)
    base = {"name": plan.base.name, "path": str(plan.base.local_path), "fingerprint": hashes}
    prompts = {"subject_prompt": plan.subject_prompt, "class_prompt": plan.class_prompt}
    write_settings(run, "dreambooth", config, {"base": base, **prompts})


def make_sampler(plan: DreamBoothPlan, model: StableDiffusion, run: RunFolder, accelerator: Accelerator) -> Sampler | None:
    """What draws sample images, in the first process and where they are asked for; draws the base's at once."""
    if plan.config.sample_every is None or not accelerator.is_main_process:
        return None
    model.unet.to(accelerator.device)
    prompts = list(plan.config.sample_prompts or [plan.subject_prompt])
    return Sampler(plan.config, prompts, plan.resolution, model, run)


def free_unused(model: StableDiffusion, keep_vae: bool) -> None:
    """From here on only the UNet runs (and the decoder, where samples are drawn)."""
    model.text_encoder = None
    if not keep_vae:
        model.vae = None


def resume_from_checkpoint(state: TrainingState, run: RunFolder, accelerator: Accelerator) -> None:
    """Put the newest whole checkpoint back, or start again where there is none."""
    path, passed_over = newest_checkpoint(run.checkpoints)
    for damaged in passed_over:
        warn(f"passed over checkpoint {damaged}")
    if path is None:
        warn(f"{run.path} has no whole checkpoint; starting at step 0")
    else:
        load_checkpoint(state, path, accelerator)
        say(f"resuming at step {state.step} from {path}")
    if accelerator.is_main_process:
        truncate_metrics(run, state.step)
    accelerator.wait_for_everyone()


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


def write_cost(run: RunFolder, clock: Clock, config: DreamBoothConfig, steps: int, accelerator: Accelerator) -> None:
    """cost.json: seconds of all finished sessions, and the speed of this one, which did `steps`; metrics.jsonl has no clock."""
    earlier: dict[str, float] = {}
    if run.cost.exists():
        earlier = json.loads(run.cost.read_text(encoding="utf-8"))["seconds"]
    images = steps * config.batch_size * config.gradient_accumulation * accelerator.num_processes
    on_gpu = accelerator.device.type == "cuda"
    in_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    cost = {
        "seconds": {stage: round(value + earlier.get(stage, 0.0), 3) for stage, value in clock.seconds.items()},
        "steps": config.steps,
        "images_per_second": round(images / clock.seconds["train"], 4),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else in_memory,
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name() if on_gpu else accelerator.device.type,
    }
    run.cost.write_text(json.dumps(cost, indent=2) + "\n", encoding="utf-8")


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
