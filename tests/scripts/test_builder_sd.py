"""The builder of tiny-sd: its tokenizer against CLIP's own, its training data, a resumed training, and the folder it writes."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from tiny_world import autoencoder, diffusion, pipeline, reading, tokenizer, training
from tiny_world.data import SceneSet, to_tensor
from tiny_world.training import Schedule, train
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from etherdiff.families.bases import shipped_config
from etherdiff.tasks.subjects import SUBJECT_CLASSES, make_prompts, prompts_for
from etherdiff.tiny import world
from etherdiff.tiny.world import CLASSES, render_scene


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tiny-sd with random weights, written as the builder writes it, and the models that went into it."""
    folder = tmp_path_factory.mktemp("tiny") / "sd"
    tokenizer.write_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    vae = autoencoder.make_model()
    vae.register_to_config(scaling_factor=0.5)
    model = diffusion.make_model(CLIPTokenizer.from_pretrained(folder / "tokenizer"))
    pipeline.write_pipeline(model.eval(), vae, folder)
    return folder, model, vae


@pytest.fixture(scope="module")
def own(folder):
    return CLIPTokenizer.from_pretrained(folder[0] / "tokenizer")


@pytest.fixture(scope="module")
def clip():
    return CLIPTokenizer.from_pretrained(shipped_config("sd15") / "tokenizer")


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def dreambooth_prompts():
    nouns = sorted(set(SUBJECT_CLASSES.values()))
    return [prompt.text for noun in nouns for prompt in make_prompts(prompts_for(noun), "sks", noun)]


def tiny_prompts():
    return [prompt.format(identifier="sks", class_noun="mushroom") for prompt in world.PROMPTS]


def world_captions():
    scenes = [render_scene("test", index) for index in range(50)]
    return [caption for scene in scenes for caption in (scene.caption, scene.loose_caption, scene.short_caption)]


@pytest.mark.parametrize("texts", [dreambooth_prompts, tiny_prompts, world_captions])
def test_known_prompts_are_cut_into_the_pieces_that_clip_cuts_them_into(own, clip, texts):
    for text in texts():
        assert pieces(own, text) == pieces(clip, text)


@pytest.mark.parametrize("text", ["A PHOTO of sks Dog", "zürich has 7 quixotic zebras", "☃ antidisestablishmentarianism"])
def test_any_text_comes_back(own, text):
    assert own.decode(own(text)["input_ids"], skip_special_tokens=True).strip() == text.lower()


def test_special_tokens_are_clips_and_come_last(own):
    assert 1_500 <= len(own) <= 2_000
    assert (own.bos_token_id, own.eos_token_id, own.pad_token_id) == (len(own) - 2, len(own) - 1, len(own) - 1)
    assert own.model_max_length == 77


def test_the_identifier_is_one_token_that_no_caption_has(own):
    start, identifier, end = own("sks")["input_ids"]
    assert (start, end) == (own.bos_token_id, own.eos_token_id)
    assert not any(identifier in own(caption)["input_ids"] for caption in world_captions())


def test_pieces_are_those_of_the_whole_list_of_merges():
    merges = [("b", "c"), ("a", "b"), ("bc", "d</w>"), ("x", "y</w>")]
    # b c merges first, so a b never comes up; x y is in no word
    assert tokenizer._ranks_used("abcd", {merge: rank for rank, merge in enumerate(merges)}) == {0, 2}


def training_set(own, count=6):
    scenes = [render_scene("train", index) for index in range(count)]
    forms = zip(*((scene.caption, scene.loose_caption, scene.short_caption) for scene in scenes), strict=True)
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((count, 8, 16, 16)).astype(np.float16)
    ids = [diffusion.tokenize(own, captions) for captions in forms]
    strange = np.array([own(word)["input_ids"][1] for word in ("jungle", "mountain")], np.uint16)
    segmentations = np.stack([scene.segmentation for scene in scenes])
    return diffusion.TrainingSet(moments, segmentations, ids, diffusion.tokenize(own, [""])[0], strange)


def test_captions_are_dropped_and_given_strange_words_as_often_as_said(own):
    data = training_set(own)
    rng, row = np.random.default_rng(1), data.ids[0][0]
    drawn = [diffusion._caption(rng, data, row) for _ in range(4_000)]
    empty = np.mean([np.array_equal(ids, data.empty) for ids in drawn])
    strange = [ids for ids in drawn if np.isin(ids, data.strange).any()]
    assert empty == pytest.approx(diffusion.DROPPED_SHARE, abs=0.02)
    assert len(strange) / len(drawn) == pytest.approx(diffusion.STRANGE_SHARE, abs=0.015)
    for ids in strange:
        assert np.isin(ids, data.strange).sum() == 1
        assert ids[0] == own.bos_token_id
        assert ids[-1] == own.eos_token_id
        rest = ids[~np.isin(ids, data.strange)]
        assert np.array_equal(rest, row[:-1])


