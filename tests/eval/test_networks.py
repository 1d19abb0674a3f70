"""Networks: against transformers', lpips', torch-fidelity's and open_clip's own ways of computing the same."""

import json
import shutil

import numpy as np
import pytest
import torch
from eval_toys import CLIP_PREPROCESSOR, SIZE, VIT_PREPROCESSOR, clip_model, draw, pillow_processor, save
from PIL import Image
from torchvision import transforms
from transformers import CLIPModel, ResNetForImageClassification, ViTModel

from etherdiff.eval import networks as networks_module
from etherdiff.eval.functional import lpips_distances
from etherdiff.eval.libraries import Lpips, from_open_clip
from etherdiff.eval.networks import (
    PRESETS,
    ROLES,
    Preprocessing,
    find_backbones,
    from_processor,
    load_backbone,
    read_preprocessing,
)
from etherdiff.system.errors import UserError
from etherdiff.system.files import file_hash


def pixels(backbone, *images):
    return [backbone.preprocessing.pixels(image) for image in images]


@pytest.fixture
def images(tmp_path):
    return [Image.open(draw(tmp_path / f"{number}.png", number, size)) for number, size in enumerate([(40, 36), (33, 70)])]


def processed(folder, images):
    return pillow_processor(folder)(images=images, return_tensors="pt")


@torch.no_grad()
def test_dino_is_the_cls_token_of_the_last_hidden_state(networks, specs, images):
    backbone = load_backbone("dino", specs["dino"], "cpu")
    model = ViTModel.from_pretrained(networks / "dino").eval()
    expected = model(**processed(networks / "dino", images)).last_hidden_state[:, 0]
    torch.testing.assert_close(backbone.encode(pixels(backbone, *images)), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_clip_is_the_projected_embeddings(networks, specs, images):
    backbone = load_backbone("clip", specs["clip"], "cpu")
    model = CLIPModel.from_pretrained(networks / "clip").eval()
    seen = model.vision_model(processed(networks / "clip", images).pixel_values).pooler_output
    torch.testing.assert_close(backbone.encode(pixels(backbone, *images)), model.visual_projection(seen), atol=1e-5, rtol=0)
    texts = ["a dog", "a red dog in the snow"]
    alone = [backbone.tokenizer([text], return_tensors="pt") for text in texts]
    read = torch.cat([model.text_model(**tokens).pooler_output for tokens in alone])
    torch.testing.assert_close(backbone.encode_text(texts), model.text_projection(read), atol=1e-5, rtol=0)


def test_clip_of_transformers_4_gives_the_projection_itself(specs, images, monkeypatch):
    def projection(output):
        return getattr(output, "pooler_output", output)  # with transformers 4 it is that already

    backbone = load_backbone("clip", specs["clip"], "cpu")
    expected = backbone.encode(pixels(backbone, *images))
    for name in ("get_image_features", "get_text_features"):
        now = getattr(backbone.model, name)
        monkeypatch.setattr(backbone.model, name, lambda now=now, **inputs: projection(now(**inputs)))
    torch.testing.assert_close(backbone.encode(pixels(backbone, *images)), expected)
    assert backbone.encode_text(["a dog"]).shape == (1, 12)


def test_clip_counts_the_tokens_it_would_not_read(specs):
    backbone = load_backbone("clip", specs["clip"], "cpu")
    assert backbone.too_long(["a dog", " ".join(["dog"] * 22), " ".join(["dog"] * 30)]) == [0, 0, 8]


@torch.no_grad()
def test_resnet_features_are_pooled_for_fid_and_layered_for_lpips(networks, specs, images):
    fid, lpips = (load_backbone(role, specs[role], "cpu") for role in ("fid", "lpips"))
    model = ResNetForImageClassification.from_pretrained(networks / "features").eval()
    output = model.resnet(**processed(networks / "features", images), output_hidden_states=True)
    torch.testing.assert_close(fid.encode(pixels(fid, *images)), output.pooler_output[:, :, 0, 0], atol=1e-5, rtol=0)
    expected = 0.0
    for layer in output.hidden_states:
        a, b = (one / one.norm(dim=0, keepdim=True) for one in layer)
        expected += float((a - b).square().sum(0).mean())
    one, other = lpips.encode(pixels(lpips, *images))
    assert float(lpips_distances([one], [other])) == pytest.approx(expected, rel=1e-5)


def test_lpips_is_the_package_lpips(images):
    import lpips

    from etherdiff.eval.libraries import Lpips

    torch.manual_seed(0)
    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)  # its linear weights come with the package
    backbone = Lpips(model, "random alex", "cpu")
    read = pixels(backbone, *images)
    vectors = list(backbone.encode(read))
    normalized = backbone.preprocessing.normalize(torch.stack(read))
    with torch.no_grad():
        expected = float(model(normalized[:1], normalized[1:]))
    found = lpips_distances(vectors, vectors)
    assert float(found[0, 1]) == pytest.approx(expected, rel=1e-5)
    assert float(found[0, 0]) == 0
    torch.testing.assert_close(found, found.T)


def test_lpips_with_a_negative_weight_is_refused():
    import lpips

    from etherdiff.eval.libraries import Lpips

    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    model.lin0.model[-1].weight.data[0, 0] = -1.0
    with pytest.raises(UserError, match="negative"):
        Lpips(model, "broken", "cpu")


