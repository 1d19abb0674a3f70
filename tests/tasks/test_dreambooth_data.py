"""DreamBooth's batches: what is in them, how they are drawn, and that processes and micro-batches only share them out."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from etherdiff.config import DreamBoothConfig
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import encode_prompts, load_base
from etherdiff.images.reading import read_photos, resize_and_crop
from etherdiff.tasks.dreambooth import crop_windows, image_moments, make_batches
from etherdiff.tasks.task import DenoisingLoss
from etherdiff.train import batches
from etherdiff.train.batches import VALIDATION_TIMESTEPS, Moments, StepBatches

SHAPE = (4, 3, 3)  # of a latent


def moments(images: int, crops: int = 1, flips: int = 1, std: float = 0.0, start: float = 0.0) -> Moments:
    """Every view's mean is one number of its own, all over."""
    numbers = np.arange(images * crops * flips, dtype=np.float32).reshape(images, crops * flips) + start
    mean = np.broadcast_to(numbers[..., None, None, None], (*numbers.shape, *SHAPE))
    return Moments(np.stack([mean, np.full_like(mean, std)], 2), flips)


def make_data(subject=None, class_images=None, scaling_factor=1.0, **options) -> StepBatches:
    text = torch.stack([torch.full((7, 5), float(kind)) for kind in range(3)])  # 0 subject, 1 class, 2 empty
    config = DreamBoothConfig(subject="x", **options)
    return make_batches(config, subject or moments(5), class_images, text, scaling_factor, timesteps=1000)


def halves(batch, count: int):
    """A batch with prior preservation as {"subject": ..., "class": ...}."""
    return {name: (tensor[:count], tensor[count:]) for name, tensor in batch.items()}


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_out_the_batch_of_one(processes, accumulation, prior):
    varied = {"caption_dropout": 0.5, "flip": True, "crop": "random", "seed": 3, "gradient_accumulation": accumulation}
    sets = moments(5, 4, 2, std=0.3), moments(6, 1, 2, std=0.2, start=100) if prior else None
    several = make_data(*sets, scaling_factor=0.18215, batch_size=2, **varied)
    one = make_data(*sets, scaling_factor=0.18215, batch_size=2 * processes, **varied)
    for step in (0, 1, 17):
        shares = [several.batches(step, process, processes) for process in range(processes)]
        whole = one.batches(step, 0, 1)
        assert len(whole) == accumulation
        for part in range(accumulation):
            for name in ("latents", "noise", "timesteps", "text"):
                kinds = [halves({name: share[part][name]}, 2)[name] for share in shares]
                together = torch.cat([torch.cat(kind) for kind in zip(*kinds, strict=True)])
                assert torch.equal(together, whole[part][name]), name


def test_accumulated_micro_batches_are_one_batch():
    sets = moments(5, std=0.1), moments(6, std=0.1)
    parts = make_data(*sets, batch_size=2, gradient_accumulation=3).batches(4, 0, 1)
    (whole,) = make_data(*sets, batch_size=6).batches(4, 0, 1)
    for name in ("latents", "noise", "timesteps", "text"):
        kinds = [halves({name: part[name]}, 2)[name] for part in parts]
        assert torch.equal(torch.cat([torch.cat(kind) for kind in zip(*kinds, strict=True)]), whole[name])


def test_a_step_does_not_depend_on_those_before():
    data, again = make_data(moments(5, std=1.0), batch_size=2), make_data(moments(5, std=1.0), batch_size=2)
    for step in range(5):
        data.batches(step, 0, 1)
    for name, tensor in data.batches(9, 0, 1)[0].items():
        assert torch.equal(tensor, again.batches(9, 0, 1)[0][name])


def test_seeds_steps_and_slots_differ():
    data = make_data(batch_size=4)
    noises = [*data.batches(0, 0, 1)[0]["noise"], *data.batches(1, 0, 1)[0]["noise"]]
    noises += [*make_data(batch_size=4, seed=1).batches(0, 0, 1)[0]["noise"]]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == 12


def test_every_image_is_seen_once_per_pass():
    data = make_data(moments(5), moments(8, start=100), batch_size=2)
    seen = [data.batches(step, 0, 1)[0]["latents"][:, 0, 0, 0] for step in range(20)]
    subject = torch.cat([values[:2] for values in seen]).reshape(8, 5)
    assert all(sorted(once.tolist()) == [0, 1, 2, 3, 4] for once in subject)
    of_class = torch.cat([values[2:] for values in seen]).reshape(5, 8)
    assert all(sorted(once.tolist()) == list(range(100, 108)) for once in of_class)


class Fixed(nn.Module):
    """Predicts what makes each sample's loss its own mean latent: noise + sqrt of it."""

    def __init__(self, noise, losses):
        super().__init__()
        self.noise, self.losses = noise, losses

    def forward(self, x, timesteps, text, return_dict=True):
        return (self.noise + self.losses.sqrt()[:, None, None, None],)