def test_latents_are_drawn_from_their_moments(own, monkeypatch):
    monkeypatch.setattr(diffusion, "BATCH", 600)
    data = training_set(own, count=1)
    data.moments[:, :4], data.moments[:, 4:] = 3.0, 0.5
    latents, noise, timesteps, ids, _ = diffusion.draw_batch(np.random.default_rng(0), data)
    assert latents.mean() == pytest.approx(3.0, abs=0.01)
    assert latents.std() == pytest.approx(0.5, abs=0.01)
    assert noise.std() == pytest.approx(1.0, abs=0.01)
    assert timesteps.min() >= 0
    assert 980 < timesteps.max() < 1000
    assert (timesteps < 500).float().mean() == pytest.approx(0.5, abs=0.06)
    assert ids.shape == (600, 77)


def test_places_of_things_weigh_five_times_those_of_sky_and_ground():
    segmentation = np.zeros((1, 64, 64), np.uint8)
    segmentation[:, :, 32:] = CLASSES.index("wood")  # the last of the grounds
    segmentation[:, :4, :4] = CLASSES.index("ball")  # the first of the things; one latent
    segmentation[:, 4:8, :2] = CLASSES.index("fish")  # half a latent
    weights = diffusion.place_weights(segmentation)[0, 0]
    plain = weights[15, 15]
    assert weights[0, 0] / plain == pytest.approx(5)
    assert weights[1, 0] / plain == pytest.approx(3)
    assert (weights == plain).sum() == 254
    scenes = np.stack([render_scene("train", index).segmentation for index in range(200)])
    assert diffusion.place_weights(scenes).mean() == pytest.approx(1, abs=0.05)


def test_the_autoencoder_weighs_things_where_they_are_after_mirroring():
    rendered = [render_scene("train", index) for index in range(8)]
    images, classes = (np.stack([getattr(scene, name) for scene in rendered]) for name in ("image", "segmentation"))
    drawn, weights, _ = autoencoder.draw_batch(np.random.default_rng(0), SceneSet(images, classes, None, [], [], []))
    things = torch.from_numpy(classes >= CLASSES.index("ball"))
    pictures = to_tensor(images)
    ways = {(i, way) for i in range(8) for way in (1, -1)}
    seen = set()
    for image, weight in zip(drawn, weights, strict=True):
        i, way = next((i, way) for i, way in ways if torch.equal(image, pictures[i] if way == 1 else pictures[i].flip(-1)))
        assert torch.equal(weight[0], 1 + 4.0 * (things[i] if way == 1 else things[i].flip(-1)))
        seen.add(way)
    assert seen == {1, -1}


def test_the_decoder_goes_on_and_leaves_the_latents_as_they_are():
    torch.manual_seed(0)
    model = autoencoder.Decoding(autoencoder.make_model())
    model(torch.rand(2, 3, 64, 64) * 2 - 1, torch.ones(2, 1, 64, 64), torch.randn(2, 4, 16, 16)).backward()
    learning = {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {"decoder", "post_quant_conv"}


class MicroDenoiser(nn.Module):
    """Noise from noisy latents, timestep and token ids with a few hundred parameters."""

    def __init__(self, tokens):
        super().__init__()
        self.latents = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.words = nn.Embedding(tokens, 4)

    def forward(self, noisy, timesteps, ids):
        return self.latents(noisy) * (1 - timesteps[:, None, None, None] / 1000) + self.words(ids).mean(1)[..., None, None]


def train_micro(work, own, stop_at=None):
    data, noise_scheduler = training_set(own), diffusion.make_noise_scheduler()
    torch.manual_seed(0)
    steps = iter(range(100))

    def draw(rng):
        if next(steps) == stop_at:
            raise KeyboardInterrupt
        return diffusion.draw_batch(rng, data)

    def loss(model, *batch):
        return diffusion.denoising_loss(model, diffusion.DenoisingBatch(*batch), noise_scheduler)

    schedule = Schedule(steps=8, learning_rate=1e-2, warmup=2, evaluate_every=4)

    def evaluate(model):
        return {"validation_loss": diffusion.validation_loss(model, data, noise_scheduler)}

    return train("micro", MicroDenoiser(len(own)), draw, loss, schedule, work, evaluate)


def test_a_stopped_and_resumed_training_equals_an_uninterrupted_one(own, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1)
    whole = train_micro(tmp_path / "whole", own)
    with pytest.raises(KeyboardInterrupt):
        train_micro(tmp_path / "parts", own, stop_at=5)
    resumed = train_micro(tmp_path / "parts", own)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    logs = [read_log(tmp_path / part) for part in ("whole", "parts")]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]] == [4, 8, 8]
    assert logs[0][-1] == logs[1][-1]


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Stages of two steps on a few scenes, with no rendering in other processes."""
    drawn = [render_scene("train", index) for index in range(8)]
    images, classes = (np.stack([getattr(scene, name) for scene in drawn]) for name in ("image", "segmentation"))
    captions = ([getattr(scene, name) for scene in drawn] for name in ("caption", "loose_caption", "short_caption"))
    scenes = SceneSet(images, classes, None, *captions)
    for module in (autoencoder, diffusion, reading):
        monkeypatch.setattr(module, "SCHEDULE", Schedule(2, 1e-3, warmup=1, evaluate_every=2))
        monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(autoencoder, "DECODER_SCHEDULE", Schedule(2, 1e-3, warmup=1, evaluate_every=2))
    monkeypatch.setattr(diffusion, "SHEET_CAPTIONS", 8)
    for module in (autoencoder, diffusion):
        monkeypatch.setattr(module, "scene_set", lambda split, count, work: scenes)
    return tmp_path


def test_the_stages_of_tiny_sd_run_and_go_on_where_they_were(own, short):
    def build():
        vae = autoencoder.train_autoencoder(short, fraction=0.5)
        return vae, diffusion.train_denoiser(vae, own, short, fraction=0.5)

    built = build()
    assert (short / "unet" / "samples.png").is_file()
    assert {path.name for path in short.glob("*/checkpoints/*")} == {"step-000002"}
    assert not list(short.rglob("*.pt"))
    for first, again in zip(built, build(), strict=True):  # nothing is left to do
        states = first.state_dict(), again.state_dict()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def read_log(work):
    return [json.loads(line) for line in (work / "micro" / "log.jsonl").read_text().splitlines()]


def test_a_strange_words_embedding_does_not_move(own, tmp_path):
    """Weight decay would take the identifier's embedding to zero in a long training."""
    torch.manual_seed(0)
    before = MicroDenoiser(len(own)).words.weight[own("sks")["input_ids"][1]]
    after = train_micro(tmp_path, own).words.weight[own("sks")["input_ids"][1]]
    assert torch.equal(after, before)


