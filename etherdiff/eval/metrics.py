"""All metrics, declared in one place: name, what is compared, network, and computation.

A metric is one entry of `METRICS`. Its input becomes units (an image's pixels, a prompt's pairs), units are summed, and the
score is a function of the sums: so parts can be added, and `etherdiff.eval.intervals` can resample the units.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torchmetrics
from numpy.typing import NDArray
from torch import Tensor

from etherdiff.control.signals import SIGNALS
from etherdiff.eval.functional import (
    class_areas,
    edge_counts,
    f1_of_counts,
    frechet_distance,
    mean_accuracy,
    mean_iou,
    moments,
    normalised_error,
    pixel_accuracy,
    ratio,
    upper_pairs,
)

Compares = Literal[
    "real x generated", "image x prompt", "images of one prompt", "real x other real", "sets", "control x generated"
]


def values_of_pairs(values: Tensor) -> Tensor:
    """Return all pairs' values, of any shape, as one unit (1, 2): their sum and number. Raises ValueError for NaN."""
    if not torch.isfinite(values).all():
        raise ValueError("values of pairs that are not finite")
    return torch.stack([values.sum(dtype=torch.float64).cpu(), torch.tensor(values.numel(), dtype=torch.float64)])[None]


def values_among(table: Tensor) -> Tensor:
    """Return `values_of_pairs` of a symmetric table (N, N): each pair once, without the diagonal."""
    return values_of_pairs(upper_pairs(table))


