"""The mathematics of the metrics, as pure functions of tensors: no network, no file, no state.

Pairs (cosine, LPIPS), Fréchet distance, areas of classes, edges, landmarks. `etherdiff.eval.metrics` uses them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchmetrics.functional.pairwise import pairwise_cosine_similarity

# --- Pairs -----------------------------------------------------------------------------------------------------------


def cosine_pairs(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the cosine similarity of every pair: (N, D) and (M, D) to float64 (N, M), in [-1, 1].

    Raises:
        ValueError: other shapes, or features that are not finite or all zero, which have no direction.
    """
    return pairwise_cosine_similarity(_with_direction(rows), _with_direction(columns)).clamp(-1, 1)


def cosine_rows(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosine similarity row by row: twice (N, D) to float64 (N,), in [-1, 1]. Raises as `cosine_pairs`."""
    if one.shape != other.shape:
        raise ValueError(f"rows do not match: {tuple(one.shape)} and {tuple(other.shape)}")
    a, b = (wide / wide.norm(dim=1, keepdim=True) for wide in (_with_direction(one), _with_direction(other)))
    return (a * b).sum(1).clamp(-1, 1)


def upper_pairs(values: Tensor) -> Tensor:
    """Return each unordered pair of a symmetric (N, N) once: (N (N - 1) / 2,)."""
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise ValueError(f"expected a square of pairs, got {tuple(values.shape)}")
    row, column = torch.triu_indices(len(values), len(values), offset=1)
    return values[row, column]


def _with_direction(features: Tensor) -> Tensor:
    """Return features as float64. ValueError where a row has no direction."""
    if features.ndim != 2:
        raise ValueError(f"expected features (N, D), got {tuple(features.shape)}")
    wide = features.double()
    lengths = wide.norm(dim=1)
    if not (torch.isfinite(lengths) & (lengths > 0)).all():
        raise ValueError("features that are not finite, or zero")
    return wide


# --- LPIPS -----------------------------------------------------------------------------------------------------------
# LPIPS of two images is the sum over layers of the mean over places of Σ_c w_c (â_c - b̂_c)², with â and b̂ of unit length over
# the channels (Zhang et al. 2018, equation 1). Scaling â_c by sqrt(w_c / places) makes that ‖φ(a) - φ(b)‖²: so a network runs
# once per image and not once per pair.

_EPSILON = 1e-10  # as in the package lpips


def unit_channels(layers: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> Tensor:
    """Return φ of a batch, float32 (B, Σ C H W).

    Args:
        layers: features (B, C, H, W) of each layer.
        weights: (C,) of each layer, none negative; None: all 1, the package's `lpips=False`.
    """
    parts = []
    for index, layer in enumerate(layers):
        unit = layer / (layer.square().sum(1, keepdim=True).sqrt() + _EPSILON)
        if weights is not None:
            unit = unit * weights[index].sqrt().view(1, -1, 1, 1)
        parts.append((unit / (layer.shape[2] * layer.shape[3]) ** 0.5).flatten(1))
    return torch.cat(parts, 1)


def lpips_distances(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Return the distance of every pair: N and M vectors (D,) to float64 (N, M) on the CPU, at least 0.

    It is exactly 0 for the same image. Pair by pair, because the vectors are long (2.6 million for AlexNet at 512 px);
    differences first, so nothing cancels.
    """
    if not len(one) or not len(other):
        return torch.zeros(len(one), len(other), dtype=torch.float64)
    rows = [torch.stack([(a - b).square().sum() for b in other]) for a in one]
    return torch.stack(rows).cpu().double()


# --- Fréchet distance ------------------------------------------------------------------------------------------------

FEW_FEATURES = 64
MIN_FOR_MANY_FEATURES = 1000
"""Minimum images on each side for more than `FEW_FEATURES` features; the paper has 2000."""


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """Return ‖μ - ν‖² + tr(Σ + Λ - 2 (Σ Λ)^½) (Heusel et al. 2017, equation 6), in float64, at least 0.

    The trace of the root is that of (√Σ Λ √Σ)^½, whose eigenvalues are real: no complex parts to drop.

    Args:
        mean, other_mean: (D,).
        covariance, other_covariance: symmetric (D, D).
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other_covariance.double() @ root).clamp(min=0).sqrt().sum()
    apart = (mean.double() - other_mean.double()).square().sum()
    return (apart + covariance.trace() + other_covariance.trace() - 2 * cross).clamp(min=0)


def moments(total: Tensor, products: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and unbiased covariance (D, D), from sums of features (D,) and of their outer products (D, D)."""
    mean = total / count
    return mean, (products - count * torch.outer(mean, mean)) / (count - 1)


def fid(real: Tensor, generated: Tensor) -> float:
    """Return the Fréchet distance between the features (N, D) of two sets of images, two or more each."""
    sides = (side.double() for side in (real, generated))
    one, other = (moments(side.sum(0), side.T @ side, len(side)) for side in sides)
    return float(frechet_distance(*one, *other))


def fid_problem(real: int, generated: int, features: int) -> str | None:
    """Return why an FID of this many images would mislead; None if it would not. More images have less bias."""
    if real != generated:
        return f"{real} real and {generated} generated images, but FID needs the same number of both"
    if features > FEW_FEATURES and real < MIN_FOR_MANY_FEATURES:
        return f"{real} images are too few for {features} features: {MIN_FOR_MANY_FEATURES}, or at most {FEW_FEATURES} features"
    if features <= FEW_FEATURES and real <= features:
        return f"{real} images are too few for {features} features: more images than features are needed"
    return None


# --- Classes of pixels -----------------------------------------------------------------------------------------------
# As mmsegmentation's `IoUMetric`: three areas per class, summed over all images, before anything is divided.

IGNORED = 255
"""Value of a target pixel without a class; its prediction is not counted."""
AGREED, PREDICTED, WANTED = range(3)


def class_areas(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """Return the pixels of each class: int64 (3, `classes`), its rows `AGREED`, `PREDICTED` and `WANTED`.

    They are the confusion matrix's diagonal, and its sums over targets and over predictions.

    Args:
        predicted: class indices, 0 to `classes` - 1, of any shape.
        target: the same, or `IGNORED`.

    Raises:
        ValueError: shapes that differ, values that are not integers, or an unknown class.
    """
    if predicted.shape != target.shape:
        raise ValueError(f"{tuple(predicted.shape)} predicted pixels and {tuple(target.shape)} wanted ones")
    if predicted.is_floating_point() or target.is_floating_point():
        raise ValueError("class indices must be integers")
    counted = target != IGNORED
    ours, theirs = predicted[counted].long(), target[counted].long()
    for name, values in (("predicted", ours), ("wanted", theirs)):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < classes:
            raise ValueError(f"{name}: classes from {int(values.min())} to {int(values.max())}, but there are {classes}")
    confusion = multiclass_confusion_matrix(ours, theirs, classes, validate_args=False)  # (wanted, predicted)
    return torch.stack([confusion.diagonal(), confusion.sum(0), confusion.sum(1)])


def class_ious(areas: NDArray[Any]) -> NDArray[np.float64]:
    """Return |predicted ∩ wanted| / |predicted ∪ wanted| (..., C) of areas (..., 3, C); NaN for classes in neither."""
    agreed = areas[..., AGREED, :]
    return ratio(agreed, areas[..., PREDICTED, :] + areas[..., WANTED, :] - agreed)


def class_accuracies(areas: NDArray[Any]) -> NDArray[np.float64]:
    """Return |predicted ∩ wanted| / |wanted| (..., C) of areas (..., 3, C); NaN for classes that no target has."""
    return ratio(areas[..., AGREED, :], areas[..., WANTED, :])


def mean_iou(areas: NDArray[Any]) -> NDArray[np.float64]:
    """Return the mean of `class_ious` over the classes that occur (...); NaN where none does."""
    return _mean_of_known(class_ious(areas))


def mean_accuracy(areas: NDArray[Any]) -> NDArray[np.float64]:
    """Return the mean of `class_accuracies` over the classes that targets have (...); NaN where none does."""
    return _mean_of_known(class_accuracies(areas))


def pixel_accuracy(areas: NDArray[Any]) -> NDArray[np.float64]:
    """Return the share of pixels of areas (..., 3, C) with the class that is wanted (...); NaN if there is no pixel."""
    return ratio(areas[..., AGREED, :].sum(-1), areas[..., WANTED, :].sum(-1))


def _mean_of_known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0.0).sum(-1), known.sum(-1))


def ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """Return part / whole, elementwise; NaN where the whole is 0."""
    part = np.asarray(part, np.float64)
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=np.asarray(whole) > 0)


# --- Edges -----------------------------------------------------------------------------------------------------------


def edge_counts(found: Tensor, wanted: Tensor, tolerance: int = 0) -> Tensor:
    """Return the counts for precision and recall of edge pixels, image by image: int64 (B, 4).

    Found pixels within `tolerance` of a wanted one, found pixels, wanted pixels within `tolerance` of a found one, wanted
    pixels. Distances are chessboard distances: with a tolerance of 1, the eight neighbours count as well.

    Args:
        found, wanted: bool (B, H, W), true on edges.

    Raises:
        ValueError: other shapes or types.
    """
    if found.shape != wanted.shape or found.ndim != 3 or found.dtype != torch.bool or wanted.dtype != torch.bool:
        raise ValueError(f"expected bool (B, H, W) twice, got {tuple(found.shape)} and {tuple(wanted.shape)}")
    hits, covered = found & _grown(wanted, tolerance), wanted & _grown(found, tolerance)
    return torch.stack([pixels.flatten(1).sum(1) for pixels in (hits, found, covered, wanted)], dim=1)


def f1_of_counts(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Return 2 P R / (P + R) (...) of `edge_counts` (..., 4), in [0, 1]; NaN where neither side has an edge.

    With tolerance 0 it is Dice's coefficient of the two sets of pixels.
    """
    hits, found, covered, wanted = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    precision, recall = hits / np.maximum(found, 1), covered / np.maximum(wanted, 1)
    f1 = np.nan_to_num(ratio(2 * precision * recall, precision + recall))
    return np.where(found + wanted > 0, f1, np.nan)


def _grown(edges: Tensor, by: int) -> Tensor:
    """Return every pixel within `by` of an edge."""
    return F.max_pool2d(edges[:, None].float(), 2 * by + 1, stride=1, padding=by)[:, 0] > 0


# --- Landmarks -------------------------------------------------------------------------------------------------------

IBUG_POINTS = 68
OUTER_EYE_CORNERS = (36, 45)
"""Indices in iBUG's 68 points, from 0: 300-W normalises by the distance between them."""


def normaliser(points: NDArray[np.floating]) -> float:
    """Return the length that distances are divided by: between the outer eye corners of 68 points, else the box's diagonal.

    Raises:
        ValueError: it is 0, so the points are not a face.
    """
    if len(points) == IBUG_POINTS:
        one, other = points[list(OUTER_EYE_CORNERS)].astype(np.float64)
    else:
        one, other = points.min(0).astype(np.float64), points.max(0).astype(np.float64)
    length = float(np.linalg.norm(one - other))
    if not length > 0:
        raise ValueError("landmarks that all lie in one place")
    return length


def normalised_error(found: NDArray[np.floating], wanted: NDArray[np.floating]) -> float:
    """Return the normalised mean error (Sagonas et al. 2013): the points' mean distance over the wanted ones' `normaliser`.

    Args:
        found, wanted: (P, 2), x and y in pixels, point by point the same ones.

    Raises:
        ValueError: other shapes, or points that are not finite.
    """
    if found.shape != wanted.shape or found.ndim != 2 or found.shape[1] != 2 or not len(found):
        raise ValueError(f"expected the same points (P, 2), got {found.shape} and {wanted.shape}")
    if not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        raise ValueError("landmarks that are not finite")
    distances = np.linalg.norm(found.astype(np.float64) - wanted.astype(np.float64), axis=1)
    return float(distances.mean()) / normaliser(wanted)
