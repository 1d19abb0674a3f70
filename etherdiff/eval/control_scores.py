"""Scores of controllable generation: controls are read back from generated images and compared with the wanted ones.

A control is read back by a segmenter, Canny's algorithm, or a detector of landmarks.
"""

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from etherdiff.control.datasets import Pair
from etherdiff.control.signals.canny import Canny, edges
from etherdiff.control.signals.landmarks import Landmarks, NoFaceError, detect, find_task_file
from etherdiff.control.signals.segmentation import Segmentation
from etherdiff.control.signals.signal import Signal
from etherdiff.eval.features import BLACK, is_black
from etherdiff.eval.folders import Segmenter, load_segmenter
from etherdiff.eval.functional import AGREED, PREDICTED, WANTED, class_accuracies, class_ious
from etherdiff.eval.intervals import DRAWS, bootstrap_sums
from etherdiff.eval.metrics import METRICS
from etherdiff.eval.networks import PRESETS, Backbone, versions_of
from etherdiff.eval.scores import GENERATED, PromptImages, Scorer, Scoring, encode, interval_fields, scoring_versions
from etherdiff.images.reading import UnreadableImage, read_image, resize_and_crop
from etherdiff.system.errors import UserError
from etherdiff.system.files import digest, file_hash
from etherdiff.system.terminal import track

LEFT_OUT = (BLACK, "unreadable", "bad_features", "no_face", "missing")


# --- Reading controls back --------------------------------------------------------------------------------------------


class NotReadable(Exception):  # noqa: N818 - not an error: scores are left out
    """The reason why a signal cannot be read from images; its scores are then not computed."""


class ReadBack(ABC):
    """Reads one kind of signal back from images."""

    role: str
    """One of `CONTROL_ROLES`."""
    unread: str
    """Reason for leaving out an image in which nothing can be read."""
    size = 0
    """Number of classes, the size of its metrics; 0 if it reads no classes."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return everything that determines the readings: equal identities give equal readings, up to rounding."""

    @abstractmethod
    def read(self, images: Sequence[Image.Image], resolution: int) -> list[Tensor | None]:
        """Return for each RGB image what `Signal.target` holds for a control; None where nothing can be read."""


class ReadClasses(ReadBack):
    """Class indices, int64 (resolution, resolution)."""

    role, unread = "segmenter", "bad_features"

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter, self.size = segmenter, segmenter.classes

    def identity(self) -> dict[str, Any]:
        return self.segmenter.identity.as_dict()

    def read(self, images: Sequence[Image.Image], resolution: int) -> list[Tensor | None]:
        pixels = torch.stack([self.segmenter.preprocessing.pixels(image) for image in images])
        found = self.segmenter.segment(pixels, resolution)
        return [classes if int(classes.min()) >= 0 else None for classes in found]


class ReadEdges(ReadBack):
    """Edges, computed like those of the signal, bool (resolution, resolution)."""

    role, unread = "edges", "bad_features"

    def __init__(self, signal: Canny) -> None:
        """Raise UserError if OpenCV is not installed."""
        self.low, self.high = signal.low, signal.high
        edges(np.zeros((8, 8, 3), np.uint8), self.low, self.high)

    def identity(self) -> dict[str, Any]:
        return {"name": "canny", "low": self.low, "high": self.high, "versions": versions_of("numpy") | _opencv()}

    def read(self, images: Sequence[Image.Image], resolution: int) -> list[Tensor | None]:
        squares = [np.asarray(resize_and_crop(image, resolution)) for image in images]
        return [torch.from_numpy(edges(square, self.low, self.high)) for square in squares]


