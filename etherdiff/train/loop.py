"""The training loop: optimizer steps over any module whose forward(batch) returns a loss."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from etherdiff.config import TrainConfig
from etherdiff.system.devices import resolve_device
from etherdiff.system.errors import NotFiniteError
from etherdiff.train.randomness import Draw, integer

Batch = dict[str, Tensor]
Loader = Callable[[int], list[Batch]]
"""This process's micro-batches of an optimizer step, `gradient_accumulation` of them, on the CPU."""
OnStep = Callable[["TrainingState", float], None]
"""Called after each optimizer step with the mean loss of the whole batch over all processes; NaN: it was skipped."""
MAX_SKIPPED_IN_A_ROW = 100
"""Skipped steps in a row after which a run stops, whatever it was told."""


@dataclass(frozen=True)
class ParameterGroup:
    """A part of a task with a learning rate of its own."""

    module: nn.Module
    learning_rate: float


@dataclass
class TrainingState:
    """Everything a checkpoint has to hold; `step` counts finished optimizer steps."""

    task: nn.Module
    optimizer: Any
    lr_scheduler: Any
    ema: EMAModel | None
    parameters: dict[str, nn.Parameter]
    """The trainable ones, by their names in the task; EMA and optimizer keep their order."""
    step: int = 0
    learning_rate: float = 0.0
    """What the last optimizer step used."""


def make_accelerator(config: TrainConfig, logs: Path) -> Accelerator:
    """Make the accelerator of one process, or of its part of a torchrun or accelerate launch; the tracker writes to `logs`."""
    AcceleratorState._reset_state()  # it keeps the first run's precision for the whole process
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=logs,
        cpu=resolve_device(config.device) == "cpu",  # without it accelerate ignores torchrun on a CPU
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation, sync_with_dataloader=False
        ),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise RuntimeError(f"{launched} processes were launched, but accelerate joins {accelerator.num_processes}")
    return accelerator


def prepare_training(
    task: nn.Module, config: TrainConfig, accelerator: Accelerator, groups: Sequence[ParameterGroup] = ()
) -> TrainingState:
    """Make optimizer, schedule and moving average for the task's trainable parameters; the task moves to its device.

    groups: modules with learning rates of their own; all else that is trainable has `config.learning_rate`.
    """
    trainable = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    rates = {id(parameter): group.learning_rate for group in groups for parameter in group.module.parameters()}
    by_rate: dict[float | None, dict[str, nn.Parameter]] = {}
    for name, parameter in trainable.items():
        by_rate.setdefault(rates.get(id(parameter), config.learning_rate), {})[name] = parameter
    parameters = {name: parameter for group in by_rate.values() for name, parameter in group.items()}
    optimizer = _optimizer_class(config)(
        [{"params": list(group.values()), "lr": rate} for rate, group in by_rate.items()],
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )
    # not prepared by accelerate, which would step it once per process: the schedule counts optimizer steps
    lr_scheduler = make_schedule(config, optimizer)
    task, optimizer = accelerator.prepare(task, optimizer)
    ema = EMAModel(parameters.values(), decay=config.ema_decay) if config.ema_decay else None
    if ema is not None:
        ema.to(accelerator.device)
    return TrainingState(task, optimizer, lr_scheduler, ema, parameters)


def make_schedule(config: TrainConfig, optimizer: Any) -> LambdaLR:
    """Make the course of the learning rates: a rise over the warm-up's steps, then what `lr_schedule` says."""
    if config.lr_schedule == "constant":  # diffusers' schedule of this name reads no warm-up
        rise = max(config.warmup_steps, 1)
        return LambdaLR(optimizer, lambda step: min((step + 1) / rise, 1.0))
    return get_scheduler(config.lr_schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.steps)