def mean_of_sums(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the means (...) of sums and numbers (..., 2); NaN where the number is 0."""
    return ratio(sums[..., 0], sums[..., 1])


def features_of_a_side(features: Tensor, real: bool, size: int) -> Tensor:
    """Return features (N, D = size) of real or of generated images as one unit (1, 2, D + 1, D + 1), 0 for the other side.

    A side is [[Σ f fᵀ, Σ f], [Σ fᵀ, N]]. Raises ValueError where a feature is not finite.
    """
    if features.ndim != 2 or features.shape[1] != size or not torch.isfinite(features).all():
        raise ValueError(f"expected finite features (N, {size}), got {tuple(features.shape)}")
    wide = features.double().cpu()
    unit = torch.zeros(1, 2, wide.shape[1] + 1, wide.shape[1] + 1, dtype=torch.float64)
    side = unit[0, 0 if real else 1]
    side[:-1, :-1], side[-1, :-1], side[:-1, -1], side[-1, -1] = wide.T @ wide, wide.sum(0), wide.sum(0), len(wide)
    return unit


def distance_of_sides(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the Fréchet distance of both sides (2, D + 1, D + 1); NaN where a side has fewer than two images."""
    if sums[:, -1, -1].min() < 2:
        return np.array(math.nan)
    one, other = (moments(side[-1, :-1], side[:-1, :-1], side[-1, -1]) for side in torch.from_numpy(sums))
    return frechet_distance(*one, *other).numpy()


def areas_of_images(found: Tensor, wanted: Tensor, size: int) -> Tensor:
    """Return class indices (B, H, W), `IGNORED` in what is wanted, as `class_areas` (B, 3, C = size). Raises ValueError."""
    if found.shape != wanted.shape or found.ndim != 3:
        raise ValueError(f"expected classes (B, H, W) twice, got {tuple(found.shape)} and {tuple(wanted.shape)}")
    return torch.stack([class_areas(one, other, size) for one, other in zip(found, wanted, strict=True)]).double()


def edges_of_images(found: Tensor, wanted: Tensor, tolerance: int) -> Tensor:
    """Return edges of generated images and of their controls, bool (B, H, W), as `edge_counts` (B, 4). Raises ValueError."""
    return edge_counts(found, wanted, tolerance).double()


def errors_of_images(found: Tensor, wanted: Tensor) -> Tensor:
    """Return points of generated faces and of their controls, (B, P, 2) in pixels, as errors and 1 (B, 2)."""
    if found.shape != wanted.shape or found.ndim != 3:
        raise ValueError(f"expected the same points (B, P, 2), got {tuple(found.shape)} and {tuple(wanted.shape)}")
    both = zip(found.cpu().numpy(), wanted.cpu().numpy(), strict=True)
    return torch.tensor([[normalised_error(one, other), 1.0] for one, other in both], dtype=torch.float64)


@dataclass(frozen=True)
class Metric:
    """One metric."""

    name: str
    """Name of its score in metrics.json."""
    title: str
    """Name of its score in tables and reports."""
    definition: str
    """One sentence. It is part of every score's identity: with another text, old scores can no longer be compared."""
    compares: Compares
    role: str
    """Role of the network that reads images, from `etherdiff.eval.networks.ROLES` or `CONTROL_ROLES`."""
    units: Callable[..., Tensor] = values_of_pairs
    """Turns what is compared (and its `size`, where it has any) into units (units, *shape), float64, or raises ValueError."""
    value: Callable[[NDArray[np.float64]], NDArray[np.float64]] = mean_of_sums
    """Turns sums of units (..., *shape) into scores (...); NaN where there is nothing to score."""
    range: tuple[float, float] = (0.0, math.inf)
    """Lowest and highest value."""
    higher_is_better: bool = True
    baseline: str | None = None
    """Name of the metric over real images alone that is shown next to it."""
    is_for_subjects: bool = False
    """Whether it is a default metric of subjects."""
    signals: tuple[str, ...] = ()
    """Control signals whose runs it scores."""
    shape: Callable[[int], tuple[int, ...]] = lambda size: (2,)
    """Shape of a unit, from the number of classes or features."""

    def make(self, size: int = 0) -> "SummedMetric":
        """Return the torchmetrics metric, with nothing summed. size: number of classes or features, where it has any."""
        return SummedMetric(self, size)

    def count(self, *compared: Any, size: int = 0) -> Tensor:
        """Return what is compared as units (units, *shape). size: as of `make`. Raises ValueError."""
        return self.units(*compared, **({"size": size} if size else {}))


class SummedMetric(torchmetrics.Metric):
    """A `Metric` as torchmetrics knows them: `update` adds units, `forward` also returns their own score.

    `compute` returns a float64 scalar. It raises ValueError where there is nothing to score.
    """

    is_differentiable = False
    full_state_update = False
    sums: Tensor

    def __init__(self, metric: Metric, size: int = 0) -> None:
        # one process scores while others train: it must not wait for theirs
        super().__init__(sync_on_compute=False)
        self.metric, self.size = metric, size
        self.add_state("sums", torch.zeros(metric.shape(size), dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        return self.metric.higher_is_better

    def update(self, *compared: Any) -> None:
        """Add what is compared: see the entry's `units`."""
        self.sums += self.metric.count(*compared, size=self.size).sum(0).to(self.sums.device)

    def compute(self) -> Tensor:
        value = float(self.metric.value(self.sums.cpu().numpy()))
        if math.isnan(value):
            raise ValueError("nothing to score")
        return torch.tensor(value, dtype=torch.float64)


_COSINE, _SHARE = (-1.0, 1.0), (0.0, 1.0)
_AREAS: dict[str, Any] = {
    "compares": "control x generated",
    "role": "segmenter",
    "units": areas_of_images,
    "shape": lambda size: (3, size),
    "signals": ("segmentation",),
    "range": _SHARE,
}
_EDGES: dict[str, Any] = {
    "compares": "control x generated",
    "role": "edges",
    "shape": lambda size: (4,),
    "signals": ("canny",),
    "range": _SHARE,
}

_ALL = (
    Metric(
        "dino",
        "DINO",
        "mean cosine of DINO features over all pairs real x generated",
        "real x generated",
        "dino",
        range=_COSINE,
        baseline="dino_real_images",
        is_for_subjects=True,
    ),
    Metric(
        "clip_i",
        "CLIP-I",
        "mean cosine of CLIP image embeddings over all pairs real x generated",
        "real x generated",
        "clip",
        range=_COSINE,
        baseline="clip_i_real_images",
        is_for_subjects=True,
    ),
    # neither clipped at 0 nor multiplied by 100, which torchmetrics' CLIPScore does to a mean of the same cosines
    Metric(
        "clip_t",
        "CLIP-T",
        "mean cosine of CLIP embeddings of each image and its prompt",
        "image x prompt",
        "clip",
        range=_COSINE,
        is_for_subjects=True,
    ),
    # the column "LPIPS" of the paper's table
    Metric(
        "lpips_to_real",
        "LPIPS to the real images",
        "mean LPIPS over all pairs real x generated; higher copies less",
        "real x generated",
        "lpips",
        baseline="lpips_real_images",
        is_for_subjects=True,
    ),
    # DreamBooth's own diversity
    Metric(
        "lpips_diversity",
        "LPIPS diversity",
        "mean LPIPS over pairs of images of the same prompt",
        "images of one prompt",
        "lpips",
        units=values_among,
        is_for_subjects=True,
    ),
    Metric(
        "fid",
        "FID",
        "Frechet distance of the features of the real and of the generated images",
        "sets",
        "fid",
        units=features_of_a_side,
        value=distance_of_sides,
        higher_is_better=False,
        shape=lambda size: (2, size + 1, size + 1),
    ),
    Metric(
        "dino_real_images",
        "DINO among the real images",
        "mean cosine of DINO features over all pairs real x other real",
        "real x other real",
        "dino",
        units=values_among,
        range=_COSINE,
    ),
    Metric(
        "clip_i_real_images",
        "CLIP-I among the real images",
        "mean cosine of CLIP image embeddings over all pairs real x other real",
        "real x other real",
        "clip",
        units=values_among,
        range=_COSINE,
    ),
    Metric(
        "lpips_real_images",
        "LPIPS among the real images",
        "mean LPIPS over all pairs real x other real",
        "real x other real",
        "lpips",
        units=values_among,
    ),
    Metric(
        "miou",
        "mIoU",
        "mean over classes of intersection / union of the map and of what a segmenter sees, each summed over all images",
        value=mean_iou,
        **_AREAS,
    ),
    Metric(
        "accuracy",
        "Pixel accuracy",
        "share of all pixels of which a segmenter sees the class that the map wants",
        value=pixel_accuracy,
        **_AREAS,
    ),
    Metric(
        "mean_accuracy",
        "Mean accuracy of classes",
        "mean over classes of the share of their pixels, in all maps, of which a segmenter sees that class",
        value=mean_accuracy,
        **_AREAS,
    ),
    Metric(
        "edges_f1",
        "F1 of edges",
        "F1 of the edge pixels of the generated images against the controls', over all pixels",
        units=partial(edges_of_images, tolerance=0),
        value=f1_of_counts,
        **_EDGES,
    ),
    Metric(
        "edges_f1_within_1",
        "F1 of edges, one pixel off being near enough",
        "F1 of the edge pixels of the generated images against the controls', one pixel off being near enough",
        units=partial(edges_of_images, tolerance=1),
        value=f1_of_counts,
        **_EDGES,
    ),
    Metric(
        "landmarks_error",
        "Normalised error of landmarks",
        "mean distance of the generated face's landmarks from the control's, over the distance of the outer eye corners "
        "(68 points) or the diagonal of the points' box",
        "control x generated",
        "landmarks",
        units=errors_of_images,
        higher_is_better=False,
        signals=("landmarks",),
    ),
)
METRICS = {metric.name: metric for metric in _ALL}

CONTROL_ROLES = ("segmenter", "edges", "landmarks")
"""Roles that read a control back from a generated image: a network, Canny's algorithm, a face detector."""
CONTROL_METRICS = {signal: (*(metric.name for metric in _ALL if signal in metric.signals), "fid") for signal in SIGNALS}
"""Name of a control signal -> metrics of its runs."""
PROMPT_METRICS = tuple(metric.name for metric in _ALL if metric.compares != "control x generated")
"""Metrics of images of prompts."""
SUBJECT_METRICS = tuple(metric.name for metric in _ALL if metric.is_for_subjects)
"""Metrics of a subject by default, without baselines; FID needs hundreds of images on both sides."""
HELD_OUT = "_held_out"
"""Suffix of a score against images that were not trained on."""


def metric_of(score: str) -> Metric:
    """Return the metric of a score, against held-out images or not."""
    return METRICS[score.removesuffix(HELD_OUT)]
