"""Scores of controllable generation: what generated images show against what their controls wanted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from etherdiff import __version__
from etherdiff.control.pairs import Pair
from etherdiff.control.segmentation import Segmentation
from etherdiff.control.signal import Signal
from etherdiff.eval.features import BLACK, is_black
from etherdiff.eval.image_set import GENERATED, PromptImages, Scoring, read_images
from etherdiff.eval.image_sums import ImageSums
from etherdiff.eval.intervals import DRAWS, bootstrap_sums
from etherdiff.eval.metrics import METRICS
from etherdiff.eval.network import Backbone, versions_of
from etherdiff.eval.readers import Reader, wanted_by
from etherdiff.eval.scorer import Scorer, interval_fields
from etherdiff.eval.segmentation_scores import AGREED, PREDICTED, WANTED, class_accuracies, class_ious
from etherdiff.images.reading import UnreadableImage, read_image
from etherdiff.system.files import digest, file_hash
from etherdiff.system.terminal import track

LEFT_OUT = (BLACK, "unreadable", "bad_features", "no_face", "missing")


@dataclass(frozen=True)
class ControlledImage:
    """An image, and the pair whose control it is held against."""

    pair: Pair
    seed: int
    path: Path


@dataclass(frozen=True)
class ControlScoring:
    """How to score."""

    metrics: tuple[str, ...]
    """Of `CONTROL_METRICS` for the signal."""
    signal: Signal
    resolution: int
    reader: Reader | None
    """None where nothing reads the signal; then `why_no_reader` says why."""
    backbones: Mapping[str, Backbone]
    """For FID, where it is asked for."""
    why_no_reader: str = ""
    batch_size: int = 16
    seed: int = 0
    """Of the intervals' resampling."""
    draws: int = DRAWS

    @property
    def control_metrics(self) -> list[str]:
        """Those that compare with the control."""
        return [name for name in self.metrics if METRICS[name].compares == "control x generated"]


@dataclass
class _Found:
    """What the images were found to show, counted: the readings themselves would fill the memory."""

    metrics: dict[str, ImageSums]
    units: dict[str, list[Tensor]]
    """Metric -> of each image that could be read, its counts."""
    left_out: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {reason: [] for reason in LEFT_OUT})
    incomparable: str = ""
    """Why what is found cannot be held against what is wanted."""


def score_controlled(
    images: Sequence[ControlledImage],
    real: Sequence[Path],
    scoring: ControlScoring,
    generation: Mapping[str, Any] | None,
    title: str = "scoring",
) -> dict[str, Any]:
    """The scores of images against their controls, and their FID to the real ones; JSON-able.

    Args:
        images: may be missing on the disk, which is counted.
        real: the real image of each, at the same resolution; empty where `images` are those, and FID says nothing.
        generation: how the images were made, kept in every identity; None for real images.

    Returns:
        scores: name -> mean, low, high, n, interval, identity, as of `score_images`.
        per_class: for segmentation, of each class its name, IoU, accuracy (None where it does not occur) and pixels.
        left_out: every image that is in no score, or not in all, by reason.
        not_scored: metric -> why it has no score.
    """
    there = [image for image in images if image.path.is_file()]
    result: dict[str, Any] = {"scores": {}, "per_class": [], "left_out": {}, "not_scored": {}}
    identity = _identity(there, scoring, generation)
    found = _read(there, scoring, title)
    found.left_out["missing"] = [_described(image) for image in images if image not in there]
    for name in scoring.control_metrics:
        _score(name, found, scoring, identity, result)
    if "fid" in scoring.metrics and real:
        places = {image.pair.name: path for image, path in zip(images, real, strict=True)}
        _score_fid(there, [places[image.pair.name] for image in there], scoring, identity, found, result)
    result["left_out"] = found.left_out
    return result


def _read(images: Sequence[ControlledImage], scoring: ControlScoring, title: str) -> _Found:
    reader = scoring.reader
    metrics = {name: METRICS[name].make(*reader.arguments()) for name in scoring.control_metrics} if reader else {}
    found = _Found(metrics, {name: [] for name in metrics})
    if reader is None or not metrics:
        return found
    starts = range(0, len(images), scoring.batch_size)
    for batch in track([images[start : start + scoring.batch_size] for start in starts], title):
        decoded = [(image, pixels) for image in batch if (pixels := _decoded(image, found)) is not None]
        readings = reader.read([pixels for _, pixels in decoded], scoring.resolution) if decoded else []
        for (image, _), reading in zip(decoded, readings, strict=True):
            if reading is None:
                found.left_out[reader.unread].append(_described(image) | {"backbone": reader.role})
            else:
                _count(found, reading, wanted_by(scoring.signal, image.pair.control, scoring.resolution))
    return found


