"""Features for FID and LPIPS in the tiny world: a small ResNet that reads from a picture what is in it."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

from tiny_world.cards import parameter_count, write_card
from tiny_world.data import LABELS, SceneSet, scene_set, to_tensor
from tiny_world.evaluator import NORMALISATION, evaluator_folder, in_batches, some
from tiny_world.training import Schedule, seeded, train

SCHEDULE = Schedule(steps=3_000, learning_rate=2e-3, warmup=100, weight_decay=0.02, ema=0.99, evaluate_every=500)
BATCH = 64
SCENES, VALIDATION, TEST = 60_000, 200, 1_000


def build(work: Path, output: Path, fraction: float = 1.0) -> None:
    """Train (or go on), score on the test split and write OUTPUT/features."""
    scenes = scene_set("train", max(round(SCENES * min(fraction, 1)), BATCH), work)
    validation = scene_set("validation", VALIDATION, work)
    with seeded():
        untrained = make_model().to(memory_format=torch.channels_last)
    schedule = SCHEDULE.shortened(fraction)
    model = train(
        "features",
        untrained,
        lambda rng: draw_batch(rng, scenes),
        label_loss,
        schedule,
        work,
        lambda model: label_scores(model, validation),
    )
    scores = label_scores(model, scene_set("test", TEST, work))
    processor = ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=1.0, **NORMALISATION)
    with evaluator_folder(model, processor, output / "features") as folder:
        write_card(
            folder,
            "tiny-features",
            "Features of pictures of etherdiff's tiny world. Its 64 pooled outputs stand for Inception's in FID (so few that "
            "some hundred pictures give their covariance); its hidden states stand for VGG's in LPIPS.",
            "ResNetForImageClassification: a basic block at each of four scales",
            parameter_count(model),
            f"{len(scenes.images):,} scenes labelled with the sky, ground, kinds, colours and patterns in them",
            f"{schedule.steps:,} steps of {BATCH} pictures: binary cross-entropy of {len(LABELS)} labels",
            {
                f"Mean average precision over the labels, {TEST:,} test scenes": scores["mean_average_precision"],
                "F1 at a probability of one half": scores["f1"],
            },
        )


def make_model() -> ResNetForImageClassification:
    """The untrained model: 0.2M parameters."""
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 48, 64, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        problem_type="multi_label_classification",
        id2label=dict(enumerate(LABELS)),
        label2id={name: index for index, name in enumerate(LABELS)},
    )
    return ResNetForImageClassification(config)


def draw_batch(rng: np.random.Generator, scenes: SceneSet) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, 64, 64), as rendered since FID and LPIPS are to notice blur, and labels (B, len(LABELS))."""
    chosen = some(rng, len(scenes.images), BATCH)
    return to_tensor(scenes.images[chosen]), torch.from_numpy(scenes.labels[chosen]).float()


def label_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy."""
    logits = model(images.contiguous(memory_format=torch.channels_last)).logits
    return F.binary_cross_entropy_with_logits(logits.float(), labels)


def label_scores(model: nn.Module, scenes: SceneSet) -> dict[str, float]:
    """Mean average precision over labels, and F1 over all of them at a probability of one half."""
    logits = in_batches(lambda x: model(x).logits, scenes.images).numpy()
    labels = np.asarray(scenes.labels, bool)
    right = ((logits > 0) & labels).sum()
    precisions = [_average_precision(logits[:, k], labels[:, k]) for k in range(len(LABELS)) if labels[:, k].any()]
    return {
        "mean_average_precision": float(np.mean(precisions)),
        "f1": float(2 * right / ((logits > 0).sum() + labels.sum())),
    }


def _average_precision(scores: NDArray[np.float32], present: NDArray[np.bool_]) -> float:
    """Mean over the present ones of the precision down to each of them, the best score first."""
    hits = present[np.argsort(-scores, kind="stable")]
    return float((hits.cumsum() / np.arange(1, len(hits) + 1))[hits].mean())