def test_every_part_opens_as_float32_from_half_precision_files(folder):
    opened = StableDiffusionPipeline.from_pretrained(folder[0])
    parts = [opened.unet, opened.vae, opened.text_encoder, CLIPTextModel.from_pretrained(folder[0] / "text_encoder")]
    for part in parts:
        assert {tensor.dtype for tensor in part.parameters()} == {torch.float32}
    files = list(folder[0].rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    text_keys = load_file(folder[0] / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in text_keys)


def test_the_folder_is_stable_diffusion_1_5_in_small(folder, own):
    opened = StableDiffusionPipeline.from_pretrained(folder[0])
    sd15 = json.loads((shipped_config("sd15") / "scheduler" / "scheduler_config.json").read_text())
    ours = json.loads((folder[0] / "scheduler" / "scheduler_config.json").read_text())
    assert {key: ours[key] for key in sd15 if not key.startswith("_")} == {
        key: value for key, value in sd15.items() if not key.startswith("_")
    }
    assert opened.vae.config.scaling_factor == 0.5
    assert opened.safety_checker is None
    config = opened.text_encoder.config
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (len(own), own.eos_token_id, own.eos_token_id)
    image = opened("a photo of sks ball", height=64, width=64, num_inference_steps=2).images[0]
    assert image.size == (64, 64)


def test_it_computes_what_was_trained(folder, own):
    """Trained with plain attention, opened with torch's fused one: the same up to the half precision of the files."""
    _, model, _ = folder
    opened = StableDiffusionPipeline.from_pretrained(folder[0])
    ids = torch.from_numpy(diffusion.tokenize(own, ["a red ball on sand", ""]).astype(np.int64))
    noisy, timesteps = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    with torch.no_grad():
        text = opened.text_encoder(ids).last_hidden_state
        torch.testing.assert_close(text, model.text_encoder(ids).last_hidden_state, atol=0.01, rtol=0)
        predicted = opened.unet(noisy, timesteps, text).sample
        torch.testing.assert_close(predicted, model(noisy, timesteps, ids), atol=0.01, rtol=0)


def test_psnr_by_hand():
    """Pictures that come back 0.02 lighter in [-1, 1], 0.01 in [0, 1]: 20 log10(1 / 0.01) = 40 dB."""

    class Lighter:
        def encode(self, images):
            return type("Encoded", (), {"latent_dist": type("Posterior", (), {"mean": images})})

        def decode(self, latents):
            return type("Decoded", (), {"sample": latents + 0.02})

    images = np.full((3, 64, 64, 3), 100, np.uint8)
    scenes = type("Scenes", (), {"images": images})
    assert autoencoder.psnr(Lighter(), scenes) == pytest.approx(40.0, abs=1e-3)


def test_every_stage_of_the_script_is_there():
    path = Path(__file__).resolve().parents[2] / "scripts" / "build_tiny.py"
    spec = importlib.util.spec_from_file_location("build_tiny", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for module, function, _ in script.STAGES.values():
        assert callable(getattr(importlib.import_module(f"tiny_world.{module}"), function))