class ReadLandmarks(ReadBack):
    """Landmarks in pixels, float64 (P, 2), by mediapipe."""

    role, unread = "landmarks", "no_face"

    def __init__(self, task_file: Path | None) -> None:
        """task_file: path of mediapipe's model. NotReadable without it, or without mediapipe."""
        if task_file is None:
            raise NotReadable("no detector of landmarks is named: give mediapipe's model as --backbone landmarks=FILE.task")
        if importlib.util.find_spec("mediapipe") is None:
            raise NotReadable("mediapipe, which detects landmarks, is not installed")
        self.task_file = task_file

    def identity(self) -> dict[str, Any]:
        return {"name": f"mediapipe {self.task_file.name}", "weights_sha256": file_hash(self.task_file)}

    def read(self, images: Sequence[Image.Image], resolution: int) -> list[Tensor | None]:
        return [self._points(resize_and_crop(image, resolution)) for image in images]

    def _points(self, image: Image.Image) -> Tensor | None:
        try:
            return torch.from_numpy(detect(image, self.task_file))
        except NoFaceError:
            return None


def find_readback(signal: Signal, named: Mapping[str, str], preset: str, device: str) -> ReadBack:
    """Return the reader of a signal.

    Args:
        named: role -> a network by name, instead of the preset's.
        preset: one of `PRESETS`.

    Raises:
        UserError: a named network cannot be used, or no reader exists for the signal.
        NotReadable: something is needed that was not named.
    """
    if isinstance(signal, Segmentation):
        spec = named.get(ReadClasses.role, PRESETS[preset][ReadClasses.role])
        return ReadClasses(load_segmenter(spec, signal.palette.classes, device))
    if isinstance(signal, Canny):
        return ReadEdges(signal)
    if isinstance(signal, Landmarks):
        own = named.get(ReadLandmarks.role)
        return ReadLandmarks(find_task_file(Path(own) if own else signal.task_file))
    raise UserError(f"nothing here reads {signal.name} from an image")


def wanted_by(signal: Signal, control: Path, resolution: int) -> Tensor:
    """Return a control's target, in the form in which `ReadBack.read` returns what it finds."""
    return torch.from_numpy(np.array(signal.target(control, resolution)))


def _opencv() -> dict[str, str]:
    import cv2

    return {"opencv": str(cv2.__version__)}


# --- Scores -----------------------------------------------------------------------------------------------------------


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
    """Names from `CONTROL_METRICS` for the signal."""
    signal: Signal
    resolution: int
    readback: ReadBack | None
    """Reader of the signal; None where there is none (see `why_no_readback`)."""
    backbones: Mapping[str, Backbone]
    """Networks for FID, if it is asked for."""
    why_no_readback: str = ""
    batch_size: int = 16
    seed: int = 0
    """Seed of the intervals' resampling."""
    draws: int = DRAWS
    """Number of times the intervals resample."""


@dataclass
class _Found:
    """What the images show, as units of the metrics: the readings themselves would fill the memory."""

    units: dict[str, list[Tensor]]
    """Metric -> the unit of each readable image."""
    left_out: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {reason: [] for reason in LEFT_OUT})
    incomparable: str = ""
    """Reason why readings and controls cannot be compared; empty where they can."""


def score_controlled(
    images: Sequence[ControlledImage],
    real: Sequence[Path],
    scoring: ControlScoring,
    generation: Mapping[str, Any] | None,
    title: str = "scoring",
) -> dict[str, Any]:
    """Score images against their controls, and compute their FID to the real ones; JSON-able.

    Args:
        images: files may be missing; they are counted.
        real: the real image of each, at the same resolution; empty if `images` are real themselves (no FID then).
        generation: how the images were made, kept in every identity; None for real images.

    Returns:
        scores: name -> mean, low, high, n, interval, identity, as in `score_images`.
        per_class: for segmentation, the name, IoU, accuracy (None where it does not occur) and pixels of each class.
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
    """Read the control back from each image, and count the agreement with the control."""
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
    """Decode an image. Return None, and note why, if it is unreadable or a safety checker's black image."""
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
    """Return the scores of each class from the areas (3, C) of all images; None where nothing is there to divide by."""
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
    """Compute FID with the same code as for a subject; image i belongs to real image i."""
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
