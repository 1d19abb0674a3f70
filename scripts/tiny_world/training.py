"""How every tiny model is trained: AdamW, warm-up and cosine, bfloat16 autocast, an average of the weights; resumable."""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from etherdiff.system.files import staged_file
from etherdiff.system.terminal import progress_bar, say

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
        """The same over a fraction of the steps (for trying the builder out)."""
        return Schedule(
            max(round(self.steps * fraction), 2),
            self.learning_rate,
            max(round(self.warmup * fraction), 1),
            self.weight_decay,
            self.ema,
            max(round(self.evaluate_every * fraction), 1),
        )


def train(
    name: str,
    model: Model,
    loss: Callable[[Model, np.random.Generator], Tensor],
    schedule: Schedule,
    work: Path,
    evaluate: Callable[[Model], dict[str, float]],
    compiled: bool = False,
) -> Model:
    """Train, logging to work/NAME/log.jsonl; go on from work/NAME/checkpoint.pt where there is one.

    Args:
        loss: draws its batch with the random numbers of the step, so that a resumed run sees the same ones; scalar.
        evaluate: scores of the averaged model, logged every `schedule.evaluate_every` steps and at the end.
        compiled: whether `loss` gets the model compiled (a minute or two at the start; worth it for long trainings).

    Returns:
        The averaged model (EMA), in float32 and evaluation mode.
    """
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(_groups(model, schedule.weight_decay), betas=(0.9, 0.99))
    start = _restore(folder, model, average, optimizer)
    say(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, step {start} of {schedule.steps}")
    called = cast(Model, torch.compile(model)) if compiled else model
    saved, recent, started = time.monotonic(), [], time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task(name, total=schedule.steps, completed=start, note="")
        for step in range(start, schedule.steps):
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((sum(name.encode()), step))))
            torch.manual_seed(int(rng.integers(2**62)))
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(schedule, step)
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(called, rng)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            _average(average, model, min(schedule.ema, (step + 1) / (step + 10)))
            recent.append(float(value.detach()))
            done = step + 1
            if done % LOG_EVERY == 0 or done == schedule.steps:
                seconds = round((time.monotonic() - started) / (done - start), 4)
                _log(folder, {"step": done, "loss": float(np.mean(recent)), "seconds_per_step": seconds})
                recent.clear()
            if done % schedule.evaluate_every == 0 or done == schedule.steps:
                with torch.no_grad():
                    _log(folder, {"step": done, **evaluate(average)})
            if time.monotonic() - saved > CHECKPOINT_SECONDS or done == schedule.steps:
                _save(folder, done, model, average, optimizer)
                saved = time.monotonic()
            bar.advance(task)
    return average


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and convolutions decay; embeddings (an unseen token would fade away), norms and biases do not."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    decaying = [p for p in model.parameters() if p.ndim > 1 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.ndim <= 1 or id(p) in embeddings]
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _learning_rate(schedule: Schedule, step: int) -> float:
    if step < schedule.warmup:
        return schedule.learning_rate * (step + 1) / schedule.warmup
    progress = (step - schedule.warmup) / max(schedule.steps - schedule.warmup, 1)
    return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)


def _log(folder: Path, row: dict[str, float]) -> None:
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _save(folder: Path, step: int, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = {"step": step, "model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
    with staged_file(folder / "checkpoint.pt") as staged:
        torch.save(state, staged)


def _restore(folder: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the checkpoint, and take later lines out of the log; the step to go on from."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    log = folder / "log.jsonl"
    rows = [line for line in log.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= state["step"]]
    log.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return int(state["step"])
