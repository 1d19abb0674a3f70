"""A dataset for controllable generation: images, their control signals and their captions."""

from dataclasses import dataclass
from pathlib import Path

from etherdiff.control.signal import Signal


@dataclass(frozen=True)
class Pair:
    """One image with its control and caption; names are unique within a split."""

    name: str
    image: Path
    control: Path
    text: str


@dataclass(frozen=True)
class ControlDataset:
    """What is trained on, and what is scored on: no pair is in both."""

    name: str
    signal: Signal
    training: tuple[Pair, ...]
    evaluation: tuple[Pair, ...]
    """The dataset's validation split; the tiny world's test split. May be empty."""
