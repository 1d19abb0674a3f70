"""What every task has: a name, a configuration, and parameters that checkpoints know by name."""

import gc
import hashlib
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from subject_photos import SIZE, draw_subject
from torch import nn

from etherdiff.config import TASK_CONFIGS, DreamBoothConfig, TrainConfig
from etherdiff.control.pipeline import HintEncoder
from etherdiff.images.reading import read_image
from etherdiff.tasks import find_task
from etherdiff.tasks.dreambooth import plan_dreambooth
from etherdiff.tasks.subjects import find_subject
from etherdiff.tasks.task import DenoisingLoss


@pytest.mark.parametrize("name", TASK_CONFIGS)
def test_a_task_is_found_by_its_name_in_run_yaml(name):
    task = find_task(name)
    assert task.name == name
    assert task.config_class is TASK_CONFIGS[name]
    assert callable(task.image_sets)


def test_there_is_no_other():
    with pytest.raises(KeyError):
        find_task("painting")


@pytest.mark.parametrize("encoder", [None, HintEncoder(6, 2)])
def test_checkpoints_know_the_parameters_by_these_names(encoder):
    loss = DenoisingLoss(nn.Linear(2, 2), SimpleNamespace(), TrainConfig(), encoder)
    names = {name.split(".")[0] for name, _ in loss.named_parameters()}
    assert names == ({"unet"} if encoder is None else {"unet", "hint_encoder"})


def test_a_plan_keeps_the_subject_it_found_and_the_digest_of_its_pixels_but_no_pixels(tmp_path):
    draw_subject(tmp_path / "ball")
    config = DreamBoothConfig(base="tiny", subject=str(tmp_path / "ball"), class_noun="ball", output=tmp_path / "run")
    plan = plan_dreambooth(config)
    gc.collect()
    kept = [thing for thing in gc.get_objects() if issubclass(type(thing), Image.Image) and thing.size == (SIZE, SIZE)]
    assert not kept
    assert plan.subject == find_subject(config.subject, None)
    assert plan.photos.paths == plan.subject.images
    total = hashlib.sha256()  # as runs of version 0.1 recorded it
    for path in plan.subject.images:
        image = read_image(path)
        total.update(repr(image.size).encode())
        total.update(image.tobytes())
    assert plan.photos.digest == total.hexdigest()


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
