"""Reading a control back from a generated image: by a segmenter, Canny's algorithm, or a detector of landmarks."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from etherdiff.control.signals.canny import Canny, edges
from etherdiff.control.signals.landmarks import Landmarks, NoFaceError, detect, find_task_file
from etherdiff.control.signals.segmentation import Segmentation
from etherdiff.control.signals.signal import Signal
from etherdiff.eval.folders import Segmenter, load_segmenter
from etherdiff.eval.networks import PRESETS, versions_of
from etherdiff.images.reading import resize_and_crop
from etherdiff.system.errors import UserError
from etherdiff.system.files import file_hash


class NotReadable(Exception):  # noqa: N818 - it is no error: scores are left out
    """Why a signal cannot be read back from any image here; its scores are then not computed."""


class ReadBack(ABC):
    """Reads one kind of signal back from images."""

    role: str
    """One of `CONTROL_ROLES`."""
    unread: str
    """Reason under which an image is left out that it can read nothing from."""
    size = 0
    """Number of classes, where it reads classes: what its metrics are made with."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what decides the readings: equal identities give, up to rounding, the same for the same image."""

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
    """Edges as the signal's own are made, bool (resolution, resolution)."""

    role, unread = "edges", "bad_features"

    def __init__(self, signal: Canny) -> None:
        """UserError where OpenCV is not installed."""
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
        """task_file: mediapipe's model. NotReadable without it, or without mediapipe."""
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
    """Return what reads the signal.

    Args:
        named: role -> a network by name, instead of the preset's.
        preset: one of `PRESETS`.

    Raises:
        UserError: what is named cannot be used, or the signal is of a kind that nothing here reads.
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
