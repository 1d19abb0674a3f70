"""What a control signal is: a file beside an image that says where things are. One signal per file in this folder."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray


class Signal(ABC):
    """One kind of control. Every method brings its file to a square as images are brought: scaled, then cut in the middle."""

    name: ClassVar[str]

    @abstractmethod
    def picture(self, control: Path, resolution: int) -> NDArray[np.uint8]:
        """What the hint encoder sees: (resolution, resolution, 3), RGB. UserError where the file is not this signal."""

    @abstractmethod
    def target(self, control: Path, resolution: int) -> NDArray[Any]:
        """What a generated image is held against, at the same geometry: its form is the signal's own."""

    @abstractmethod
    def problems(self, control: Path) -> list[str]:
        """Everything wrong with a control file, a sentence each; empty where it is good."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides pictures and targets beside the file: JSON-able, recorded with a run."""

    def derive(self, image: Path, control: Path) -> None:
        """Make the control file of an image. UserError for signals that no image tells by itself."""
        from etherdiff.system.errors import UserError

        raise UserError(f"{image} has no {self.name} beside it, and {self.name} cannot be computed from an image here")
