"""The builders of the evaluators: their models, losses and scores, and the folders that they leave; trained for 3 steps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_world import clip, dino, features, upernet
from tiny_world.cards import parameter_count, write_card
from tiny_world.data import LABELS, SceneSet, to_tensor
from tiny_world.evaluator import soften, some
from tiny_world.tokenizer import write_tokenizer
from tiny_world.training import Schedule
from torch import nn
from transformers import AutoImageProcessor, AutoProcessor, CLIPModel, CLIPTokenizer, ResNetForImageClassification, ViTModel
from transformers import UperNetForSemanticSegmentation as UperNet

from etherdiff.tiny.world import CLASSES, KINDS, render_scene, render_thing

SCENES = 24


@pytest.fixture(scope="module")
def scenes() -> SceneSet:
    drawn = [render_scene("train", index) for index in range(SCENES)]
    labels = np.zeros((SCENES, len(LABELS)), np.uint8)
    for row, scene in zip(labels, drawn, strict=True):
        for thing in scene.things:
            row[LABELS.index(thing.kind)] = row[LABELS.index(thing.colour)] = 1
    return SceneSet(
        np.stack([scene.image for scene in drawn]),
        np.stack([scene.segmentation for scene in drawn]),
        labels,
        [scene.caption for scene in drawn],
        [scene.loose_caption for scene in drawn],
        [scene.short_caption for scene in drawn],
    )


@pytest.fixture(scope="module")
def views() -> np.ndarray:
    images = [render_thing("train", thing, view, k).image for thing in range(3) for k in range(3) for view in range(2)]
    return np.stack(images).reshape(3, 3, 2, 64, 64, 3)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("output") / "sd" / "tokenizer"
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(autouse=True)
def small(monkeypatch, scenes, views):
    """Batches and held-out sets of a few pictures, three steps, and no rendering in other processes."""
    torch.manual_seed(0)
    for module in (clip, dino, features, upernet):
        monkeypatch.setattr(module, "BATCH", 8 if module is not dino else 2)
        monkeypatch.setattr(module, "SCHEDULE", Schedule(3, 1e-3, warmup=1, evaluate_every=3))
        if module is dino:
            monkeypatch.setattr(module, "thing_views", lambda split, things, views_, work: views)
        else:
            monkeypatch.setattr(module, "scene_set", lambda split, count, work: scenes)
    monkeypatch.setattr(clip, "OTHERS", 7)


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


# --- models and losses ---------------------------------------------------------------------------------------------------


def test_sizes(tokenizer):
    assert parameter_count(clip.make_model(tokenizer)) <= 2_800_000
    assert parameter_count(dino.make_model()) <= 2_600_000
    assert parameter_count(upernet.make_model()) <= 2_600_000
    assert parameter_count(features.make_model()) <= 400_000


def test_losses_fall(scenes, views, tokenizer):
    tokens = [clip.tokenize(tokenizer, texts) for texts in (scenes.captions, scenes.loose_captions, scenes.short_captions)]
    clip_batch, images = clip.draw_batch(rng(), scenes, tokens), dino.draw_batch(rng(), views)
    pixels, labelled = upernet.draw_batch(rng(), scenes), features.draw_batch(rng(), scenes)
    cases = {
        "clip": (clip.Training(clip.make_model(tokenizer)), lambda model: clip.contrastive_loss(model, clip_batch)),
        "dino": (dino.make_model(), lambda model: dino.identity_loss(model, images)),
        "upernet": (upernet.make_model(), lambda model: upernet.pixel_loss(model, *pixels)),
        "features": (features.make_model(), lambda model: features.label_loss(model, *labelled)),
    }
    for name, (model, loss) in cases.items():
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
        values = []
        for _ in range(8):
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(model)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        assert values[-1] < 0.9 * values[0], (name, values)


def test_batches(scenes, views, tokenizer):
    tokens = [clip.tokenize(tokenizer, texts) for texts in (scenes.captions, scenes.loose_captions, scenes.short_captions)]
    images, ids, labels = clip.draw_batch(rng(), scenes, tokens)
    assert images.shape == (8, 3, 64, 64)
    assert labels.shape == (8, len(LABELS))
    ends = (ids == tokenizer.eos_token_id).float().argmax(1)
    assert ids.shape == (8, ends.max() + 1)
    read = {tokenizer.decode(row[1:end]).replace(" ", "") for row, end in zip(ids, ends, strict=True)}
    assert read <= {text.replace(" ", "") for form in scenes[3:] for text in form}

    assert dino.draw_batch(rng(), views).shape == (2 * 3 * 2, 3, 64, 64)

    pictures, classes = upernet.draw_batch(rng(), scenes)
    assert pictures.shape == (8, 3, 64, 64)
    chosen = some(rng(), SCENES, 8)
    plain, truth = to_tensor(scenes.images[chosen]), torch.from_numpy(scenes.segmentations[chosen]).long()
    mirrored = (classes != truth).flatten(1).any(1)
    assert 0 < mirrored.sum() < 8
    assert torch.equal(classes[mirrored], truth[mirrored].flip(-1))
    expected = torch.where(mirrored[:, None, None, None], plain.flip(-1), plain)
    assert (pictures - expected).abs().mean() < 0.1  # mirrored with their maps, up to the softening


def test_identity_loss_of_known_features():
    class Features(nn.Module):
        def forward(self, images):
            return SimpleNamespace(last_hidden_state=images[:, None, :, 0, 0])

    images = torch.tensor([[1.0, 0, 0], [2, 0, 0], [0, 1, 0], [0, 3, 0]])[:, :, None, None]  # two individuals, two views
    good = dino.identity_loss(Features(), images)
    weights = np.exp(np.array([1, 0, 0]) / dino.TEMPERATURE)
    assert good.item() == pytest.approx(-np.log(weights[0] / weights.sum()), abs=1e-6)
    assert dino.identity_loss(Features(), images[[0, 2, 1, 3]]) > 5


def test_equal_captions_share_their_pictures():
    """With two captions alike and both pictures equally near, the loss is that of an even choice."""
    alike = torch.tensor([[1.0, 0], [1, 0]])

    class Clip(nn.Module):
        logit_scale = torch.tensor(2.0)
        visual_projection = text_projection = nn.Identity()

        def vision_model(self, images):
            return SimpleNamespace(pooler_output=alike)

        text_model = vision_model

    class Model(nn.Module):
        clip = Clip()

        def labels(self, seen):
            return torch.full((2, 1), 100.0)

    ids = torch.tensor([[5, 6], [5, 6]])
    loss = clip.contrastive_loss(Model(), (alike, ids, torch.ones(2, 1)))
    assert loss.item() == pytest.approx(np.log(2), rel=1e-5)


def test_what_follows_the_end_token_does_not_matter(tokenizer):
    model = clip.make_model(tokenizer).eval()
    ids = torch.from_numpy(clip.tokenize(tokenizer, ["a photo of a red ball"]))
    longer = F.pad(ids, (0, 20), value=tokenizer.eos_token_id)
    with torch.no_grad():
        torch.testing.assert_close(model.text_model(ids).pooler_output, model.text_model(longer).pooler_output)


# --- scores --------------------------------------------------------------------------------------------------------------


class Segmenter(nn.Module):
    """Reads the class from the red channel, or says the same class everywhere."""

    def __init__(self, always: int | None = None) -> None:
        super().__init__()
        self.always = always

    def forward(self, images):
        classes = ((images[:, 0] + 1) * 127.5).round().long()
        if self.always is not None:
            classes = torch.full_like(classes, self.always)
        return SimpleNamespace(logits=F.one_hot(classes, len(CLASSES)).permute(0, 3, 1, 2).float())


def test_miou(scenes):
    written = scenes._replace(images=np.repeat(scenes.segmentations[..., None], 3, -1))
    assert upernet.segmentation_scores(Segmenter(), written) == {"miou": 1.0, "accuracy": 1.0}
    share = (scenes.segmentations == 5).mean()
    present = len(np.unique(scenes.segmentations))
    assert upernet.segmentation_scores(Segmenter(5), written) == pytest.approx({"miou": share / present, "accuracy": share})


def test_triples(views):
    class Red(nn.Module):
        def forward(self, images):
            red = images[:, 0].mean((1, 2))
            return SimpleNamespace(last_hidden_state=torch.stack([red, torch.ones_like(red)], -1)[:, None])

    same_red = views.copy()
    same_red[:, 0, :, ..., 0], same_red[:, 1, :, ..., 0], same_red[:, 2, :, ..., 0] = 200, 20, 190
    scores = dino.triples(Red(), same_red)
    assert scores["same_kind"] == scores["near_twin"] == 1
    assert scores["cosine_same"] == pytest.approx(1)
    assert scores["cosine_other"] < scores["cosine_twin"] < 1


def test_average_precision_by_hand():
    scores, present = np.float32([0.7, 0.9, 0.6, 0.8]), np.array([True, True, False, False])
    assert features._average_precision(scores, present) == pytest.approx((1 + 2 / 3) / 2)


def test_label_scores_of_a_perfect_reader(scenes):
    truth = torch.from_numpy(scenes.labels).float()

    class Reader(nn.Module):
        at = 0

        def forward(self, images):
            self.at += len(images)
            return SimpleNamespace(logits=truth[self.at - len(images) : self.at] * 2 - 1)

    assert features.label_scores(Reader(), scenes) == {"mean_average_precision": 1.0, "f1": 1.0}


def test_short_caption_over_false_ones(scenes):
    kinds = np.array([next(k for k in KINDS if text.endswith(f" {k}")) for text in scenes.short_captions])
    fits = torch.from_numpy(scenes.labels[:, [LABELS.index(kind) for kind in kinds]]).float()
    assert clip._short_over_false(fits, scenes) == 1.0
    assert clip._short_over_false(-fits, scenes) == 0.0


# --- helpers -------------------------------------------------------------------------------------------------------------


def test_soften_leaves_half_and_blurs_half(scenes):
    images = to_tensor(np.concatenate([scenes.images] * 4))
    softened = soften(images, np.random.default_rng(1))
    assert softened.shape == images.shape
    assert softened.abs().max() <= 1
    changed = (softened != images).flatten(1).any(1)
    assert 0.3 < changed.float().mean() < 0.7
    difference = (softened - images)[changed].abs().mean()
    assert 0.005 < difference < 0.15
    assert torch.equal(soften(images, np.random.default_rng(1)), softened)


def test_some_are_distinct_and_sorted():
    assert some(rng(), 5, 10).tolist() == [0, 1, 2, 3, 4]
    chosen = some(rng(), 1000, 30)
    assert len(set(chosen.tolist())) == 30
    assert (np.diff(chosen) > 0).all()


def test_card(tmp_path):
    write_card(tmp_path, "tiny-x", "For nothing.", "a line", 1234, "none", "0 steps", {"score": 0.12345, "text": "as said"})
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    for part in ("# tiny-x", "| Parameters | 1,234 |", "| score | 0.123 |", "| text | as said |"):
        assert part in card


# --- folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name", "cls"),
    [
        (clip, "clip", CLIPModel),
        (dino, "dino", ViTModel),
        (upernet, "upernet", UperNet),
        (features, "features", ResNetForImageClassification),
    ],
)
def test_build_leaves_a_folder_that_opens_as_float32(module, name, cls, tmp_path, tokenizer_folder, scenes):
    output = tokenizer_folder.parents[1]
    module.build(tmp_path, output, 1.0)
    folder = output / name
    stored = load_file(folder / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.float16}
    options = {"add_pooling_layer": False} if name == "dino" else {}
    model, report = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not model.training
    processor = AutoImageProcessor.from_pretrained(folder)
    given = processor(images=list(scenes.images[:2]), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(given, to_tensor(scenes.images[:2]), atol=1e-5, rtol=0)
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert f"tiny-{name}" in card
    with torch.no_grad():
        _check_output(name, model, given, folder)


def _check_output(name, model, images, folder):
    if name == "clip":
        processor = AutoProcessor.from_pretrained(folder)
        inputs = processor(text=["a photo of a red ball", "a box"], return_tensors="pt", padding=True)
        scores = model(**inputs, pixel_values=images).logits_per_image
        assert scores.shape == (2, 2)
        seen, read = model.vision_model(images).pooler_output, model.text_model(inputs["input_ids"]).pooler_output
        cosine = F.normalize(model.visual_projection(seen), dim=-1) @ F.normalize(model.text_projection(read), dim=-1).T
        torch.testing.assert_close(scores, model.logit_scale.exp() * cosine)
    elif name == "dino":
        assert model(images).last_hidden_state.shape == (2, 65, 192)
    elif name == "upernet":
        assert model(images).logits.shape == (2, len(CLASSES), 64, 64)
        assert tuple(model.config.id2label.values()) == CLASSES
    else:
        assert model.resnet(images).pooler_output.flatten(1).shape == (2, 64)
        assert [h.shape[-1] for h in model.resnet(images, output_hidden_states=True).hidden_states] == [16, 16, 8, 4, 2]
        assert tuple(model.config.id2label.values()) == LABELS
