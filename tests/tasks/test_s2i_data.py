"""Batches of the controllable task: functions of the step; image and map always belong together."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etherdiff.config import S2IConfig
from etherdiff.control.pipeline import HintEncoder
from etherdiff.tasks.s2i import tell_pairs
from etherdiff.tasks.task import DenoisingLoss
from etherdiff.train.batches import ImageSource, Moments, StepBatches

COUNT, SIDE, LATENT = 7, 8, 4


def moments(flips):
    """Image i is marked i + 1 in the left half of its latents, 0 in the right; mirrored, the other way round. No spread."""
    found = np.zeros((COUNT, flips, 2, 4, LATENT, LATENT), np.float32)
    for number in range(COUNT):
        found[number, 0, 0, :, :, : LATENT // 2] = number + 1
        if flips == 2:
            found[number, 1, 0, :, :, LATENT // 2 :] = number + 1
    return found


def picture(number):
    """The map of image i: grey i + 1 in its left half."""
    found = np.zeros((SIDE, SIDE, 3), np.uint8)
    found[:, : SIDE // 2] = number + 1
    return found


def encode(texts):
    """The length of each text stands for what it says."""
    return torch.tensor([[[float(len(text))]] for text in texts])


def make_data(**options):
    config = S2IConfig(dataset="x", resolution=SIDE, **({"batch_size": 3} | options))
    texts = ["x" * (number + 1) for number in range(COUNT)]
    flips = 1 + config.flip
    told, told_of_watched = tell_pairs(texts, picture, encode), tell_pairs(texts[:2], picture, encode)
    pairs, watched = ImageSource(Moments(moments(flips), flips), told), ImageSource(Moments(moments(1)[:2]), told_of_watched)
    return StepBatches(config, [pairs], watched, scaling_factor=1.0, timesteps=1000)


def numbers(batch):
    """Which image each latent is of, which the map is of, which the text, and on which side image and map are marked."""
    latents, control = batch["latents"], batch["control"] * 255
    left = latents[:, 0, 0, 0] > 0
    of_latents = latents[:, 0, 0].amax(1).round()
    of_control = control[:, 0, 0].amax(1).round()
    return (
        of_latents.tolist(),
        of_control.tolist(),
        batch["text"][:, 0, 0].tolist(),
        left.tolist(),
        (control[:, 0, 0, 0] > 0).tolist(),
    )


@settings(max_examples=40, deadline=None)
@given(step=st.integers(0, 10_000), flip=st.booleans(), seed=st.integers(0, 2**40))
def test_image_map_and_text_belong_together_mirrored_or_not(step, flip, seed):
    (batch,) = make_data(flip=flip, seed=seed).batches(step, 0, 1)
    of_latents, of_control, of_text, left, control_left = numbers(batch)
    assert of_latents == of_control == of_text
    assert left == control_left
    assert flip or all(left)


def test_half_of_the_samples_are_mirrored():
    data = make_data(flip=True)
    sides = [side for step in range(100) for side in numbers(data.batches(step, 0, 1)[0])[3]]
    assert 0.4 < np.mean(sides) < 0.6


def test_every_image_comes_once_in_a_pass():
    data = make_data(batch_size=1)
    assert sorted(numbers(data.batches(step, 0, 1)[0])[0][0] for step in range(COUNT)) == list(range(1, COUNT + 1))


@pytest.mark.parametrize(("processes", "parts"), [(3, 1), (1, 3)])
def test_processes_and_parts_share_the_batch_of_one(processes, parts):
    whole = make_data(batch_size=6, flip=True).batches(5, 0, 1)[0]
    split = make_data(batch_size=6 // (processes * parts), flip=True, gradient_accumulation=parts)
    shares = [batch for process in range(processes) for batch in split.batches(5, process, processes)]
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([share[name] for share in shares]), tensor), name


def test_dropped_captions_are_empty_and_their_maps_stay():
    data = make_data(caption_dropout=0.5, batch_size=4)
    rows = [numbers(data.batches(step, 0, 1)[0])[:3] for step in range(50)]
    texts = [text for row in rows for text in row[2]]
    assert 0.35 < np.mean([text == 0 for text in texts]) < 0.65
    assert all(of_latents == of_control for row in rows for of_latents, of_control in zip(row[0], row[1], strict=True))


def test_validation_batches_never_change():
    first, again = make_data().validation_batches(), make_data().validation_batches()
    assert len(first) == 2
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert first[0]["timesteps"].tolist() == [125, 375, 625, 875]


def make_task():
    torch.manual_seed(0)
    unet = torch.nn.Module()
    unet.conv_in = torch.nn.Conv2d(4, 6, 3, padding=1)
    unet.conv_out = torch.nn.Conv2d(6, 4, 3, padding=1)
    unet.forward = lambda x, t, text, return_dict: (unet.conv_out(torch.tanh(unet.conv_in(x))),)
    unet.requires_grad_(False)
    scheduler = SimpleNamespace(
        add_noise=lambda latents, noise, t: latents + noise, config=SimpleNamespace(prediction_type="epsilon")
    )
    return DenoisingLoss(unet, scheduler, S2IConfig(dataset="x"), HintEncoder(6, 2))


def test_the_loss_is_the_squared_error_under_the_hint():
    """Against the same written out by hand."""
    task, (batch,) = make_task(), make_data().batches(0, 0, 1)
    torch.nn.init.normal_(task.hint_encoder.layers[-1].weight)
    hidden = task.unet.conv_in(batch["latents"] + batch["noise"]) + task.hint_encoder(batch["control"])
    expected = (task.unet.conv_out(torch.tanh(hidden)) - batch["noise"]).square().mean()
    torch.testing.assert_close(task(batch), expected)


def test_only_the_last_layer_learns_at_first():
    """It is zero, so nothing passes back through it; after a step of it, everything learns."""
    task, (batch,) = make_task(), make_data().batches(0, 0, 1)
    task(batch).backward()
    gradients = [float(layer.weight.grad.abs().max()) for layer in task.hint_encoder.layers]
    assert gradients[-1] > 0
    assert not any(gradients[:-1])
    with torch.no_grad():
        task.hint_encoder.layers[-1].weight -= task.hint_encoder.layers[-1].weight.grad
    task.zero_grad()
    task(batch).backward()
    assert all(float(layer.weight.grad.abs().max()) > 0 for layer in task.hint_encoder.layers)
