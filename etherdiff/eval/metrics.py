"""Every metric by name: what it averages over, which network it needs, its range."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from etherdiff.eval.clip_i import ClipI
from etherdiff.eval.clip_t import ClipT
from etherdiff.eval.dino import Dino
from etherdiff.eval.edges_f1 import EdgesF1, EdgesF1Within1
from etherdiff.eval.fid import Fid
from etherdiff.eval.landmarks_error import LandmarksError
from etherdiff.eval.lpips_diversity import LpipsDiversity
from etherdiff.eval.lpips_to_real import LpipsToReal
from etherdiff.eval.real_images import RealDistance, RealSimilarity
from etherdiff.eval.segmentation_scores import MeanAccuracy, MeanIoU, PixelAccuracy

Compares = Literal[
    "real x generated", "image x prompt", "images of one prompt", "real x other real", "sets", "control x generated"
]


@dataclass(frozen=True)
class MetricEntry:
    """One metric of `METRICS`."""

    make: Callable[..., Any]
    """A torchmetrics `Metric`, made without arguments; with the number of features for FID, of classes for segmentation."""
    role: str
    """The backbone that it reads, of `etherdiff.eval.backbones.ROLES`; of `CONTROL_ROLES` where it compares with a control."""
    compares: Compares
    definition: str
    lowest: float
    highest: float | None
    baseline: str | None = None
    """The metric over real images alone that stands beside it."""

    @property
    def higher_is_better(self) -> bool:
        return bool(self.make.higher_is_better)  # type: ignore[attr-defined]


METRICS: dict[str, MetricEntry] = {
    "dino": MetricEntry(
        Dino,
        "dino",
        "real x generated",
        "mean cosine of DINO features over all pairs real x generated",
        lowest=-1,
        highest=1,
        baseline="dino_real_images",
    ),
    "clip_i": MetricEntry(
        ClipI,
        "clip",
        "real x generated",
        "mean cosine of CLIP image embeddings over all pairs real x generated",
        lowest=-1,
        highest=1,
        baseline="clip_i_real_images",
    ),
    "clip_t": MetricEntry(
        ClipT,
        "clip",
        "image x prompt",
        "mean cosine of CLIP embeddings of each image and its prompt",
        lowest=-1,
        highest=1,
    ),
    "lpips_to_real": MetricEntry(
        LpipsToReal,
        "lpips",
        "real x generated",
        "mean LPIPS over all pairs real x generated; higher copies less",
        lowest=0,
        highest=None,
        baseline="lpips_real_images",
    ),
    "lpips_diversity": MetricEntry(
        LpipsDiversity,
        "lpips",
        "images of one prompt",
        "mean LPIPS over pairs of images of the same prompt",
        lowest=0,
        highest=None,
    ),
    "fid": MetricEntry(
        Fid,
        "fid",
        "sets",
        "Frechet distance of the features of the real and of the generated images",
        lowest=0,
        highest=None,
    ),
    "dino_real_images": MetricEntry(
        RealSimilarity,
        "dino",
        "real x other real",
        "mean cosine of DINO features over all pairs real x other real",
        lowest=-1,
        highest=1,
    ),
    "clip_i_real_images": MetricEntry(
        RealSimilarity,
        "clip",
        "real x other real",
        "mean cosine of CLIP image embeddings over all pairs real x other real",
        lowest=-1,
        highest=1,
    ),
    "lpips_real_images": MetricEntry(
        RealDistance,
        "lpips",
        "real x other real",
        "mean LPIPS over all pairs real x other real",
        lowest=0,
        highest=None,
    ),
    "miou": MetricEntry(
        MeanIoU,
        "segmenter",
        "control x generated",
        "mean over classes of intersection / union of the map and of what a segmenter sees, each summed over all images",
        lowest=0,
        highest=1,
    ),
    "accuracy": MetricEntry(
        PixelAccuracy,
        "segmenter",
        "control x generated",
        "share of all pixels of which a segmenter sees the class that the map wants",
        lowest=0,
        highest=1,
    ),
    "mean_accuracy": MetricEntry(
        MeanAccuracy,
        "segmenter",
        "control x generated",
        "mean over classes of the share of their pixels, in all maps, of which a segmenter sees that class",
        lowest=0,
        highest=1,
    ),
    "edges_f1": MetricEntry(
        EdgesF1,
        "edges",
        "control x generated",
        "F1 of the edge pixels of the generated images against the controls', over all pixels",
        lowest=0,
        highest=1,
    ),
    "edges_f1_within_1": MetricEntry(
        EdgesF1Within1,
        "edges",
        "control x generated",
        "F1 of the edge pixels of the generated images against the controls', one pixel off being near enough",
        lowest=0,
        highest=1,
    ),
    "landmarks_error": MetricEntry(
        LandmarksError,
        "landmarks",
        "control x generated",
        "mean distance of the generated face's landmarks from the control's, over the distance of the outer eye corners "
        "(68 points) or the diagonal of the points' box",
        lowest=0,
        highest=None,
    ),
}

CONTROL_ROLES = ("segmenter", "edges", "landmarks")
"""What reads a control back from a generated image: a network, Canny's algorithm, a detector of faces."""
CONTROL_METRICS: dict[str, tuple[str, ...]] = {
    "segmentation": ("miou", "accuracy", "mean_accuracy", "fid"),
    "canny": ("edges_f1", "edges_f1_within_1", "fid"),
    "landmarks": ("landmarks_error", "fid"),
}
"""Name of a control signal -> what controllable generation is scored by."""
PROMPT_METRICS = tuple(name for name, entry in METRICS.items() if entry.compares != "control x generated")
"""What images of prompts can be scored by."""
SUBJECT_METRICS = ("dino", "clip_i", "clip_t", "lpips_to_real", "lpips_diversity")
"""What a subject is scored by, baselines aside; FID wants hundreds of images on both sides."""
HELD_OUT = "_held_out"
"""Ending of a score against images that were not trained on."""
