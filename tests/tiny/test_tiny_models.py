"""The models that come with the package: ordinary folders that open as float32, and good at what the tests use them for."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from tiny_world import clip, dino, features, upernet
from tiny_world.autoencoder import psnr
from tiny_world.data import scene_set, to_tensor
from tiny_world.judge import judge
from tiny_world.tokenizer import write_tokenizer
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    ResNetForImageClassification,
    UperNetForSemanticSegmentation,
)

from etherdiff.families.bases import find_base
from etherdiff.families.diffusion import sample
from etherdiff.families.sd1 import load_base, make_pipeline
from etherdiff.system.files import ASSETS
from etherdiff.tiny.world import CLASSES, render_scene

TINY = ASSETS / "tiny"
FOLDERS = ("sd", "clip", "dino", "upernet", "features")


def needs(name):
    """The folder of a tiny model, where it has been built."""
    if not (TINY / name / "config.json").is_file():
        pytest.skip(f"etherdiff/assets/tiny/{name} is not there yet: scripts/build_tiny.py builds it")
    return TINY / name


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scene_set("test", 202, tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def segmenter():
    return UperNetForSemanticSegmentation.from_pretrained(needs("upernet")).eval().requires_grad_(False)


@pytest.mark.parametrize("name", FOLDERS)
def test_each_folder_has_a_card_and_safetensors_only(name):
    needs(name if name != "sd" else "sd/unet")
    card = (TINY / name / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card
    assert "Held-out scores" in card
    assert not [path for path in (TINY / name).rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_all_of_it_is_small():
    sizes = [path.stat().st_size for path in TINY.rglob("*") if path.is_file()]
    assert sum(sizes) <= 40e6


def test_plain_diffusers_opens_the_pipeline_in_float32():
    """In a process that knows nothing of etherdiff."""
    script = (
        "import sys, json, diffusers\n"
        "p = diffusers.StableDiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "parts = (p.unet, p.vae, p.text_encoder)\n"
        "print(json.dumps(sorted({str(x.dtype) for part in parts for x in part.parameters()})), 'etherdiff' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(needs("sd/unet").parent)], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ['["torch.float32"]', "False"]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("clip", CLIPModel),
        ("dino", AutoModel),
        ("upernet", UperNetForSemanticSegmentation),
        ("features", ResNetForImageClassification),
    ],
)
def test_plain_transformers_opens_the_evaluators_in_float32(name, model):
    loaded = model.from_pretrained(needs(name))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_the_clip_folder_has_its_processor():
    processor = AutoProcessor.from_pretrained(needs("clip"))
    batch = processor(text=["a photo of a red ball"], images=[np.zeros((64, 64, 3), np.uint8)], return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 64, 64)


def test_the_tokenizer_is_what_its_builder_writes(tmp_path):
    write_tokenizer(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (TINY / "sd" / "tokenizer" / name).read_bytes()


def test_the_label_names_are_the_worlds(segmenter):
    assert tuple(segmenter.config.id2label[index] for index in range(len(CLASSES))) == CLASSES
    assert json.loads((needs("upernet") / "config.json").read_text())["backbone_config"]["patch_size"] == 2


def test_the_autoencoder_keeps_test_scenes(scenes):
    assert psnr(AutoencoderKL.from_pretrained(TINY / "sd" / "vae"), scenes) >= 28


def test_the_segmenter_sees_test_scenes(segmenter, scenes):
    assert upernet.segmentation_scores(segmenter, scenes)["miou"] >= 0.9


def test_clip_finds_the_caption_of_a_test_scene(scenes):
    model = CLIPModel.from_pretrained(needs("clip")).eval()
    assert clip.retrieval(model, AutoTokenizer.from_pretrained(needs("clip")), scenes)["full_top1"] >= 0.9


def test_dino_knows_a_test_thing_again(tmp_path):
    scores = dino.triples(AutoModel.from_pretrained(needs("dino")).eval(), dino.thing_views("test", 150, 2, tmp_path))
    assert scores["same_kind"] >= 0.95


def test_the_features_know_what_is_in_a_scene(scenes):
    model = ResNetForImageClassification.from_pretrained(needs("features")).eval().requires_grad_(False)
    assert features.label_scores(model, scenes)["mean_average_precision"] >= 0.7


def judged(segmenter, count):
    """Draw test captions; shares of right skies, grounds, kinds and colours. `scripts/measure_tiny.py` does 200."""
    pipeline, judgements = make_pipeline(load_base(find_base("tiny"))), []
    for index in range(count):
        scene = render_scene("test", index)
        image = np.asarray(sample(pipeline, scene.caption, [index], 64)[0])
        seen = segmenter(to_tensor(image[None])).logits.argmax(1)[0].numpy().astype(np.uint8)
        judgements.append(judge(image, seen, scene.sky, scene.ground, scene.things))
    return {
        "place": np.mean([right for j in judgements for right in (j.sky, j.ground)]),
        "kind": np.mean([right for j in judgements for right in j.kinds]),
        "colour": np.mean([right for j in judgements for right in j.colours]),
    }


def test_the_base_draws_what_a_few_test_captions_ask_for(segmenter):
    """What it reaches, far below what is wanted of kinds and colours (85%): see the README."""
    needs("sd/unet")
    shares = judged(segmenter, 12)
    assert shares["place"] >= 0.85
    assert shares["kind"] >= 0.5
    assert shares["colour"] >= 0.25
