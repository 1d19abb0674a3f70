"""Files and folders that appear whole or not at all."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file aside and rename it into place.

    It gets the permissions that any new file gets: safetensors' own are the owner's alone.
    """
    aside = _aside(path, "partial")
    try:
        aside.touch()
        mode = aside.stat().st_mode
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, aside, metadata={"format": "pt", **(metadata or {})})
        aside.chmod(mode)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A new, empty folder which takes the place of `folder`, whole and flushed to the disk, when the block ends.

    If the block raises, or the process dies in it, `folder` is as it was. The exchange is two renames: a process
    killed between them leaves the old content beside, as `.NAME.….old`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged, old = _aside(folder, "partial"), _aside(folder, "old")
    staged.mkdir()
    try:
        yield staged
        for path in [*staged.rglob("*"), staged]:
            _flush(path)
        if folder.exists():
            folder.rename(old)
        try:
            staged.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        _flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _aside(path: Path, what: str) -> Path:
    """A name beside `path` that no other process, thread or container uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.{what}")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
