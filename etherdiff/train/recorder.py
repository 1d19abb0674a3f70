"""What happens after each step of the loop: metrics, tracker, validation, scores, sample images, checkpoints; and its cost."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import TypeVar

import torch
from accelerate import Accelerator

from etherdiff.config import TrainConfig
from etherdiff.runs.folder import RunFolder, append_metrics
from etherdiff.system import signals
from etherdiff.system.devices import peak_memory
from etherdiff.system.errors import RunError, Stopped
from etherdiff.system.files import flush, write_json
from etherdiff.system.terminal import progress_bar, warn
from etherdiff.train.checkpoint import remove_old_checkpoints, save_checkpoint
from etherdiff.train.loop import Batch, TrainingState, on_device

T = TypeVar("T")


@dataclass(frozen=True)
class Watcher:
    """Something done every so many steps next to training. Where it fails, the run says so and goes on."""

    what: str
    """Its name in messages, in the plural."""
    every: int
    """Steps between calls; the last step is always one."""
    call: Callable[[int], Mapping[str, float]]
    """Called with the step, on what would be saved now; returns scores to log."""
    is_missing: Callable[[int], bool] | None = None
    """Whether its result for a step is missing. Then a signal may cut a call short, and a resumed run makes up for it."""


class Recorder:
    """A context whose `on_step` the loop calls; `validation` are batches that never change.

    watchers: of the first process; the others have none. The tracker is an extra as they are: where it fails, training goes on.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        validation: list[Batch],
        watchers: Sequence[Watcher],
        accelerator: Accelerator,
        started_at: int,
    ) -> None:
        self.config, self.run, self.validation, self.accelerator = config, run, validation, accelerator
        self.watchers = watchers
        self.started_at = self.saved_at = started_at
        self.steps_done = 0
        self.bar = progress_bar()
        self.bar_task = self.bar.add_task("training", total=config.steps, completed=started_at, note="")
        self.tracking = config.tracker != "none"
        self._try_tracker(self._start_tracker)

    def __enter__(self) -> "Recorder":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def on_step(self, state: TrainingState, loss: float) -> None:
        """Record a step. The loop calls this in every process."""
        self.steps_done += 1
        step = state.step
        values = {"loss": loss, "learning_rate": state.learning_rate}
        if not isfinite(loss):
            warn(f"step {step} was skipped: its loss or gradient is NaN or infinite")
        if self._is_due(self.config.eval_every, step):
            values["validation_loss"] = self._with_result(state, lambda: self._validation_loss(state))
        for watcher in self.watchers:
            if self._is_due(watcher.every, step):
                values |= self._watch(watcher, state)
        finite = {name: value for name, value in values.items() if isfinite(value)}
        self._try_tracker(lambda: self.accelerator.log(finite, step=step))
        if self.accelerator.is_main_process:
            append_metrics(self.run, {"step": step, **{name: finite.get(name) for name in values}})
            self.bar.update(self.bar_task, completed=step, note=f"loss {loss:.4f}")
        if self._is_due(self.config.checkpoint_every, step):
            self.checkpoint(state)
            if self.config.keep is not None and self.accelerator.is_main_process:
                remove_old_checkpoints(self.run.checkpoints, self.config.keep, step)

    def checkpoint(self, state: TrainingState) -> None:
        """Save the state, if it has moved since it was saved. RunError where its weights are not finite."""
        if self.saved_at == state.step:
            return
        if not all(torch.isfinite(parameter).all() for parameter in state.parameters.values()):
            self.record_divergence(state.step + 1)
            raise RunError(
                f"the weights became NaN or infinite by step {state.step}, so they were not saved; the checkpoints before are "
                "whole. Start again with a lower --learning-rate"
            )
        if self.accelerator.is_main_process:
            if self.run.metrics.exists():
                flush(self.run.metrics)
            records = [self.run.metrics, self.run.settings, self.run.best]
            save_checkpoint(state, self.run.checkpoints, self.accelerator, records)
        self.saved_at = state.step
        self.accelerator.wait_for_everyone()

    def record_divergence(self, step: int) -> None:
        """Log that the run diverged at a step, for `table` and `plot`. A resumed run forgets it."""
        if self.accelerator.is_main_process:
            append_metrics(self.run, {"step": step, "loss": None, "diverged": True})

    def catch_up(self, state: TrainingState) -> None:
        """Call the watchers that were cut short at the step where a run resumes."""
        for watcher in self.watchers:
            if state.step and watcher.is_missing and self._is_due(watcher.every, state.step) and watcher.is_missing(state.step):
                self._watch(watcher, state)

    def end_tracker(self) -> None:
        """Close the tracker, whose failure is no failure of the run."""
        try:
            self.accelerator.end_training()
        except Exception as error:  # whatever a tracker, its network or the disk raises
            warn(f"the tracker failed at the end ({type(error).__name__}: {error})")

    def _is_due(self, every: int, step: int) -> bool:
        return step % every == 0 or step == self.config.steps

    def _start_tracker(self) -> None:
        # what an earlier session logged beyond the checkpoint is logged again: TensorBoard is told to forget it
        resumed = {"tensorboard": {"purge_step": self.started_at + 1}} if self.config.tracker == "tensorboard" else {}
        self.accelerator.init_trackers("etherdiff", init_kwargs=resumed if self.started_at else {})

    def _try_tracker(self, action: Callable[[], None]) -> None:
        if not self.tracking:
            return
        try:
            action()
        except Exception as error:  # a tracker raises its own, its network's, the disk's
            self.tracking = False
            warn(f"{self.config.tracker} failed ({_first_line(error)}): training goes on without it; metrics.jsonl has it all")

    def _watch(self, watcher: Watcher, state: TrainingState) -> Mapping[str, float]:
        """Call a watcher and return its scores; none where it fails or is cut short."""
        step = state.step

        def call() -> Mapping[str, float]:
            with signals.at_once() if watcher.is_missing else nullcontext():
                return watcher.call(step)

        try:
            return self._with_result(state, call)
        except Stopped:
            return {}  # the loop asks for signals next; resuming makes up for it
        except Exception as error:  # whatever a pipeline, a network, a font or the disk raises
            warn(f"the {watcher.what} of step {step} failed ({_first_line(error)}): training goes on")
            return {}

    @torch.no_grad()
    def _validation_loss(self, state: TrainingState) -> float:
        task = self.accelerator.unwrap_model(state.task)
        losses = [task(on_device(batch, self.accelerator)).mean() for batch in self.validation]
        return float(torch.stack(losses).mean())

    def _with_result(self, state: TrainingState, action: Callable[[], T]) -> T:
        """Call an action on what would be saved now: the averaged weights if there are any, in evaluation mode."""
        state.task.eval()
        if state.ema is not None:
            state.ema.store(state.parameters.values())
            state.ema.copy_to(state.parameters.values())
        try:
            with self.accelerator.autocast():
                return action()
        finally:
            if state.ema is not None:
                state.ema.restore(state.parameters.values())
            state.task.train()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


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


def write_cost(recorder: Recorder, clock: Clock, step: int) -> None:
    """Write cost.json: seconds of all sessions that ended by themselves or by a signal, and the speed of this one."""
    run, config, accelerator = recorder.run, recorder.config, recorder.accelerator
    on_gpu = accelerator.device.type == "cuda"
    images = recorder.steps_done * config.batch_size * config.gradient_accumulation * accelerator.num_processes
    earlier = _read_seconds(run)
    cost = {
        "seconds": {stage: round(value + earlier.get(stage, 0.0), 3) for stage, value in clock.seconds.items()},
        "steps": step,
        "images_per_second": round(images / clock.seconds["train"], 4),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_memory(),
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name() if on_gpu else accelerator.device.type,
    }
    write_json(run.cost, cost)


def _read_seconds(run: RunFolder) -> dict[str, float]:
    """Return the seconds per stage of earlier sessions; none, with a warning, where the file is damaged."""
    if not run.cost.exists():
        return {}
    try:
        seconds = json.loads(run.cost.read_text(encoding="utf-8"))["seconds"]
        return {str(stage): float(value) for stage, value in seconds.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warn(f"{run.cost} cannot be read ({error}): the seconds of earlier sessions are left out")
        return {}
