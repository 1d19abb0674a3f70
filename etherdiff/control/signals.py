"""Every control signal by its name, and the one that a run was trained on, from what the run recorded."""

from collections.abc import Callable, Mapping
from typing import Any

from etherdiff.control.canny import Canny
from etherdiff.control.landmarks import Landmarks
from etherdiff.control.palettes import Palette
from etherdiff.control.segmentation import Segmentation
from etherdiff.control.signal import Signal
from etherdiff.system.errors import UserError


def _segmentation(settings: Mapping[str, Any]) -> Signal:
    palette = dict(settings["palette"])
    palette |= {name: tuple(palette[name]) for name in ("classes", "ignored")}
    return Segmentation(Palette(**palette | {"colours": tuple(tuple(colour) for colour in palette["colours"])}))


SIGNALS: dict[str, Callable[[Mapping[str, Any]], Signal]] = {
    "segmentation": _segmentation,
    "canny": lambda settings: Canny(settings["resolution"], settings["low"], settings["high"]),
    "landmarks": lambda settings: Landmarks(),
}


def recorded_signal(settings: Mapping[str, Any]) -> Signal:
    """The signal whose `settings()` these are. UserError where they are none."""
    try:
        return SIGNALS[settings["signal"]](settings)
    except (KeyError, TypeError) as error:
        raise UserError(f"run.yaml does not say which control the run was trained on ({error!r})") from error
