"""Read text files that a user wrote, whichever program saved them."""

import codecs
import json
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


def read_user_json(path: Path) -> Any:
    """Return what a JSON file holds. UserError where it cannot be read, or is not JSON."""
    try:
        return json.loads(read_user_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
