"""Numbers as a person reads them, and numbers as they come out of files that may hold anything."""

import math
from typing import Any

MINUTE, HOUR = 60, 3600


def number(value: Any) -> float | None:
    """A finite number; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def score(value: float | None) -> str:
    """Three decimals below ten, one above; a dash for none."""
    if value is None:
        return "–"
    return (f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}").replace("-", "−")


def short(value: float) -> str:
    """Three significant digits."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:.1e}"


def seconds(value: float) -> str:
    """4.2 s, 3 min 20 s, 2 h 05 min."""
    if round(value, 1) < MINUTE:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < HOUR:
        return f"{whole // MINUTE} min {whole % MINUTE:02d} s"
    return f"{whole // HOUR} h {whole % HOUR // MINUTE:02d} min"


def size(count: float) -> str:
    """Bytes in the unit that leaves one to four digits."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def counted(count: int, thing: str) -> str:
    """1 image, 2 images."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")
