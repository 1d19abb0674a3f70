"""What happens beside the loop after each step: metrics, tracker, validation, sample images, checkpoints."""

from collections.abc import Callable
from math import isfinite
from typing import TypeVar

import torch
from accelerate import Accelerator

from etherdiff.config import TrainConfig
from etherdiff.runs.folder import RunFolder, append_metrics
from etherdiff.system import signals
from etherdiff.system.errors import RunError, Stopped
from etherdiff.system.files import flush
from etherdiff.system.terminal import progress_bar, warn
from etherdiff.train.checkpoint import remove_old_checkpoints, save_checkpoint
from etherdiff.train.loop import Batch, TrainingState, on_device

T = TypeVar("T")


class Recorder:
    """A context whose `on_step` the loop calls; `validation` are batches that never change.

    The tracker, the sample images and the scores are extras: where they fail, the run says so and goes on.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        validation: list[Batch],
        draw_samples: Callable[[int], None] | None,
        score_step: Callable[[int], dict[str, float]] | None,
        accelerator: Accelerator,
        started_at: int,
    ) -> None:
        self.config, self.run, self.validation, self.accelerator = config, run, validation, accelerator
        self.draw_samples, self.score_step = draw_samples, score_step
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
        """Called by the loop in every process."""
        self.steps_done += 1
        step = state.step
        values = {"loss": loss, "learning_rate": state.learning_rate}
        if not isfinite(loss):
            warn(f"step {step} was skipped: its loss or gradient is NaN or infinite")
        if self._is_due(self.config.eval_every, step):
            values["validation_loss"] = self._with_result(state, lambda: self._validation_loss(state))
            values |= self._scores(state)
        finite = {name: value for name, value in values.items() if isfinite(value)}
        self._try_tracker(lambda: self.accelerator.log(finite, step=step))
        if self.accelerator.is_main_process:
            append_metrics(self.run, {"step": step, **{name: finite.get(name) for name in values}})
            self.bar.update(self.bar_task, completed=step, note=f"loss {loss:.4f}")
            self._draw_due_samples(state)
        if self._is_due(self.config.checkpoint_every, step):
            self.checkpoint(state)
            if self.config.keep is not None and self.accelerator.is_main_process:
                remove_old_checkpoints(self.run.checkpoints, self.config.keep, step)

    def checkpoint(self, state: TrainingState) -> None:
        """Save the state, if it has moved since it was saved. RunError where its weights are no numbers."""
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
        """Draw the samples of the step a run resumes at, if it was stopped while it drew them."""
        if self.accelerator.is_main_process and state.step and not self.run.sample_sheet(state.step).exists():
            self._draw_due_samples(state)

    def _is_due(self, every: int | None, step: int) -> bool:
        return every is not None and (step % every == 0 or step == self.config.steps)

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

    def _draw_due_samples(self, state: TrainingState) -> None:
        draw, step = self.draw_samples, state.step
        if draw is None or not self._is_due(self.config.sample_every, step):
            return

        def draw_until_stopped() -> None:
            with signals.at_once():
                draw(step)

        try:
            self._with_result(state, draw_until_stopped)
        except Stopped:
            return  # the loop asks for signals next; resuming draws them
        except Exception as error:  # whatever a pipeline, a font or the disk raises
            warn(f"the sample images of step {step} failed ({_first_line(error)}): training goes on")

    def _scores(self, state: TrainingState) -> dict[str, float]:
        """Scores of what would be saved now, in the first process and where they are wanted."""
        score, step = self.score_step, state.step
        if score is None:
            return {}
        try:
            return self._with_result(state, lambda: score(step))
        except Exception as error:  # whatever a pipeline, a network or the disk raises
            warn(f"the scores of step {step} failed ({_first_line(error)}): training goes on")
            return {}

    @torch.no_grad()
    def _validation_loss(self, state: TrainingState) -> float:
        task = self.accelerator.unwrap_model(state.task)
        losses = [task(on_device(batch, self.accelerator)) for batch in self.validation]
        return float(torch.stack(losses).mean())

    def _with_result(self, state: TrainingState, action: Callable[[], T]) -> T:
        """The action on what would be saved now: the averaged weights where there are any, in evaluation mode."""
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
