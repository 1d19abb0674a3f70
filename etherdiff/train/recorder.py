"""What happens beside the loop after each step: metrics, tracker, validation, sample images, checkpoints."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator

from etherdiff.config import TrainConfig
from etherdiff.runfolder import RunFolder, append_metrics
from etherdiff.train.checkpoint import save_checkpoint
from etherdiff.train.loop import Batch, TrainingState, on_device
from etherdiff.ui import progress_bar

T = TypeVar("T")


class Recorder:
    """A context whose `on_step` the loop calls; `validation` are batches that never change."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        validation: list[Batch],
        draw_samples: Callable[[int], None] | None,
        accelerator: Accelerator,
        started_at: int,
    ) -> None:
        self.config, self.run, self.validation, self.accelerator = config, run, validation, accelerator
        self.draw_samples = draw_samples
        self.steps_done = 0
        self.bar = progress_bar()
        self.bar_task = self.bar.add_task("training", total=config.steps, completed=started_at, note="")
        if config.tracker != "none":
            accelerator.init_trackers("etherdiff")

    def __enter__(self) -> "Recorder":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def on_step(self, state: TrainingState, loss: float) -> None:
        """Called by the loop in every process."""
        self.steps_done += 1
        step, main = state.step, self.accelerator.is_main_process
        values = {"loss": loss, "learning_rate": state.learning_rate}
        if self._is_due(self.config.eval_every, step):
            values["validation_loss"] = self._with_result(state, lambda: self._validation_loss(state))
        self.accelerator.log(values, step=step)
        if main:
            append_metrics(self.run, {"step": step, **values})
            self.bar.update(self.bar_task, completed=step, note=f"loss {loss:.4f}")
            if self.draw_samples is not None and self._is_due(self.config.sample_every, step):
                draw = self.draw_samples
                self._with_result(state, lambda: draw(step))
        if self._is_due(self.config.checkpoint_every, step):
            if main:
                save_checkpoint(state, self.run.checkpoints, self.accelerator)
            self.accelerator.wait_for_everyone()

    def _is_due(self, every: int | None, step: int) -> bool:
        return every is not None and (step % every == 0 or step == self.config.steps)

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
