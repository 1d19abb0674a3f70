"""Segmenters: against transformers' own post-processing, and which networks have a dataset's classes."""

import json
import shutil

import numpy as np
import pytest
import torch
from eval_toys import draw
from PIL import Image
from tiny_world.upernet import make_model
from transformers import (
    AutoImageProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    UperNetForSemanticSegmentation,
)

from etherdiff.control.signals.segmentation import find_palette
from etherdiff.eval import networks as networks_module
from etherdiff.eval.folders import load_segmenter
from etherdiff.eval.networks import PRESETS
from etherdiff.system.errors import UserError
from etherdiff.tiny.world import CLASSES

SIZE = 32
NORMALISATION = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.fixture(scope="session")
def upernet(tmp_path_factory):
    """The tiny segmenter, untrained."""
    folder = tmp_path_factory.mktemp("segmenters") / "upernet"
    torch.manual_seed(0)
    make_model().eval().save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}, do_reduce_labels=False, **NORMALISATION).save_pretrained(folder)
    return folder


def segformer(folder, names, reduces=False, **processor):
    """A SegFormer whose outputs have these names."""
    torch.manual_seed(1)
    small = {"hidden_sizes": [8, 8, 8, 8], "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    config = SegformerConfig(**small, sr_ratios=[1] * 4, num_labels=len(names), id2label=dict(enumerate(names)))
    SegformerForSemanticSegmentation(config).eval().save_pretrained(folder)
    size = {"size": {"height": SIZE, "width": SIZE}}
    SegformerImageProcessor(**(size | processor), do_reduce_labels=reduces, **NORMALISATION).save_pretrained(folder)
    return str(folder)


def pixels(segmenter, *images):
    return torch.stack([segmenter.preprocessing.pixels(image) for image in images])


@pytest.fixture
def images(tmp_path):
    return [Image.open(draw(tmp_path / f"{number}.png", number, (48, 48))) for number in range(3)]


@torch.no_grad()
def test_the_classes_are_those_of_transformers_own_post_processing(upernet, images):
    found = load_segmenter(str(upernet), CLASSES, "cpu")
    model = UperNetForSemanticSegmentation.from_pretrained(upernet).eval()
    # the processor resizes with Pillow or torchvision, by version; the pixels are compared elsewhere
    inputs = (pixels(found, *images).float() / 255 - 0.5) / 0.5
    processor = AutoImageProcessor.from_pretrained(upernet)
    expected = processor.post_process_semantic_segmentation(model(pixel_values=inputs), target_sizes=[(48, 48)] * 3)
    classes = found.segment(pixels(found, *images), 48)
    assert (classes.dtype, tuple(classes.shape)) == (torch.int64, (3, 48, 48))
    assert torch.equal(classes, torch.stack(expected))
    assert len(classes.unique()) > 1


@torch.no_grad()
def test_more_images_than_a_batch_give_the_same(upernet, images, monkeypatch):
    found = load_segmenter(str(upernet), CLASSES, "cpu")
    whole = found.segment(pixels(found, *images), 48)
    found.largest_batch = 2
    assert torch.equal(found.segment(pixels(found, *images), 48), whole)


def test_an_identity_says_which_network_it_was(upernet):
    identity = load_segmenter(str(upernet), CLASSES, "cpu").identity
    assert (identity.name, identity.weights_hashed) == ("upernet", "model.safetensors")
    assert identity.preprocessing["size"] == [64, 64]
    assert "transformers" in identity.versions


def test_the_tiny_segmenter_is_read_from_the_package(upernet, tmp_path, monkeypatch):
    monkeypatch.setattr(networks_module, "ASSETS", tmp_path)
    with pytest.raises(UserError, match="'upernet' is not part of this installation"):
        load_segmenter(PRESETS["tiny"]["segmenter"], CLASSES, "cpu")
    shutil.copytree(upernet, tmp_path / "tiny" / "upernet")
    assert load_segmenter(PRESETS["tiny"]["segmenter"], CLASSES, "cpu").identity.name == "etherdiff/tiny-upernet"


def test_logits_that_are_not_finite_are_told(upernet, images):
    found = load_segmenter(str(upernet), CLASSES, "cpu")
    forward = found.model.forward

    def spoiled(**inputs):
        output = forward(**inputs)
        output.logits[1, 2, 3, 4] = torch.nan
        return output

    found.model.forward = spoiled
    classes = found.segment(pixels(found, *images), 48)
    assert [int(one.min()) for one in classes][1] == int(classes[1].max()) == -1
    assert int(classes[[0, 2]].min()) >= 0


# --- Which class is which --------------------------------------------------------------------------------------------

NAMES = ("wall", "building", "sky")


@pytest.mark.parametrize("reduces", [False, True])
def test_as_many_classes_as_the_dataset_are_taken_one_to_one(tmp_path, reduces, images):
    """`do_reduce_labels` says how training maps were shifted, not outputs: they count from the map's first class anyway."""
    found = load_segmenter(segformer(tmp_path / "model", NAMES, reduces), NAMES, "cpu")
    with torch.no_grad():
        logits = found.model(pixel_values=found.preprocessing.normalize(pixels(found, *images))).logits
    scaled = torch.nn.functional.interpolate(logits, (SIZE, SIZE), mode="bilinear", align_corners=False)
    assert torch.equal(found.segment(pixels(found, *images), SIZE), scaled.argmax(1))


@torch.no_grad()
def test_a_first_class_that_is_other_is_left_out(tmp_path, images):
    found = load_segmenter(segformer(tmp_path / "model", ("other", *NAMES)), NAMES, "cpu")
    found.model.decode_head.classifier.bias[0] = 1e6  # it would win everywhere
    classes = found.segment(pixels(found, *images), SIZE)
    logits = found.model(pixel_values=found.preprocessing.normalize(pixels(found, *images))).logits
    scaled = torch.nn.functional.interpolate(logits, (SIZE, SIZE), mode="bilinear", align_corners=False)
    assert torch.equal(classes, scaled[:, 1:].argmax(1))
    assert 0 <= int(classes.min()) <= int(classes.max()) <= 2
    assert "first output left out" in found.identity.feature


def test_ade20k_has_150_classes_and_class_0_is_the_wall(tmp_path):
    classes = find_palette("ade20k").classes
    assert (len(classes), classes[0]) == (150, "wall")
    plain, with_other = segformer(tmp_path / "150", classes, True), segformer(tmp_path / "151", ("other", *classes))
    assert (load_segmenter(plain, classes, "cpu").skipped, load_segmenter(with_other, classes, "cpu").skipped) == (0, 1)


@pytest.mark.parametrize(
    ("names", "reduces", "why"),
    [
        (NAMES[:2], False, "2 classes .* and the dataset 3: name a segmenter"),
        ((*NAMES, "tree"), False, "4 classes .* and the dataset 3"),
        (("other", *NAMES), True, "removes 'other' from maps"),
        (("background", *NAMES[:2]), False, "lacks one"),
        (("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"), False, "4 classes"),
        (NAMES[::-1], False, "another order"),
    ],
)
def test_networks_with_other_classes_are_refused(tmp_path, names, reduces, why):
    with pytest.raises(UserError, match=why):
        load_segmenter(segformer(tmp_path / "model", names, reduces), NAMES, "cpu")


def test_longer_names_of_the_same_classes_are_the_same(tmp_path):
    names = ("wall", "building, edifice", "sky")
    assert load_segmenter(segformer(tmp_path / "model", names), NAMES, "cpu").skipped == 0


def test_what_does_not_segment_or_is_cut_is_refused(tmp_path, networks):
    with pytest.raises(UserError, match="does not segment"):
        load_segmenter(str(networks / "dino"), NAMES, "cpu")
    with pytest.raises(UserError, match="not a transformers model"):
        load_segmenter(str(tmp_path), NAMES, "cpu")
    with pytest.raises(UserError, match="neither a local folder"):
        load_segmenter("./nowhere", NAMES, "cpu")
    folder = segformer(tmp_path / "model", NAMES)
    path = next((tmp_path / "model").glob("pre*processor_config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_center_crop": True, "crop_size": {"height": 8, "width": 8}}))
    with pytest.raises(UserError, match="crops the centre of an image"):
        load_segmenter(folder, NAMES, "cpu")


def test_a_hub_id_is_fetched_with_its_commit(upernet, tmp_path, monkeypatch):
    import huggingface_hub as hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--openmmlab--upernet-convnext-large" / "snapshots" / commit
    shutil.copytree(upernet, folder)
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **how: str(folder))
    identity = load_segmenter(PRESETS["paper"]["segmenter"], CLASSES, "cpu").identity
    assert (identity.name, identity.revision) == ("openmmlab/upernet-convnext-large", commit)
    assert np.char.isalnum(identity.weights_sha256)
