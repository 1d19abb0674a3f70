"""Pictures drawn from photos by controlnet-aux's annotators (depth, poses, soft edges, …): a signal for each of them."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from etherdiff.control.signals.signal import Signal
from etherdiff.images.reading import UnreadableImage, read_image, resize_and_crop
from etherdiff.system.errors import UserError
from etherdiff.system.files import staged_file

WEIGHTS = "lllyasviel/Annotators"
"""Hub repository of the annotators' weights."""
ANNOTATORS = {
    "canny": ("CannyDetector", None),
    "depth": ("MidasDetector", WEIGHTS),
    "hed": ("HEDdetector", WEIGHTS),
    "lineart": ("LineartDetector", WEIGHTS),
    "lineart-anime": ("LineartAnimeDetector", WEIGHTS),
    "mlsd": ("MLSDdetector", WEIGHTS),
    "normal": ("NormalBaeDetector", WEIGHTS),
    "openpose": ("OpenposeDetector", WEIGHTS),
    "pidi": ("PidiNetDetector", WEIGHTS),
    "shuffle": ("ContentShuffleDetector", None),
}
"""Name -> controlnet-aux's class, and where its weights come from; None: it has none."""
STEP = 64
"""Annotators scale an image so that its sides are multiples of this."""
_ONE_AT_A_TIME = Lock()  # loading, and networks that keep what they compute in themselves


def annotate(name: str, image: NDArray[np.uint8], *thresholds: float) -> NDArray[np.uint8]:
    """Return what the annotator draws for an RGB image (H, W, 3), in its size.

    Raises:
        UserError: controlnet-aux cannot be imported, or its weights cannot be had.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    with _ONE_AT_A_TIME:
        draw = _annotator(name)
        drawn = draw(np.ascontiguousarray(image), *thresholds, detect_resolution=side, image_resolution=side, output_type="np")
    if drawn.shape[:2] == (height, width):
        return drawn
    return np.asarray(Image.fromarray(drawn).resize((width, height), Image.Resampling.BILINEAR))


@lru_cache(maxsize=2)
def _annotator(name: str) -> Any:
    class_name, weights = ANNOTATORS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that only some annotators need
        try:
            import controlnet_aux
        except Exception as error:  # with another mediapipe than it was made for: an AttributeError
            raise UserError(
                f"{name}: controlnet-aux cannot be imported ({_first_line(error)}): pip install controlnet-aux, in an "
                "environment without mediapipe"
            ) from error
        kind = getattr(controlnet_aux, class_name)
        try:
            return kind() if weights is None else kind.from_pretrained(weights)
        except Exception as error:  # the hub's own, its HTTP library's, torch's, the disk's
            raise UserError(
                f"{name}: the weights of controlnet-aux's annotator could not be loaded from {weights} ({_first_line(error)}). "
                "Without a network, give the control images as files of the dataset"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Annotation(Signal):
    """Control files are such pictures. Those made here are of the square, at the resolution, that is trained on."""

    resolution: int = 512

    suffix: ClassVar[str | None] = ".png"

    @classmethod
    def choose(cls, palette: str | None, resolution: int) -> Self:
        return cls(resolution)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        return cls(settings["resolution"])

    def settings(self) -> dict[str, Any]:
        return {"signal": self.name, "resolution": self.resolution}

    def picture(self, control: Path, resolution: int) -> NDArray[np.uint8]:
        """Return the picture's square: (resolution, resolution, 3)."""
        return np.asarray(resize_and_crop(read_image(control), resolution))

    def target(self, control: Path, resolution: int) -> NDArray[np.uint8]:
        """Return the picture itself: nothing here reads it back from generated images."""
        return self.picture(control, resolution)

    def problems(self, control: Path) -> list[str]:
        """Return why the picture cannot be read."""
        try:
            read_image(control)
        except UnreadableImage as error:
            return error.problems
        return []

    def derive(self, image: Path, control: Path) -> None:
        """Write what the annotator draws for the image's square. UserError where it cannot be read, or drawn."""
        square = resize_and_crop(read_image(image), self.resolution)
        drawn = annotate(self.name, np.asarray(square))
        with staged_file(control) as staged:
            Image.fromarray(drawn).save(staged, format="PNG")


def annotated_by(name: str) -> type[Annotation]:
    """Return the signal of the annotator `name`."""
    return type(f"Annotation_{name}", (Annotation,), {"name": name})
