"""Files and folders that appear whole or not at all."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from etherdiff.system.leftovers import aside


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file aside and rename it into place. OSError where the disk does not take it.

    It gets the permissions that any new file gets: safetensors' own are the owner's alone.
    """
    unfinished = aside(path)
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, unfinished, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise system_error(error, path) from error
        unfinished.chmod(mode)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file whole, flushed to the disk."""
    unfinished = aside(path)
    try:
        unfinished.write_text(text, encoding="utf-8")
        flush(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unchanged_file_hash(path: Path) -> str:
    """The same, read once in a process for as long as the file's size and time stay what they are."""
    status = path.stat()
    return _hash_unchanged(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1 << 17)  # ADE20K has 40,000 images and maps
def _hash_unchanged(path: Path, size: int, modified: int) -> str:
    return file_hash(path)


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A new, empty folder which takes the place of `folder`, whole and flushed to the disk, when the block ends.

    If the block raises, or the process dies in it, `folder` is as it was. The exchange is two renames: a process
    killed between them leaves the old content beside, where `clear_leftovers` finds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged, old = aside(folder), aside(folder, "old")
    staged.mkdir()
    try:
        yield staged
        for path in [*staged.rglob("*"), staged]:
            flush(path)
        if folder.exists():
            folder.rename(old)
        try:
            staged.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def copy_folder(source: Path, target: Path) -> None:
    """A copy of a folder, whole or absent, in place of what was there."""
    with staged_folder(target) as staged:
        shutil.copytree(source, staged, dirs_exist_ok=True)


def flush(path: Path) -> None:
    """Have a file's content, or a folder's names, written to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def system_error(error: SafetensorError, path: Path | None = None) -> Exception:
    """What safetensors says of the system, as the system's own error; anything else as it is."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), path and str(path)) if number else error