@pytest.mark.parametrize("prior_weight", [1.0, 0.25, 3.0])
@pytest.mark.parametrize("size", [1, 3])
def test_the_loss_is_the_subjects_mean_and_the_weighted_mean_of_the_class(size, prior_weight):
    data = make_data(moments(5), moments(6), batch_size=size, prior_weight=prior_weight)
    (batch,) = data.batches(0, 0, 1)
    losses = torch.linspace(0.5, 4.0, 2 * size)
    task = DenoisingLoss(Fixed(batch["noise"], losses), load_base(find_base("tiny")).noise_scheduler, data.config)
    expected = losses[:size].mean() + prior_weight * losses[size:].mean()
    torch.testing.assert_close(task(batch), expected)


def test_without_prior_preservation_the_loss_is_the_subjects_mean():
    (batch,) = make_data(moments(5), None, batch_size=3).batches(0, 0, 1)
    assert len(batch["latents"]) == 3
    torch.testing.assert_close(batch["weights"], torch.full((3,), 1 / 3))
    assert (batch["text"] == 0).all()


def test_class_samples_have_their_own_text_noise_and_timesteps():
    (batch,) = make_data(moments(5), moments(6), batch_size=4, caption_dropout=0.9).batches(0, 0, 1)
    parts = halves(batch, 4)
    assert set(parts["text"][0][:, 0, 0].tolist()) <= {0.0, 2.0}
    assert (parts["text"][1] == 1).all()  # captions are dropped for the subject only
    assert not torch.equal(*parts["noise"])
    assert not torch.equal(*parts["timesteps"])


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_captions_are_dropped_at_their_rate(rate):
    data = make_data(batch_size=20, caption_dropout=rate)
    kinds = torch.cat([data.batches(step, 0, 1)[0]["text"][:, 0, 0] for step in range(100)])
    assert set(kinds.tolist()) <= {0.0, 2.0}
    dropped = (kinds == 2).double().mean().item()
    assert abs(dropped - rate) <= 4 * (rate * (1 - rate) / len(kinds)) ** 0.5


def test_views_are_drawn_evenly_among_crops_and_flips():
    data = make_data(moments(2, 4, 2), batch_size=10, crop="random", cached_crops=4, flip=True)
    drawn = torch.cat([data.batches(step, 0, 1)[0]["latents"][:, 0, 0, 0] for step in range(200)]).long()
    counts = torch.bincount(drawn, minlength=16)
    assert len(counts) == 16
    assert ((counts - 125.0) ** 2 / 125).sum() < 45  # chi-squared of 15 degrees of freedom: p < 1e-4 above


def test_latents_are_draws_of_the_posterior_scaled():
    subject = Moments(np.stack([np.full((1, 1, *SHAPE), 2.0, np.float32), np.full((1, 1, *SHAPE), 0.5, np.float32)], 2))
    data = make_data(subject, batch_size=50, scaling_factor=0.18215)
    batches = [data.batches(step, 0, 1)[0] for step in range(40)]
    drawn = torch.cat([batch["latents"] for batch in batches]).double() / 0.18215
    n = drawn.numel()
    assert abs(drawn.mean() - 2.0) < 5 * 0.5 / n**0.5
    assert abs(drawn.std() - 0.5) < 5 * 0.5 / (2 * n) ** 0.5
    noise = torch.cat([batch["noise"] for batch in batches]).flatten().double()
    assert abs(torch.corrcoef(torch.stack([drawn.flatten(), noise]))[0, 1]) < 5 / n**0.5


def test_timesteps_cover_the_schedule():
    data = make_data(batch_size=50)
    timesteps = torch.cat([data.batches(step, 0, 1)[0]["timesteps"] for step in range(100)])
    assert timesteps.dtype == torch.int64
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert len(timesteps.unique()) > 950  # of 1000, in 5000 draws: 993 expected
    assert abs(timesteps.double().mean() - 499.5) < 5 * 1000 / 12**0.5 / 5000**0.5


def test_validation_batches_never_change():
    data = make_data(moments(3, 2, 2, std=5.0), moments(6), flip=True, caption_dropout=0.9, scaling_factor=0.5)
    first, second = data.validation_batches(), data.validation_batches()
    assert len(first) == 3
    for item, (batch, again) in enumerate(zip(first, second, strict=True)):
        assert all(torch.equal(batch[name], again[name]) for name in batch)
        assert batch["timesteps"].tolist() == [125, 375, 625, 875]
        assert (batch["latents"] == 0.5 * 4 * item).all()  # the mean of the first view, not a draw
        assert (batch["text"] == 0).all()
        assert batch["weights"].sum() == pytest.approx(1)
        assert len({tuple(noise.flatten().tolist()) for noise in batch["noise"]}) == VALIDATION_TIMESTEPS
    assert not torch.equal(first[0]["noise"], first[1]["noise"])


