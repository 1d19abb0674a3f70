"""What every task has: a name, a configuration, and parameters that checkpoints know by name."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from etherdiff.config import DreamBoothConfig, TrainConfig
from etherdiff.control.pipeline import HintEncoder
from etherdiff.runs.folder import TASKS
from etherdiff.tasks import dreambooth, find_task
from etherdiff.tasks.dreambooth import plan_dreambooth
from etherdiff.tasks.subjects import find_subject
from etherdiff.tasks.task import DenoisingLoss


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_found_by_its_name_in_run_yaml(name):
    task = find_task(name)
    assert task.name == name
    assert task.config_class is TASKS[name]
    assert callable(task.image_sets)


def test_there_is_no_other():
    with pytest.raises(KeyError):
        find_task("painting")


@pytest.mark.parametrize("encoder", [None, HintEncoder(6, 2)])
def test_checkpoints_know_the_parameters_by_these_names(encoder):
    loss = DenoisingLoss(nn.Linear(2, 2), SimpleNamespace(), TrainConfig(), encoder)
    names = {name.split(".")[0] for name, _ in loss.named_parameters()}
    assert names == ({"unet"} if encoder is None else {"unet", "hint_encoder"})


def test_a_plan_keeps_the_subject_it_found_and_hashes_its_pixels_once(tmp_path, monkeypatch):
    plan = plan_dreambooth(DreamBoothConfig(base="tiny", subject="candy_ball", output=tmp_path / "run"))
    assert plan.subject == find_subject("candy_ball", None)
    assert len(plan.images) == len(plan.subject.images)
    calls = []
    digest = dreambooth.pixels_digest
    monkeypatch.setattr(dreambooth, "pixels_digest", lambda images: calls.append(len(images)) or digest(images))
    assert plan.images_digest == plan.images_digest
    assert calls == [len(plan.images)]


def test_the_loss_is_the_weighted_sum_where_a_batch_has_weights():
    class Zero(nn.Module):
        def forward(self, noisy, timesteps, text, return_dict):
            return (torch.zeros_like(noisy),)

    scheduler = SimpleNamespace(add_noise=lambda x, *_: x, config=SimpleNamespace(prediction_type="epsilon"))
    loss = DenoisingLoss(Zero(), scheduler, TrainConfig())
    noise = torch.stack([torch.full((4, 2, 2), value) for value in (1.0, 3.0)])
    batch = {"latents": noise, "noise": noise, "timesteps": torch.zeros(2), "text": torch.zeros(2, 1, 1)}
    assert float(loss(batch)) == (1 + 9) / 2
    assert float(loss(batch | {"weights": torch.tensor([0.5, 2.0])})) == 0.5 + 18