def restore_schedule(schedule: LambdaLR, saved: dict[str, Any]) -> None:
    """Put a schedule back to a saved place. The rates are those of its own length, which a resumed run may have changed."""
    schedule.load_state_dict(schedule.state_dict() | saved)
    rates = [rate * factor(schedule.last_epoch) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def fit(
    state: TrainingState,
    loader: Loader,
    config: TrainConfig,
    accelerator: Accelerator,
    on_step: OnStep,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Train from `state.step` to `config.steps`, or until `stopping` says so between two steps.

    The task is a module whose forward(batch) returns the loss of each sample, or their mean. A step whose loss or gradient is
    not finite changes nothing; NotFiniteError there, unless the run is to skip such steps.
    """
    state.task.train()
    skipped = 0
    while state.step < config.steps and not stopping():
        loss = optimizer_step(state, loader(state.step), config, accelerator)
        skipped = 0 if isfinite(loss) else skipped + 1
        if skipped and (config.on_nan == "stop" or skipped == MAX_SKIPPED_IN_A_ROW):
            raise NotFiniteError(_not_finite(state, config, skipped))
        advance(state, moved=not skipped)
        on_step(state, loss)


def advance(state: TrainingState, moved: bool) -> None:
    """Count a step: advance the schedule and, where the weights moved, their average."""
    state.learning_rate = state.lr_scheduler.get_last_lr()[0]
    state.lr_scheduler.step()
    if state.ema is not None and moved:
        state.ema.step(state.parameters.values())
    state.step += 1


def use_averaged_weights(state: TrainingState) -> None:
    """Put the moving average, if there is one, in place of the weights: it is the result."""
    if state.ema is not None:
        state.ema.copy_to(state.parameters.values())


def _not_finite(state: TrainingState, config: TrainConfig, skipped: int) -> str:
    what = "the loss or its gradient is NaN or infinite"
    rate = f"a lower --learning-rate than {config.learning_rate:g}" if config.learning_rate else "a lower --learning-rate"
    if config.on_nan == "skip":
        return f"{what} for {skipped} steps up to step {state.step + 1}: skipping does not help; start again with {rate}"
    return (
        f"{what} at step {state.step + 1}; the weights are as they were before it. "
        f"Start again with {rate}, or with --on-nan skip, which leaves such steps out"
    )


def optimizer_step(state: TrainingState, batches: list[Batch], config: TrainConfig, accelerator: Accelerator) -> float:
    """Update once from the micro-batches' mean gradient; return their mean loss over all processes.

    NaN, and no update, where the loss or its gradient is not finite.
    """
    losses, mean = [], nan
    for part, batch in enumerate(batches):
        with accelerator.accumulate(state.task), _dropout_randomness(config, state.step, part, accelerator):
            with accelerator.autocast():
                loss = state.task(on_device(batch, accelerator)).mean()
            accelerator.backward(loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(state.parameters.values(), config.max_grad_norm)
                mean = float(accelerator.reduce(torch.stack(losses).mean(), "mean"))
                # fp16: gradients overflow now and then, and the scaler itself leaves the step out
                if accelerator.scaler is not None or (isfinite(mean) and isfinite(float(norm))):
                    state.optimizer.step()
                else:
                    mean = nan
            state.optimizer.zero_grad()
    return mean


@contextmanager
def _dropout_randomness(config: TrainConfig, step: int, part: int, accelerator: Accelerator) -> Iterator[None]:
    """Make torch's own generator, which an adapter's dropout draws from, a function of the step and the place."""
    if not config.dropout:
        yield
        return
    slot = part * accelerator.num_processes + accelerator.process_index
    with torch.random.fork_rng():
        torch.manual_seed(integer(2**63, config.seed, Draw.DROPOUT, step, slot))
        yield


def on_device(batch: Batch, accelerator: Accelerator) -> Batch:
    """Move a batch to the device where this process computes."""
    return {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}


def _optimizer_class(config: TrainConfig) -> Any:
    if config.optimizer == "adamw":
        return torch.optim.AdamW
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit


def optimizer_state_bytes(config: TrainConfig) -> int:
    """Return the bytes that the optimizer keeps per trainable parameter: two moments."""
    return 8 if config.optimizer == "adamw" else 2


def ways_to_save_memory(config: TrainConfig) -> list[str]:
    """Return what would take less memory: options that are not used yet."""
    changes = []
    if config.batch_size > 1:
        parts = config.batch_size * config.gradient_accumulation
        changes.append(f"--batch-size 1 --gradient-accumulation {parts} (the same batch, piece by piece)")
    if not config.gradient_checkpointing:
        changes.append("--gradient-checkpointing")
    if config.mixed_precision == "no":
        changes.append("--mixed-precision bf16")
    if config.method == "full":
        changes.append("an adapter instead of --method full")
    return [*changes, "a smaller --resolution"]
