"""Unfinished files: how they are named beside what they will be, and what becomes of those whose process was killed."""

import hashlib
import os
import re
import shutil
import socket
import uuid
from pathlib import Path

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_NAME = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{12}\.(?P<what>partial|old)")


def aside(path: Path, what: str = "partial") -> Path:
    """A name beside `path` (a rename must not cross file systems) that no other process, thread or container uses.

    what: "partial", or "old" for content that is to be put back where `path` is missing.
    """
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:12]}.{what}")


def clear_leftovers(folder: Path, whoever: bool = False) -> None:
    """Remove, in `folder` and below, what killed processes of this machine left, or, of a locked folder, `whoever` did."""
    for path in sorted(folder.rglob(".*")):
        found = _NAME.fullmatch(path.name)
        if found is None or not (whoever or (found["host"] == _HOST and not _lives(int(found["process"])))):
            continue
        whole = path.with_name(found["name"])
        if found["what"] == "old" and path.exists() and not whole.exists():  # killed between the two renames of an exchange
            path.rename(whole)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
