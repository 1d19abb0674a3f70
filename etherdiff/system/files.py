"""Write files and folders that appear whole or not at all; hash them; remove what killed processes left; find folders."""

import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import psutil
from safetensors import SafetensorError

from etherdiff.system.text import expand_home

if TYPE_CHECKING:
    from torch import Tensor

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{12}\.(?P<what>partial|old)")

# --- Atomic writes ----------------------------------------------------------------------------------------------------


def temporary_path(path: Path, what: str = "partial") -> Path:
    """Return a name next to `path` (a rename must not cross file systems) that no other process, thread or container uses.

    what: "partial", or "old" for content that is put back if `path` is missing.
    """
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:12]}.{what}")


@contextmanager
def staged_file(path: Path, durable: bool = False, own_name: bool = False) -> Iterator[Path]:
    """Yield a temporary path whose file takes the place of `path` when the block ends. If the block raises, nothing changes.

    durable: flush the content to the disk before the rename, so that it survives a power failure.
    own_name: the temporary path ends in the name of `path`, for readers that go by it.
    """
    existing = next(parent for parent in path.parents if parent.is_dir())
    temporary = temporary_path(existing / path.name)
    staged = temporary / path.name if own_name else temporary
    try:
        if own_name:
            temporary.mkdir()
        yield staged
        if durable:
            flush(staged)
        path.parent.mkdir(parents=True, exist_ok=True)
        move_into_place(staged, path)
    finally:
        _remove(temporary)


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """Yield a new, empty folder that takes the place of `folder`, flushed to the disk, when the block ends.

    If the block raises, or the process dies in it, `folder` is unchanged. The exchange is two renames: if a process is
    killed between them, `remove_temporary` puts the old content back.
    """
    staged, old = temporary_path(folder), temporary_path(folder, "old")
    staged.mkdir(parents=True)
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


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache. If it is missing, `make` fills it, and it appears whole."""
    if not folder.exists():
        staged = temporary_path(folder)
        staged.mkdir(parents=True)
        try:
            make(staged)
            staged.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, and its folder is as good
                raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return folder


def why_not_writable(path: Path) -> str | None:
    """Return why a file or folder cannot be written there, None if it can: it is tried, and nothing is left."""
    place = path.absolute()
    while True:
        try:
            is_folder = stat.S_ISDIR(place.stat().st_mode)
        except FileNotFoundError:
            place = place.parent
            continue
        except OSError as error:
            return f"{path} cannot be written: {error.strerror}"
        if not is_folder and place == path.absolute():  # it is replaced as a whole
            is_folder, place = True, place.parent
        if not is_folder:
            return f"{path} cannot be written: {place} is a file"
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            return f"{path} cannot be written: {place}: {error.strerror}"
        return None


def move_into_place(finished: Path, path: Path) -> None:
    """Rename a file that is complete to the name under which it is read."""
    finished.replace(path)


def remove_temporary(folder: Path, also_of_live_processes: bool = False) -> None:
    """Remove temporary files and folders, in `folder` and below, of processes of this machine that are dead.

    also_of_live_processes: remove those of any process and machine, for a folder that this process has locked.
    """
    for path in sorted(folder.rglob(".*")):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or not (also_of_live_processes or (found["host"] == _HOST and not _is_alive(found["process"]))):
            continue
        whole = path.with_name(found["name"])
        if found["what"] == "old" and path.exists() and not whole.exists():  # killed between the two renames of an exchange
            path.rename(whole)
        else:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_alive(process: str) -> bool:
    try:
        return psutil.pid_exists(int(process))
    except OverflowError:
        return False


def flush(path: Path) -> None:
    """Write a file's content, or a folder's names, to the disk itself."""
    if os.name == "nt":  # has no flush of folders, and flushes only what is open for writing
        if path.is_dir():
            return
        handle = os.open(path, os.O_RDWR)
    else:
        handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- Content ----------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole, flushed to the disk."""
    with staged_file(path, durable=True) as staged:
        staged.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, content: Any, allow_nan: bool = True) -> None:
    """Replace a JSON file as a whole. ValueError if `content` holds NaN or infinity and `allow_nan` is False."""
    write_text(path, json.dumps(content, indent=2, allow_nan=allow_nan) + "\n")


def save_tensors(tensors: "Mapping[str, Tensor]", path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Replace a safetensors file as a whole, with the permissions of any new file. OSError if the disk refuses it."""
    from safetensors.torch import save_file  # imports torch, which not all that write files need

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with staged_file(path) as staged:
        staged.touch()
        mode = staged.stat().st_mode  # safetensors writes files that only their owner can read
        try:
            save_file(contiguous, staged, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise system_error(error, path) from error
        staged.chmod(mode)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder, whole or not at all, in place of what was there."""
    with staged_folder(target) as staged:
        shutil.copytree(source, staged, dirs_exist_ok=True)


def system_error(error: SafetensorError, path: Path | None = None) -> Exception:
    """Return the system's error that a SafetensorError reports, as an OSError; any other error unchanged."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), path and str(path)) if number else error


# --- Hashes -----------------------------------------------------------------------------------------------------------


def digest(content: Any) -> str:
    """Return 32 hexadecimal digits for JSON-able content. Equal contents have equal digests.

    Cache keys and score identities hold these values: they must not change.
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unchanged_file_hash(path: Path) -> str:
    """Return the same, computed once per process while the file's size and modification time stay the same."""
    status = path.stat()
    return _hash_unchanged(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1 << 17)  # ADE20K has 40,000 images and maps
def _hash_unchanged(path: Path, size: int, modified: int) -> str:
    return file_hash(path)


# --- Where things are kept on the user's machine --------------------------------------------------------------------


ASSETS = Path(__file__).parents[1] / "assets"
"""What comes with the package: the tiny models, configurations, tokenizers."""


def cache_dir() -> Path:
    """Return the folder of what can be computed again: latents, class images.

    ETHERDIFF_CACHE names it; else it is in XDG_CACHE_HOME, on any system, or where the system keeps caches.
    """
    if named := os.environ.get("ETHERDIFF_CACHE"):
        return Path(expand_home(named))
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(expand_home(root)) / "etherdiff"
    return platformdirs.user_cache_path("etherdiff", appauthor=False)


def data_root(named: Path | None) -> Path | None:
    """Return the folder in which subjects and datasets are looked up: the one named, else ETHERDIFF_DATA, else none."""
    if named is not None:
        return named
    from_environment = os.environ.get("ETHERDIFF_DATA")
    return Path(expand_home(from_environment)) if from_environment else None
