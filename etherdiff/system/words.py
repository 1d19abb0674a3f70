"""Numbers and lists as a person reads them."""

from collections.abc import Sequence

MINUTE, HOUR = 60, 3600


def listed(names: Sequence[str], most: int = 4) -> str:
    """Join names, as "a, b, c, d and 4 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def counted(count: int, thing: str) -> str:
    """Write 1 image, 2 images."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def score(value: float | None) -> str:
    """Write three decimals below ten, one above; a dash for none."""
    if value is None:
        return "–"
    return (f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}").replace("-", "−")


def short(value: float) -> str:
    """Write three significant digits."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:.1e}"


def duration(seconds: float) -> str:
    """Write 4.2 s, 3 min 20 s, 2 h 05 min."""
    if round(seconds, 1) < MINUTE:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < HOUR:
        return f"{whole // MINUTE} min {whole % MINUTE:02d} s"
    return f"{whole // HOUR} h {whole % HOUR // MINUTE:02d} min"


def size(count: float) -> str:
    """Write bytes in the unit that leaves one to four digits."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
