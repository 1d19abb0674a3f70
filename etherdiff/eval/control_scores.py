"""Scores of controllable generation: what generated images show, compared with what their controls wanted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from etherdiff.control.datasets import Pair
from etherdiff.control.signals.segmentation import Segmentation
from etherdiff.control.signals.signal import Signal
from etherdiff.eval.features import BLACK, is_black
from etherdiff.eval.functional import AGREED, PREDICTED, WANTED, class_accuracies, class_ious
from etherdiff.eval.intervals import DRAWS, bootstrap_sums
from etherdiff.eval.metrics import METRICS
from etherdiff.eval.networks import Backbone
from etherdiff.eval.readback import ReadBack, wanted_by
from etherdiff.eval.scores import GENERATED, PromptImages, Scorer, Scoring, encode, interval_fields, scoring_versions
from etherdiff.images.reading import UnreadableImage, read_image
from etherdiff.system.files import digest, file_hash
from etherdiff.system.terminal import track

LEFT_OUT = (BLACK, "unreadable", "bad_features", "no_face", "missing")


@dataclass(frozen=True)
class ControlledImage:
    """An image, and the pair whose control it is compared with."""

    pair: Pair
    seed: int
    path: Path

    def describe(self) -> dict[str, Any]:
        """Return it as `EncodedImages.describe` does, so that one image is named once."""
        return {"kind": GENERATED, "prompt": self.pair.text, "seed": self.seed}


@dataclass(frozen=True)
class ControlScoring:
    """How to score."""

    metrics: tuple[str, ...]
    """Names, of `CONTROL_METRICS` for the signal."""
    signal: Signal
    resolution: int
    readback: ReadBack | None
    """None where nothing reads the signal; then `why_no_readback` says why."""
    backbones: Mapping[str, Backbone]
    """Networks for FID, where it is asked for."""
    why_no_readback: str = ""
    batch_size: int = 16
    seed: int = 0
    """Seed of the intervals' resampling."""
    draws: int = DRAWS
    """Number of times the intervals resample."""


@dataclass
class _Found:
    """What the images were found to show, as units: the readings themselves would fill the memory."""

    units: dict[str, list[Tensor]]
    """Metric -> the unit of each image that could be read."""
    left_out: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {reason: [] for reason in LEFT_OUT})
    incomparable: str = ""
    """Why what is found cannot be compared with what is wanted."""


def score_controlled(
    images: Sequence[ControlledImage],
    real: Sequence[Path],
    scoring: ControlScoring,
    generation: Mapping[str, Any] | None,
    title: str = "scoring",
) -> dict[str, Any]:
    """Score images against their controls, and compute their FID to the real ones; JSON-able.

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
    found.left_out["missing"] = [image.describe() for image in images if image not in there]
    for name in found.units:
        _score(name, found, scoring, identity, result)
    if "fid" in scoring.metrics and real:
        places = {image.pair.name: path for image, path in zip(images, real, strict=True)}
        _score_fid(there, [places[image.pair.name] for image in there], scoring, identity, found, result)
    result["left_out"] = found.left_out
    return result


def _read(images: Sequence[ControlledImage], scoring: ControlScoring, title: str) -> _Found:
    """Read the control back from each image, and count what is found against what was wanted."""
    readback = scoring.readback
    found = _Found({name: [] for name in scoring.metrics if METRICS[name].compares == "control x generated"})
    if readback is None or not found.units:
        return found
    starts = range(0, len(images), scoring.batch_size)
    for batch in track([images[start : start + scoring.batch_size] for start in starts], title):
        decoded = [(image, pixels) for image in batch if (pixels := _decode(image, found)) is not None]
        readings = readback.read([pixels for _, pixels in decoded], scoring.resolution) if decoded else []
        for (image, _), reading in zip(decoded, readings, strict=True):
            if reading is None:
                found.left_out[readback.unread].append(image.describe() | {"backbone": readback.role})
                continue
            wanted = wanted_by(scoring.signal, image.pair.control, scoring.resolution)
            if reading.shape != wanted.shape:
                found.incomparable = f"the controls have {len(wanted)} points, but {len(reading)} are detected: other landmarks"
                continue
            for name, units in found.units.items():
                units.append(METRICS[name].count(reading[None], wanted[None], size=readback.size))
    return found


def _decode(image: ControlledImage, found: _Found) -> Image.Image | None:
    """Decode an image; None, with a note, where it cannot be read or is a safety checker's black image."""
    try:
        decoded = read_image(image.path)
    except UnreadableImage as error:
        found.left_out["unreadable"].append(image.describe() | {"why": error.why})
        return None
    if is_black(decoded):
        found.left_out[BLACK].append(image.describe())
        return None
    return decoded


def _score(name: str, found: _Found, scoring: ControlScoring, identity: dict[str, Any], result: dict[str, Any]) -> None:
    metric, units = METRICS[name], found.units[name]
    if scoring.readback is None or found.incomparable or not units:
        why = scoring.why_no_readback if scoring.readback is None else found.incomparable
        result["not_scored"][name] = why or "no usable image"
        return
    table = torch.cat(units).numpy()
    mean = float(metric.value(table.sum(0)))
    if math.isnan(mean):
        result["not_scored"][name] = "there is nothing to compare: no class is wanted, or no edge is there"
        return
    low_high = bootstrap_sums(table, metric.value, scoring.seed, scoring.draws)
    result["scores"][name] = {
        "mean": mean,
        **interval_fields(low_high, "images", scoring.seed, scoring.draws),
        "n": len(table),
        "pairs": None,
        "identity": {"definition": metric.definition, "backbone": scoring.readback.identity(), **identity},
    }
    if isinstance(scoring.signal, Segmentation) and not result["per_class"]:
        result["per_class"] = per_class(table.sum(0), scoring.signal.palette.classes)


def per_class(areas: NDArray[Any], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the scores of each class from the areas (3, C) of all images; None where a share is one of nothing."""
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
    encoded = encode(real, [], prompts, how, scoring.backbones)
    scorer = Scorer(encoded, how, {})
    scorer.score("fid")
    result["not_scored"] |= scorer.not_scored
    for name, one in scorer.scores.items():
        one["identity"] |= identity
        result["scores"][name] = one
    for reason, entries in encoded.left_out().items():
        if reason != "long_prompts":
            known = found.left_out.setdefault(reason, [])
            known += [entry for entry in entries if entry not in known]


def _identity(
    images: Sequence[ControlledImage], scoring: ControlScoring, generation: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what is the same for every score of a set."""
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
        "versions": scoring_versions(),
    }
