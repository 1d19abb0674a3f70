"""Preprocessing against transformers' Pillow processors, torchvision and open_clip."""

import json

import numpy as np
import pytest
import torch
from eval_toys import CLIP_PREPROCESSOR, VIT_PREPROCESSOR, pillow_processor
from PIL import Image
from torchvision import transforms

from etherdiff.eval.libraries import Lpips, from_open_clip
from etherdiff.eval.preprocessing import Preprocessing, from_processor, read_preprocessing
from etherdiff.system.errors import UserError

OLD_DINO = {
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ViTFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 24,
}
OLD_CLIP = {
    "crop_size": 24,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 24,
}
CONVNEXT = VIT_PREPROCESSOR | {
    "image_processor_type": "ConvNextImageProcessor",
    "size": {"shortest_edge": 28},
    "crop_pct": 0.875,
}
SIZES = [(40, 40), (57, 41), (41, 57), (300, 33), (24, 24)]


def photo(size):
    rng = np.random.default_rng(sum(size))
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def ours(preprocessing, image):
    return preprocessing.normalize(preprocessing.pixels(image)[None])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("config", [CLIP_PREPROCESSOR, VIT_PREPROCESSOR, OLD_DINO, OLD_CLIP, CONVNEXT])
def test_it_is_what_the_processor_does_with_pillow(config, size, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    processor = pillow_processor(tmp_path)
    expected = torch.as_tensor(np.asarray(processor(images=photo(size), return_tensors="np")["pixel_values"]))
    torch.testing.assert_close(ours(read_preprocessing(tmp_path), photo(size)), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_lpips_reads_512_px_squares_as_the_scripts_do(size):
    script = transforms.Compose(
        [transforms.Resize((512, 512)), transforms.ToTensor(), transforms.Normalize(mean=[0.5] * 3, std=[0.5] * 3)]
    )
    torch.testing.assert_close(ours(Lpips.preprocessing, photo(size))[0], script(photo(size)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_open_clip(mode, interpolation, size):
    import open_clip

    config = {"size": 28, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": interpolation, "resize_mode": mode}
    theirs = open_clip.image_transform(
        28, False, mean=config["mean"], std=config["std"], interpolation=interpolation, resize_mode=mode
    )
    torch.testing.assert_close(ours(from_open_clip(config), photo(size))[0], theirs(photo(size)), atol=1e-6, rtol=0)


def test_what_is_not_supported_is_refused():
    with pytest.raises(ValueError, match="pads"):
        from_processor(CLIP_PREPROCESSOR | {"do_pad": True})
    with pytest.raises(UserError, match="longest"):
        from_open_clip({"size": 28, "mean": (0,) * 3, "std": (1,) * 3, "resize_mode": "longest"})


def test_a_processor_within_a_processor_is_read(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": CLIP_PREPROCESSOR}))
    assert read_preprocessing(tmp_path) == from_processor(CLIP_PREPROCESSOR)


@pytest.mark.parametrize("content", [None, "{", '{"size": 3}'])
def test_without_a_usable_configuration_nothing_is_guessed(tmp_path, content):
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserError):
        read_preprocessing(tmp_path)


def test_descriptions_differ_wherever_pixels_do():
    base = Preprocessing(size=(24, 24))
    others = [
        Preprocessing(edge=24),
        Preprocessing(size=(24, 24), crop=(20, 20)),
        Preprocessing(size=(24, 24), resample=int(Image.Resampling.BICUBIC)),
        Preprocessing(size=(24, 24), mean=(0.5, 0.5, 0.5)),
    ]
    described = [json.dumps(one.describe(), sort_keys=True) for one in [base, *others]]
    assert len(set(described)) == len(described)
