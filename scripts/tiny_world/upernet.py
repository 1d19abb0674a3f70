"""tiny-upernet: which class each pixel is of, on rendered scenes and on generated ones."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ConvNextConfig, SegformerImageProcessor, UperNetConfig, UperNetForSemanticSegmentation

from etherdiff.tiny.world import CLASSES
from etherdiff.train.randomness import Draw, generator
from tiny_world.cards import parameter_count, write_card
from tiny_world.data import SceneSet, scene_set, to_tensor
from tiny_world.evaluator import NORMALISATION, evaluator_folder, in_batches, soften, some
from tiny_world.training import Schedule, seeded, train

SCHEDULE = Schedule(steps=6_000, learning_rate=1.5e-3, warmup=100, weight_decay=0.05, ema=0.99, evaluate_every=200)
BATCH = 32
SCENES, VALIDATION, TEST = 60_000, 200, 1_000


def build(work: Path, output: Path, fraction: float = 1.0) -> None:
    """Train (or go on), score on the test split and write OUTPUT/upernet."""
    scenes = scene_set("train", max(round(SCENES * min(fraction, 1)), BATCH), work)
    validation = scene_set("validation", VALIDATION, work)
    with seeded():
        untrained = make_model().to(memory_format=torch.channels_last)
    schedule = SCHEDULE.shortened(fraction)
    model = train(
        "upernet",
        untrained,
        lambda rng: draw_batch(rng, scenes),
        pixel_loss,
        schedule,
        work,
        lambda model: segmentation_scores(model, validation),
    )
    test = scene_set("test", TEST, work)
    scores, softened = segmentation_scores(model, test), segmentation_scores(model, test, softened=True)
    processor = SegformerImageProcessor(size={"height": 64, "width": 64}, do_reduce_labels=False, **NORMALISATION)
    with evaluator_folder(model, processor, output / "upernet") as folder:
        write_card(
            folder,
            "tiny-upernet",
            f"Which of the {len(CLASSES)} classes of etherdiff's tiny world a pixel is of, to judge generated pictures with.",
            "UperNetForSemanticSegmentation on a ConvNeXt whose patches are 2 pixels",
            parameter_count(model),
            f"{len(scenes.images):,} scenes with segmentation maps, half of them blurred and noisy as generated ones are",
            f"{schedule.steps:,} steps of {BATCH} pictures: cross-entropy at every pixel",
            {
                f"mIoU on {TEST:,} test scenes (mean over classes)": scores["miou"],
                f"Pixel accuracy on {TEST:,} test scenes": scores["accuracy"],
                "mIoU on the same scenes, half of them softened": softened["miou"],
            },
        )


def make_model() -> UperNetForSemanticSegmentation:
    """The untrained model: 1.2M parameters."""
    backbone = ConvNextConfig(
        image_size=64,
        patch_size=2,
        hidden_sizes=[32, 64, 128, 192],
        depths=[1, 1, 3, 1],
        layer_scale_init_value=0.5,  # the usual 1e-6 leaves the blocks idle in so short a training
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = UperNetConfig(
        backbone_config=backbone,
        hidden_size=48,
        pool_scales=[1, 2],
        use_auxiliary_head=False,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )
    model = UperNetForSemanticSegmentation(config)
    for module in model.backbone.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):  # transformers' 0.02 is for wide layers: these would hardly do anything
            nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model


def draw_batch(rng: np.random.Generator, scenes: SceneSet) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, 64, 64) and their classes (B, 64, 64); half of them mirrored."""
    chosen = some(rng, len(scenes.images), BATCH)
    images, classes = to_tensor(scenes.images[chosen]), torch.from_numpy(scenes.segmentations[chosen]).long()
    mirrored = torch.from_numpy(rng.random(len(chosen)) < 0.5)
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return soften(images, rng), torch.where(mirrored[:, None, None], classes.flip(-1), classes)


def pixel_loss(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Mean cross-entropy over all pixels."""
    logits = model(images.contiguous(memory_format=torch.channels_last)).logits
    return F.cross_entropy(logits.float(), classes)


def segmentation_scores(model: nn.Module, scenes: SceneSet, softened: bool = False) -> dict[str, float]:
    """mIoU over the classes that occur, from counts over all scenes, and the share of right pixels."""
    rng = generator(0, Draw.VALIDATION_NOISE, 0, 0)
    predicted = in_batches(lambda x: model(soften(x, rng) if softened else x).logits.argmax(1), scenes.images).numpy()
    pairs = np.asarray(scenes.segmentations, np.int64) * len(CLASSES) + predicted
    counts = np.bincount(pairs.ravel(), minlength=len(CLASSES) ** 2).reshape(len(CLASSES), -1)
    right, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    present = counts.sum(1) > 0
    return {"miou": float((right[present] / union[present]).mean()), "accuracy": float(right.sum() / counts.sum())}
