"""The course of the learning rate: the warm-up of every schedule, and a run that is made longer."""

import pytest
import torch
from torch import nn

from etherdiff.config import TrainConfig
from etherdiff.train.checkpoint import load_checkpoint, save_checkpoint
from etherdiff.train.loop import ParameterGroup, TrainingState, advance, make_accelerator, prepare_training

PEAK = 0.01


class Pair(nn.Module):
    """Two parameters, the second with a learning rate of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 1), nn.Linear(1, 1)


def start(tmp_path, **options) -> tuple[TrainingState, object]:
    settings = {"learning_rate": PEAK, "tracker": "none", "device": "cpu"} | options
    config = TrainConfig(**settings)
    accelerator, pair = make_accelerator(config, tmp_path / "logs"), Pair()
    return prepare_training(pair, config, accelerator, [ParameterGroup(pair.second, PEAK / 10)]), accelerator


def rates(state: TrainingState, steps: int) -> list[float]:
    """What each of the next steps uses, in shares of the peak; the second group's are in proportion."""
    found = []
    for _ in range(steps):
        used = [group["lr"] for group in state.optimizer.param_groups]
        assert used[1] == pytest.approx(used[0] / 10)
        state.optimizer.step()
        advance(state, moved=True)
        assert state.learning_rate == used[0]
        found.append(state.learning_rate / PEAK)
    return found


def test_the_constant_schedule_warms_up(tmp_path):
    state, _ = start(tmp_path, steps=8, warmup_steps=5)
    assert rates(state, 8) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


def test_the_constant_schedule_without_a_warm_up_is_constant(tmp_path):
    state, _ = start(tmp_path, steps=3)
    assert rates(state, 3) == [1, 1, 1]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 2, 5])
@pytest.mark.parametrize("new_length", [6, 9])
def test_an_extended_run_has_the_rates_of_its_new_length_from_its_first_step(schedule, warmup, new_length, tmp_path):
    options = {"lr_schedule": schedule, "warmup_steps": warmup}
    short, accelerator = start(tmp_path, steps=3, **options)
    rates(short, 3)
    saved = save_checkpoint(short, tmp_path / "checkpoints", accelerator)

    extended, accelerator = start(tmp_path, steps=new_length, **options)
    load_checkpoint(extended, saved, accelerator)
    straight, _ = start(tmp_path, steps=new_length, **options)
    assert rates(extended, new_length - 3) == rates(straight, new_length)[3:]


def test_a_run_that_goes_on_with_its_length_has_the_same_rates_to_the_bit(tmp_path):
    options = {"steps": 7, "lr_schedule": "cosine", "warmup_steps": 2}
    whole, accelerator = start(tmp_path, **options)
    rates(whole, 4)
    saved = save_checkpoint(whole, tmp_path / "checkpoints", accelerator)
    resumed, accelerator = start(tmp_path, **options)
    load_checkpoint(resumed, saved, accelerator)
    assert torch.equal(torch.tensor(rates(resumed, 3)), torch.tensor(rates(whole, 3)))