def _count(found: _Found, reading: Tensor, wanted: Tensor) -> None:
    if reading.shape != wanted.shape:
        found.incomparable = f"the controls have {len(wanted)} points, but {len(reading)} are detected: other landmarks"
        return
    for name, metric in found.metrics.items():
        found.units[name].append(metric.counts(reading[None], wanted[None]))


def _decoded(image: ControlledImage, found: _Found) -> Image.Image | None:
    """None, and noted, for what cannot be read and for the black image of a safety checker."""
    try:
        decoded = read_image(image.path)
    except UnreadableImage as error:
        found.left_out["unreadable"].append(_described(image) | {"why": error.why})
        return None
    if is_black(decoded):
        found.left_out[BLACK].append(_described(image))
        return None
    return decoded


def _score(name: str, found: _Found, scoring: ControlScoring, identity: dict[str, Any], result: dict[str, Any]) -> None:
    entry = METRICS[name]
    if scoring.reader is None or found.incomparable or not found.units[name]:
        why = scoring.why_no_reader if scoring.reader is None else found.incomparable
        result["not_scored"][name] = why or "no usable image"
        return
    metric, units = found.metrics[name], torch.cat(found.units[name]).numpy()
    mean = float(metric.of_sums(units.sum(0)))
    if math.isnan(mean):
        result["not_scored"][name] = "there is nothing to compare: no class is wanted, or no edge is there"
        return
    low_high = bootstrap_sums(units, metric.of_sums, scoring.seed, scoring.draws)
    result["scores"][name] = {
        "mean": mean,
        **interval_fields(low_high, "images", scoring.seed, scoring.draws),
        "n": len(units),
        "pairs": None,
        "identity": {"definition": entry.definition, "backbone": scoring.reader.identity(), **identity},
    }
    if isinstance(scoring.signal, Segmentation) and not result["per_class"]:
        result["per_class"] = per_class(units.sum(0), scoring.signal.palette.classes)


def per_class(areas: NDArray[Any], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Of each class, from the areas (3, C) of all images; None where a share is one of nothing."""
    ious, accuracies = (
        [None if math.isnan(value) else float(value) for value in of(areas)] for of in (class_ious, class_accuracies)
    )
    return [
        {
            "class": number,
            "name": name,
            "iou": ious[number],
            "accuracy": accuracies[number],
            "pixels_wanted": int(areas[WANTED, number]),
            "pixels_found": int(areas[PREDICTED, number]),
            "pixels_right": int(areas[AGREED, number]),
        }
        for number, name in enumerate(classes)
    ]


def _score_fid(
    images: Sequence[ControlledImage],
    real: Sequence[Path],
    scoring: ControlScoring,
    identity: dict[str, Any],
    found: _Found,
    result: dict[str, Any],
) -> None:
    """FID by the same code as a subject's, of images that belong together one by one."""
    how = Scoring(metrics=("fid",), seed=scoring.seed, draws=scoring.draws)
    prompts = [PromptImages(image.pair.text, (image.path,), (image.seed,)) for image in images]
    scored = read_images(real, [], prompts, how, scoring.backbones)
    scorer = Scorer(scored, how, {})
    scorer.score("fid")
    result["not_scored"] |= scorer.not_scored
    for name, one in scorer.scores.items():
        one["identity"] |= identity
        result["scores"][name] = one
    for reason, entries in scored.left_out([]).items():
        told = found.left_out.setdefault(reason, [])
        told += [entry for entry in entries if entry not in told]
    found.left_out.pop("long_prompts", None)


def _identity(
    images: Sequence[ControlledImage], scoring: ControlScoring, generation: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What is the same for every score of a set."""
    pairs = [image.pair for image in images]
    return {
        "controls": {
            "n": len(pairs),
            "sha256": digest([file_hash(pair.control) for pair in pairs]),
            "signal": scoring.signal.name,
            "settings_sha256": digest(scoring.signal.settings()),
            "resolution": scoring.resolution,
        },
        "prompts": {"n": len(pairs), "sha256": digest([pair.text for pair in pairs])},
        "seeds": {"first": min((image.seed for image in images), default=None), "sha256": digest([i.seed for i in images])},
        "generation": dict(generation) if generation is not None else None,
        "versions": {"etherdiff": __version__, **versions_of("torchmetrics", "numpy")},
    }


def _described(image: ControlledImage) -> dict[str, Any]:
    """As `ImageSet.describe`, so that one image is told of once."""
    return {"kind": GENERATED, "prompt": image.pair.text, "seed": image.seed}
