"""Pictures drawn by one of controlnet-aux's annotators (depth, poses, soft edges, …): a signal for each of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from etherdiff.control.preprocess import annotate
from etherdiff.control.signals.signal import Signal
from etherdiff.images.reading import UnreadableImage, read_image, resize_and_crop
from etherdiff.system.files import staged_file


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
