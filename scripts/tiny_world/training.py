"""How every tiny model is trained: by etherdiff's own loop, with AdamW, warm-up and cosine, and an average of the weights."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from etherdiff.config import TrainConfig
from etherdiff.system.terminal import progress_bar, say
from etherdiff.train.checkpoint import load_checkpoint, newest_checkpoint, remove_old_checkpoints, save_checkpoint
from etherdiff.train.loop import Batch, TrainingState, fit, make_accelerator
from etherdiff.train.randomness import Draw, generator

CHECKPOINT_SECONDS = 120
LOG_EVERY = 50
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast."""

    steps: int
    learning_rate: float
    warmup: int = 200
    weight_decay: float = 0.01
    ema: float = 0.999
    evaluate_every: int = 500

    def shortened(self, fraction: float) -> "Schedule":
        """The same over a fraction of the steps (to try the builder out)."""
        return replace(
            self,
            steps=max(round(self.steps * fraction), 2),
            warmup=max(round(self.warmup * fraction), 1),
            evaluate_every=max(round(self.evaluate_every * fraction), 1),
        )

    def config(self) -> TrainConfig:
        """The loop's options."""
        return TrainConfig(
            steps=self.steps,
            learning_rate=self.learning_rate,
            lr_schedule="cosine",
            warmup_steps=self.warmup,
            adam_beta2=0.99,
            weight_decay=self.weight_decay,
            ema_decay=self.ema,
            mixed_precision="bf16",
            device="cpu",
            tracker="none",
        )


class _Task(nn.Module):
    """A model and its loss, as the loop calls them."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(self.model, *batch.values())


def train(
    name: str,
    model: Model,
    draw: Callable[[np.random.Generator], tuple[Tensor, ...]],
    loss: Callable[..., Tensor],
    schedule: Schedule,
    work: Path,
    evaluate: Callable[[Model], dict[str, float]],
    compiled: bool = False,
) -> Model:
    """Train, logging to work/NAME/log.jsonl; go on from the newest checkpoint in work/NAME/checkpoints, if there is one.

    Args:
        draw: a step's batch, from the random numbers of the step, so that a resumed training sees the same ones.
        loss: called with the model and the tensors of a batch; a scalar.
        evaluate: scores of the averaged model, logged every `schedule.evaluate_every` steps and at the end.
        compiled: whether the model is compiled (a minute or two at the start; worth it for long trainings).

    Returns:
        The averaged model (EMA), in float32 and evaluation mode.
    """
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    config, seed = schedule.config(), sum(name.encode())
    accelerator = make_accelerator(config, folder)
    if compiled:
        model.compile()
    state = _prepare(_Task(model, loss), config, accelerator)
    _restore(state, folder, accelerator)
    say(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, step {state.step} of {schedule.steps}")
    start, started, saved, recent = state.step, time.monotonic(), time.monotonic(), []

    def batches(step: int) -> list[Batch]:
        tensors = draw(generator(seed, Draw.ORDER, step, 0))
        return [{str(place): tensor for place, tensor in enumerate(tensors)}]

    with progress_bar() as bar:
        task = bar.add_task(name, total=schedule.steps, completed=start, note="")

        def on_step(state: TrainingState, value: float) -> None:
            nonlocal saved
            recent.append(value)
            done, is_last = state.step, state.step == schedule.steps
            if done % LOG_EVERY == 0 or is_last:
                seconds = round((time.monotonic() - started) / (done - start), 4)
                _log(folder, {"step": done, "loss": float(np.mean(recent)), "seconds_per_step": seconds})
                recent.clear()
            if done % schedule.evaluate_every == 0 or is_last:
                with torch.no_grad():
                    _log(folder, {"step": done, **evaluate(_averaged(state, average))})
            if time.monotonic() - saved > CHECKPOINT_SECONDS or is_last:
                save_checkpoint(state, folder / "checkpoints", accelerator)
                remove_old_checkpoints(folder / "checkpoints", 1, done)
                saved = time.monotonic()
            bar.advance(task)

        fit(state, batches, config, accelerator, on_step)
    return _averaged(state, average)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Within, torch's own random numbers, which models take their first weights from, follow from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _prepare(task: nn.Module, config: TrainConfig, accelerator: Accelerator) -> TrainingState:
    """What the loop trains and a checkpoint holds: parameters, and the running statistics of norms.

    Matrices and convolutions decay; embeddings (an unseen token would fade away), norms and biases do not.
    """
    embeddings = {id(p) for module in task.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    trained = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    decaying = {name: p for name, p in trained.items() if p.ndim > 1 and id(p) not in embeddings}
    others = {name: p for name, p in trained.items() if name not in decaying}
    groups: list[dict[str, Any]] = [{"params": [*decaying.values()]}, {"params": [*others.values()], "weight_decay": 0.0}]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate or 0.0, betas=betas, weight_decay=config.weight_decay)
    lr_scheduler = get_scheduler(
        config.lr_schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.steps
    )
    kept: dict[str, Any] = {**decaying, **others, **dict(task.named_buffers())}  # an average keeps buffers as they are
    task, optimizer = accelerator.prepare(task, optimizer)
    return TrainingState(task, optimizer, lr_scheduler, EMAModel(kept.values(), decay=config.ema_decay or 0.0), kept)


@torch.no_grad()
def _averaged(state: TrainingState, average: Model) -> Model:
    """The copy of the model, with the averaged weights put into it."""
    own = {f"model.{name}": tensor for name, tensor in (*average.named_parameters(), *average.named_buffers())}
    if state.ema is not None:
        for name, value in zip(state.parameters, state.ema.shadow_params, strict=True):
            own[name].copy_(value)
    return average


def _log(folder: Path, row: dict[str, float]) -> None:
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _restore(state: TrainingState, folder: Path, accelerator: Accelerator) -> None:
    """Load the newest checkpoint, if there is one, and take later lines out of the log."""
    path, passed_over = newest_checkpoint(folder / "checkpoints")
    for sentence in passed_over:
        say(sentence)
    if path is not None:
        load_checkpoint(state, path, accelerator)
    log = folder / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= state.step]
    log.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
