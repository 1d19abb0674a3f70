"""Read text files that a user wrote, and write numbers and lists for people to read."""

import codecs
import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etherdiff.system.errors import UserError

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_user_text(path: Path) -> str:
    r"""Return a file's text without its byte-order mark, and with "\n" at the end of its lines.

    Raises:
        UserError: the file cannot be read, or is neither UTF-8 nor, by its mark, UTF-16.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-16" if content.startswith(_UTF16) else "utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read ({error}); save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def expand_home(value: Any) -> Any:
    """Return a path, or a text that may be one, or several, with `~` and `~USER` at its beginning replaced, as a shell does.

    Options, arguments and the environment's variables are passed through here where they are read, and nowhere else. Of an
    unknown user, and anything that is no path, nothing is changed.
    """
    if isinstance(value, list | tuple):
        return type(value)(map(expand_home, value))
    if isinstance(value, str | Path) and str(value).startswith("~"):
        return type(value)(os.path.expanduser(value))  # noqa: PTH111  Path.expanduser raises for an unknown user
    return value


def program(command: str, *words: object) -> str:
    """Return a command of this program to be pasted into the system's shell, whatever is in its words."""
    line = ["etherdiff", command, *map(str, words)]
    return subprocess.list2cmdline(line) if os.name == "nt" else shlex.join(line)


def read_user_json(path: Path) -> Any:
    """Return what a JSON file holds. UserError where it cannot be read, or is not JSON."""
    try:
        return json.loads(read_user_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error


MINUTE, HOUR = 60, 3600


def listed(names: Sequence[str], most: int = 4, between: str = ", ") -> str:
    """Join names, as "a, b, c, d and 4 more"."""
    return between.join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


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
