"""The images that a run is judged by, in one form for every task: what is drawn, from what, and where it lies.

    eval/SET/NNN-name/SEED.png

A task says which sets there are (`Task.image_sets`); the evaluation claims, draws and scores them. An image is a function of
its text, control and seed, but its last bits also depend on what is computed in the same batch: so batches are fixed.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from etherdiff.adapters.io import load_adapter, read_adapter
from etherdiff.adapters.methods import add_adapter
from etherdiff.config import PerturbConfig, TrainConfig
from etherdiff.control.datasets import Pair
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.system.files import digest, file_hash
from etherdiff.system.text import program
from etherdiff.tasks.planning import method_options
from etherdiff.train.checkpoint import checkpoint_path

IMAGES = "images"
"""Folder of the set that every run has: its own images."""


@dataclass(frozen=True)
class Picture:
    """An image of a set."""

    text: str
    """Prompt that it is drawn from."""
    seed: int
    """Seed of its noise."""
    place: Path
    """SET/NNN-name/SEED.png, relative to the eval folder."""
    pair: Pair | None = None
    """Pair of the dataset that the image is scored against; None where there is no control."""
    control: Path | None = None
    """Control file that it is drawn with."""


@dataclass(frozen=True)
class ImageSet:
    """Images that are drawn in one way and scored together."""

    name: str
    """Folder in the eval folder."""
    title: str
    """What the set is, for tables and progress bars."""
    batches: Sequence[Sequence[Picture]]
    """Pictures that are always drawn together."""
    settings: dict[str, Any]
    """What decides the images, apart from rounding. Images of other settings are not taken up."""
    generation: dict[str, Any] = field(default_factory=dict)
    """How an image comes from its prompt, control and seed: part of its scores' identity."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What each PNG records next to its prompt and seed."""
    adapted: bool = True
    """Whether the run's adapter is on the base."""
    control_scale: float = 1.0
    """Factor of the hint; 0 switches the control off."""
    read: Callable[[Picture], Image.Image] | None = None
    """Reads a real image, brought to the square that images are drawn in; None: images are drawn. UserError if it cannot."""

    @property
    def pictures(self) -> list[Picture]:
        """All images, in order."""
        return [picture for batch in self.batches for picture in batch]


Draw = Callable[[ImageSet, Sequence[Picture]], list[Image.Image]]
"""Draws one batch of a set."""


class ImageSets(ABC):
    """What a run is judged by, found and checked. Nothing has been drawn, and no model is loaded."""

    run: Run
    sets: tuple[ImageSet, ...]
    """In the order in which they are drawn."""
    facts: dict[str, Any]
    """What was judged: "run" in metrics.json."""

    def __getitem__(self, name: str) -> ImageSet:
        return next(found for found in self.sets if found.name == name)

    @abstractmethod
    def load(self, device: str) -> Draw:
        """Load the model and return what draws with it; sets must be drawn in their order.

        UserError where the base is not the one that the run was trained on.
        """


# --- What of a run is judged -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What of a run is judged."""

    name: str
    """last, best or step-N."""
    step: int
    """Number of optimizer steps that it was trained for."""
    sha256: str
    """Digest of its weights and, where it has one, its configuration."""
    put_on: Callable[[UNet2DConditionModel], Any]
    """Puts it on the base's UNet, in place."""


def find_trained(run: Run, name: str) -> Trained:
    """Find the run's result (last), its best adapter or a checkpoint (step-N). UserError where it is missing or damaged."""
    if name == "last":
        folder = run.folder
        if not folder.adapter.is_dir():
            raise UserError(
                f"{run.path} has no adapter yet: the run has not finished. Go on with {program('resume', run.path)}, or judge "
                f"a checkpoint with --checkpoint step-N (there are: {_checkpoints(run)})"
            )
        run.check_results()
        return _from_folder(folder.adapter, name, run.config.steps)
    if isinstance(run.config, PerturbConfig):
        raise UserError(f"checkpoint: {run.path} was made by etherdiff perturb: there is only its last")
    if name == "best":
        if (best := run.best) is None:
            raise UserError(f"{run.path} has no best/: it was trained without scores along the way (--eval-scores on)")
        return _from_folder(run.folder.best, name, best.step)
    number = re.fullmatch(r"step-(\d{1,9})", name)
    if number is None:
        raise UserError(f"checkpoint: must be last, best or step-N, not {name!r}")
    return _from_checkpoint(run, run.config, int(number[1]))


def _checkpoints(run: Run) -> str:
    return ", ".join(path.name for path in sorted(run.folder.checkpoints.glob("step-*"))) or "none"


def _from_folder(folder: Path, name: str, step: int) -> Trained:
    saved = read_adapter(folder)
    hashes = {path.name: file_hash(path) for path in sorted(saved.folder.glob("adapter_*"))}
    return Trained(name, step, digest(hashes), lambda unet: load_adapter(unet, saved.folder))


def _from_checkpoint(run: Run, config: TrainConfig, step: int) -> Trained:
    """A checkpoint's weights: their average where the run keeps one, as in its result."""
    path = checkpoint_path(run.folder.checkpoints, step)
    if not path.is_dir():
        raise UserError(f"checkpoint: {run.path} has no step-{step} (there are: {_checkpoints(run)})")
    weights = path / ("ema.safetensors" if config.ema_decay else "parameters.safetensors")
    try:
        recorded = json.loads((path / "manifest.json").read_text(encoding="utf-8"))[weights.name]
        sha256 = file_hash(weights)
        tensors = load_file(weights)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"checkpoint: {path} cannot be read ({error!r}): choose another") from error
    if sha256 != recorded:
        raise UserError(f"checkpoint: {weights} is not what was written: choose another")

    def put_on(unet: UNet2DConditionModel) -> None:
        add_adapter(unet, config.method, method_options(config), config.seed)
        own = {f"unet.{name}": parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
        if own.keys() != tensors.keys():
            raise UserError(f"checkpoint: {path} holds other parameters than this run trains")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
        unet.requires_grad_(False).eval()

    return Trained(f"step-{step}", step, sha256, put_on)
