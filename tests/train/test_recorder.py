"""What is called along the way: when it is due, on what would be saved, and without stopping the run where it fails."""

import json
import signal

import pytest
import torch
from torch import nn

from etherdiff.config import TrainConfig
from etherdiff.runs.folder import RunFolder
from etherdiff.system import signals
from etherdiff.train.loop import fit, make_accelerator, prepare_training
from etherdiff.train.recorder import Clock, Recorder, Watcher, write_cost


class PerSample(nn.Module):
    """A task whose loss is one number per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, batch):
        return (self.weight * batch["x"]).square()


def batches(step):
    return [{"x": torch.tensor([1.0, 2.0])}]


@pytest.fixture
def train(tmp_path):
    """Train for five steps with these watchers; the rows that were logged."""

    def run(*watchers, until=5, on_start=lambda task: None, **options):
        config = TrainConfig(
            **({"steps": 5, "learning_rate": 0.1, "tracker": "none", "device": "cpu", "eval_every": 100} | options)
        )
        folder = RunFolder(tmp_path / "run")
        folder.path.mkdir(exist_ok=True)
        accelerator = make_accelerator(config, folder.logs)
        state = prepare_training(PerSample(), config, accelerator)
        on_start(state.task)
        recorder = Recorder(config, folder, batches(0), watchers, accelerator, started_at=0)
        clock = Clock()
        with clock("train"), recorder:
            fit(state, batches, config, accelerator, recorder.on_step, lambda: state.step == until)
        write_cost(recorder, clock, state.step)
        return state, recorder, [json.loads(line) for line in folder.metrics.read_text().splitlines()]

    return run


def test_watchers_are_called_when_due_and_at_the_end_and_their_scores_are_logged(train):
    called = []

    def score(step):
        called.append(step)
        return {"dino": step / 10}

    _, _, rows = train(Watcher("scores", 2, score))
    assert called == [2, 4, 5]
    assert [row.get("dino") for row in rows] == [None, 0.2, None, 0.4, 0.5]


def test_the_loss_of_a_step_is_the_mean_over_samples(train):
    _, _, rows = train()
    assert rows[0]["loss"] == (1 + 4) / 2
    assert rows[-1]["validation_loss"] < rows[0]["loss"]


@pytest.mark.parametrize("decay", [None, 0.5])
def test_what_is_watched_is_what_would_be_saved(train, decay):
    """The average of the weights where there is one; training goes on from the weights themselves."""
    tasks, seen = [], []
    watcher = Watcher("scores", 5, lambda step: seen.append(float(tasks[0].weight.detach())) or {})
    state, _, _ = train(watcher, ema_decay=decay, on_start=tasks.append)
    kept = state.parameters["weight"] if decay is None else state.ema.shadow_params[0]
    assert seen == [float(kept.detach())]
    assert (float(state.parameters["weight"]) == seen[0]) == (decay is None)


def test_a_watcher_that_fails_is_told_of_and_the_others_go_on(train, capsys):
    def fail(step):
        raise RuntimeError(f"no images at {step}")

    _, _, rows = train(Watcher("sample images", 5, fail), Watcher("scores", 5, lambda step: {"dino": 1.0}))
    assert "the sample images of step 5 failed (RuntimeError: no images at 5): training goes on" in " ".join(
        capsys.readouterr().err.split()
    )
    assert rows[-1]["dino"] == 1.0
    assert len(rows) == 5


def test_a_signal_cuts_short_only_what_can_be_made_up_for(train):
    called = []

    def watch(name):
        def call(step):
            called.append((name, step))
            if step == 2 and name == "scores":
                signal.raise_signal(signal.SIGTERM)
            return {}

        return call

    done = Watcher("scores", 2, watch("scores")), Watcher("sample images", 2, watch("samples"), is_missing=lambda step: True)
    with signals.stop_signals(), signals.deferred():
        state, recorder, rows = train(*done, until=2)
        assert called == [("scores", 2)]  # the signal came during the scores, which were finished; no image was begun
        assert len(rows) == 2
    recorder.catch_up(state)
    assert called[1:] == [("samples", 2)]


def test_nothing_is_made_up_for_that_is_there(train):
    called = []
    there = Watcher("sample images", 5, lambda step: called.append(step) or {}, is_missing=lambda step: False)
    state, recorder, _ = train(there)
    recorder.catch_up(state)
    assert called == [5]


def test_divergence_is_a_field_of_its_own(train):
    _, recorder, _ = train()
    recorder.record_divergence(6)
    assert json.loads(recorder.run.metrics.read_text().splitlines()[-1]) == {"step": 6, "loss": None, "diverged": True}


def test_the_cost_adds_up_over_sessions(train):
    _, recorder, _ = train()
    cost = json.loads(recorder.run.cost.read_text())
    assert (cost["steps"], cost["processes"], cost["device"]) == (5, 1, "cpu")
    assert cost["peak_memory_bytes"] > 1e6
    recorder.run.cost.write_text(json.dumps(cost | {"seconds": {"train": 1000.0}}))
    train()
    assert json.loads(recorder.run.cost.read_text())["seconds"]["train"] > 1000