def test_inception_is_torch_fidelitys_and_takes_images_of_any_size(images, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as module

    from etherdiff.eval.libraries import load_inception

    # nothing is downloaded: the weights that the network was built with stay
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    backbone = load_inception("inception:64", "cpu")
    expected = torch.cat([backbone.model(image[None])[0] for image in pixels(backbone, *images)])
    assert backbone.encode(pixels(backbone, *images)).shape == (2, 64)
    torch.testing.assert_close(backbone.encode(pixels(backbone, *images)), expected)


def test_open_clip_from_a_folder(tmp_path, images):
    import open_clip

    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIZE, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    statistics = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": statistics}))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    backbone = load_backbone("clip", f"local-dir:{folder}", "cpu")
    with torch.no_grad():
        expected = model.eval().encode_image(torch.stack([transform(image) for image in images]))
    torch.testing.assert_close(backbone.encode(pixels(backbone, *images)), expected, atol=1e-5, rtol=0)
    assert backbone.encode_text(["a dog", "a cat"]).shape == (2, 16)
    assert backbone.too_long(["a dog", " ".join(["dog"] * 18), " ".join(["dog"] * 25)]) == [0, 0, 7]
    assert str(folder.parent) not in json.dumps(backbone.identity.as_dict())


def test_an_identity_says_which_network_it_was(networks, specs):
    identity = load_backbone("dino", specs["dino"], "cpu").identity
    assert identity.name == "dino"
    assert identity.weights_sha256 == file_hash(networks / "dino" / "model.safetensors")
    assert identity.weights_hashed == "model.safetensors"
    assert identity.preprocessing["size"] == [SIZE, SIZE]
    assert {"torch", "pillow", "transformers"} <= set(identity.versions)
    assert json.loads(json.dumps(identity.as_dict())) == identity.as_dict()


def test_other_weights_or_preprocessing_are_another_identity(networks, tmp_path):
    def digest(folder):
        return load_backbone("dino", str(folder), "cpu").identity.digest

    again, resized, retrained = (tmp_path / name / "dino" for name in ("again", "resized", "retrained"))
    for folder in (again, resized, retrained):
        shutil.copytree(networks / "dino", folder)
    config = json.loads((resized / "preprocessor_config.json").read_text())
    (resized / "preprocessor_config.json").write_text(json.dumps(config | {"resample": 3}))
    model = ViTModel.from_pretrained(retrained)
    model.layernorm.weight.data += 1e-3
    model.save_pretrained(retrained)
    assert digest(again) == digest(networks / "dino")
    assert len({digest(folder) for folder in (again, resized, retrained)}) == 3


def test_a_folder_that_lacks_weights_is_not_filled_with_random_ones(networks, tmp_path):
    folder = tmp_path / "dino"
    shutil.copytree(networks / "dino", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    backbone = load_backbone("dino", str(folder), "cpu")
    with pytest.raises(UserError, match="lacks weights"):
        _ = backbone.model


def test_a_clip_folder_without_a_tokenizer_takes_the_package_s(specs):
    backbone = load_backbone("clip", specs["clip"], "cpu")
    assert backbone.tokenizer("a dog").input_ids == [49406, 320, 1929, 49407]


def test_the_tiny_preset_reads_what_comes_with_the_package(networks, tmp_path, monkeypatch):
    monkeypatch.setattr(networks_module, "ASSETS", tmp_path)
    shutil.copytree(networks, tmp_path / "tiny")
    found = find_backbones(ROLES, "tiny", device="cpu")
    assert {role: backbone.identity.name for role, backbone in found.items()} == {
        "dino": "etherdiff/tiny-dino",
        "clip": "etherdiff/tiny-clip",
        "lpips": "etherdiff/tiny-features",
        "fid": "etherdiff/tiny-features",
    }
    assert found["lpips"].identity.digest != found["fid"].identity.digest


def test_everything_wrong_is_said_at_once(specs, networks, tmp_path, monkeypatch):
    monkeypatch.setattr(networks_module, "ASSETS", tmp_path)
    (tmp_path / "empty").mkdir()
    named = {"clip": specs["dino"], "lpips": str(tmp_path / "empty"), "fid": "lpips:alex", "sharpness": "x"}
    with pytest.raises(UserError) as raised:
        find_backbones(ROLES, "tiny", named, "cpu")
    told = str(raised.value)
    assert len(raised.value.problems) == 5
    for part in ("sharpness", "needs a CLIP model", "not a transformers model", "neither a local folder", "'dino' is not part"):
        assert part in told
    with pytest.raises(UserError, match="paper, tiny"):
        find_backbones(ROLES, "huge")


@pytest.mark.parametrize(
    ("role", "spec"),
    [("lpips", "lpips:resnet"), ("fid", "inception:100"), ("clip", "ViT-B-32:nonsense"), ("dino", "./nowhere")],
)
def test_names_that_mean_nothing_are_refused(role, spec):
    with pytest.raises(UserError):
        load_backbone(role, spec, "cpu")


def test_a_hub_id_is_read_from_the_cache_with_its_commit(networks, tmp_path, monkeypatch):
    import huggingface_hub as hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--facebook--dino-vits16" / "snapshots" / commit
    shutil.copytree(networks / "dino", folder)
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **how: asked.append((repo, how["revision"])) or str(folder))
    backbone = load_backbone("dino", f"{PRESETS['paper']['dino']}@refs/pr/1", "cpu")
    assert asked == [("facebook/dino-vits16", "refs/pr/1")]
    assert (backbone.identity.name, backbone.identity.revision) == ("facebook/dino-vits16", commit)


def test_without_a_network_a_hub_id_says_what_would_help(monkeypatch):
    import huggingface_hub as hub

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="preset tiny"):
        load_backbone("clip", "openai/clip-vit-large-patch14", "cpu")


def test_a_clip_of_another_context_is_read_from_its_configuration(tmp_path):
    folder = tmp_path / "clip"
    save(clip_model(context=10), folder, CLIP_PREPROCESSOR)
    assert load_backbone("clip", str(folder), "cpu").too_long([" ".join(["dog"] * 9)]) == [1]


# --- Preprocessing ----------------------------------------------------------------------------------------------------


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
