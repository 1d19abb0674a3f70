"""Every control signal by its name; each is one file here. A signal is found by the options or by what a run recorded."""

from collections.abc import Mapping
from typing import Any

from etherdiff.control.signals.annotation import ANNOTATORS, annotated_by
from etherdiff.control.signals.canny import Canny
from etherdiff.control.signals.landmarks import Landmarks
from etherdiff.control.signals.segmentation import Segmentation
from etherdiff.control.signals.signal import Signal
from etherdiff.system.errors import UserError

SIGNALS: dict[str, type[Signal]] = {
    **{signal.name: signal for signal in (Segmentation, Canny, Landmarks)},
    **{name: annotated_by(name) for name in ANNOTATORS if name not in ("canny", "shuffle")},
}
"""Canny has a file of its own; a shuffled picture says where nothing is."""


def find_signal(name: str) -> type[Signal]:
    """Return the kind of signal of this name. UserError where there is none."""
    if name not in SIGNALS:
        *names, last = SIGNALS
        raise UserError(f"signal: must be {', '.join(names)} or {last}, not {name!r}")
    return SIGNALS[name]


def make_signal(name: str, palette: str | None = None, resolution: int = 512) -> Signal:
    """Return a signal by name; palette: of segmentation; resolution: that missing control files are computed at.

    Raises:
        UserError: no such signal, or no such palette.
    """
    kind = find_signal(name)
    if palette is not None and not kind.has_palette:
        raise UserError(f"palette: only segmentation has one, not {name}")
    return kind.choose(palette, resolution)


def recorded_signal(settings: Mapping[str, Any]) -> Signal:
    """Return the signal whose `settings()` these are. UserError where they are none."""
    try:
        return SIGNALS[settings["signal"]].from_settings(settings)
    except (KeyError, TypeError) as error:
        raise UserError(f"run.yaml does not say which control the run was trained on ({error!r})") from error
