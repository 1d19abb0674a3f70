"""Every metric by name: what it averages over, which network it needs, its range."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from etherdiff.eval.clip_i import ClipI
from etherdiff.eval.clip_t import ClipT
from etherdiff.eval.dino import Dino
from etherdiff.eval.fid import Fid
from etherdiff.eval.lpips_diversity import LpipsDiversity
from etherdiff.eval.lpips_to_real import LpipsToReal
from etherdiff.eval.real_images import RealDistance, RealSimilarity

Compares = Literal["real x generated", "image x prompt", "images of one prompt", "real x other real", "sets"]


@dataclass(frozen=True)
class MetricEntry:
    """One metric of `METRICS`."""

    make: Callable[..., Any]
    """A torchmetrics `Metric`, made without arguments; with the number of features for FID."""
    role: str
    """The backbone that it reads, of `etherdiff.eval.backbones.ROLES`."""
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
}

SUBJECT_METRICS = ("dino", "clip_i", "clip_t", "lpips_to_real", "lpips_diversity")
"""What a subject is scored by, baselines aside; FID wants hundreds of images on both sides."""
HELD_OUT = "_held_out"
"""Ending of a score against images that were not trained on."""