# --- What the moments are ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    numbers = np.random.default_rng(0)
    return [Image.fromarray(numbers.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((90, 64), (64, 100), (64, 64))]


@torch.no_grad()
def encoded(vae, image: Image.Image):
    """The posterior of one image, encoded on its own, from pixels scaled here."""
    pixels = torch.tensor(np.array(image), dtype=torch.float32).permute(2, 0, 1)[None] / 255 * 2 - 1
    posterior = vae.encode(pixels).latent_dist
    return posterior.mean[0], posterior.std[0]


def moments_of(model, hashes, pictures, config) -> Moments:
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.png" for number in range(len(pictures))]
        for path, picture in zip(paths, pictures, strict=True):
            picture.save(path)
        return image_moments(read_photos(paths), config, config.resolution, model, hashes, "test")


def assert_view(found: Moments, view, vae, image: Image.Image) -> None:
    mean, std = encoded(vae, image)
    torch.testing.assert_close(found.read(*view)[0], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.read(*view)[1], std, rtol=1e-4, atol=1e-5)


def center_of(image: Image.Image) -> Image.Image:
    """The 64 px window in the middle of a picture whose shorter side is 64 px: no scaling, so cutting is all."""
    scaled = image if min(image.size) == 64 else None
    assert scaled is not None
    left, top = (image.width - 64) // 2, (image.height - 64) // 2
    return image.crop((left, top, left + 64, top + 64))


def test_moments_are_the_encoders_for_the_centre_and_its_mirror_image(model, hashes, pictures):
    config = DreamBoothConfig(subject="x", resolution=64, flip=True)
    found = moments_of(model, hashes, pictures, config)
    assert (len(found), found.crops, found.flips) == (3, 1, 2)
    assert found.array.shape == (3, 2, 2, 4, 16, 16)
    for item, picture in enumerate(pictures):
        assert_view(found, (item, 0, 0), model.vae, center_of(picture))
        mirrored = Image.fromarray(np.ascontiguousarray(np.array(center_of(picture))[:, ::-1]))
        assert_view(found, (item, 0, 1), model.vae, mirrored)
    mirrored_latent = found.read(0, 0, 0)[0].flip(-1)
    assert not torch.allclose(found.read(0, 0, 1)[0], mirrored_latent, atol=1e-3)  # an encoding, not a flipped latent


def test_random_crops_are_windows_of_the_scaled_image_spread_over_it(model, hashes, pictures):
    config = DreamBoothConfig(subject="x", resolution=64, crop="random", cached_crops=6, seed=5)
    found = moments_of(model, hashes, pictures, config)
    assert (len(found), found.crops, found.flips) == (3, 6, 1)
    windows = crop_windows(pictures[0], 0, config, 64)
    possible = [pictures[0].crop((0, top, 64, top + 64)) for top in range(90 - 64 + 1)]
    tops = [next(i for i, p in enumerate(possible) if np.array_equal(np.array(p), np.array(w))) for w in windows]
    assert len(set(tops)) >= 4
    for crop, top in enumerate(tops):
        assert_view(found, (0, crop, 0), model.vae, possible[top])
    torch.testing.assert_close(found.read(2, 0), found.read(2, 5))  # a square image has one window
    other = crop_windows(pictures[0], 0, config.model_copy(update={"seed": 6}), 64)
    assert any(a.tobytes() != b.tobytes() for a, b in zip(windows, other, strict=True))


def test_images_are_scaled_to_the_resolution(model, hashes):
    big = Image.linear_gradient("L").convert("RGB").resize((192, 192))
    found = moments_of(model, hashes, [big], DreamBoothConfig(subject="x", resolution=64))
    assert_view(found, (0, 0, 0), model.vae, resize_and_crop(big, 64))


def test_moments_are_encoded_once_and_again_when_anything_changes(model, hashes, pictures, monkeypatch):
    calls = []
    compute = batches._compute
    monkeypatch.setattr(batches, "_compute", lambda *args: calls.append(args) or compute(*args))
    config = DreamBoothConfig(subject="x", resolution=32, seed=77)
    first = moments_of(model, hashes, pictures, config)
    again = moments_of(model, hashes, pictures, config)
    assert len(calls) == 1
    assert np.array_equal(first.array, again.array)
    irrelevant = {"steps": 3, "learning_rate": 1e-3, "method": "lora", "seed": 78}  # the seed: crops are central
    moments_of(model, hashes, pictures, config.model_copy(update=irrelevant))
    assert len(calls) == 1
    changes = [{"resolution": 64}, {"flip": True}, {"crop": "random", "cached_crops": 2}]
    changes += [{"crop": "random", "cached_crops": 3}, {"crop": "random", "cached_crops": 3, "seed": 78}]
    for count, change in enumerate(changes, start=2):
        moments_of(model, hashes, pictures, config.model_copy(update=change))
        assert len(calls) == count, change
    moments_of(model, hashes, pictures[:2], config)
    moments_of(model, hashes | {"vae": "another"}, pictures, config)
    darker = [pictures[0].point(lambda value: value // 2), *pictures[1:]]
    moments_of(model, hashes, darker, config)
    assert len(calls) == len(changes) + 4


def test_text_embeddings_are_the_pipelines(model):
    prompts = ["a photo of sks dog", "a photo of dog", "", "dog " * 200]
    found = encode_prompts(model.tokenizer, model.text_encoder, prompts)
    assert found.shape == (4, 77, model.text_encoder.config.hidden_size)
    for prompt, text in zip(prompts, found, strict=True):
        ids = model.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            torch.testing.assert_close(text, model.text_encoder(ids)[0][0])
