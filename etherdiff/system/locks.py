"""Locks between processes: one process per run folder; one after another where several would compute the same."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from etherdiff.system.errors import UserError
from etherdiff.system.terminal import is_main_process, say, warn

LOCK = ".lock"
RETRY_INTERVAL = 0.2
"""Seconds between attempts to take a lock that another process holds."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run folder, which is made if it is missing. UserError if another process holds it, or it cannot be written.

    The lock is the system's: it ends with its process, however that dies. In a torchrun launch the first process holds it
    for all.
    """
    if not is_main_process():
        yield
        return
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _try_lock(folder / LOCK)
    except OSError as error:
        raise UserError(f"output: {folder} cannot be written: {error.strerror}") from error
    if lock is None:
        raise UserError(f"{folder} is in use by {_holder(folder / LOCK)}: wait for it, stop it, or choose another folder")
    try:
        yield
    finally:
        with suppress(OSError):  # a disk that became read-only has been reported already
            _unlock(lock, folder / LOCK)
            if made and not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Hold a lock file, made and removed here, once no other process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _try_lock(path)
    if lock is None:
        say("another process is at work on what this one needs: waiting for it")
    while lock is None:
        time.sleep(RETRY_INTERVAL)
        lock = _try_lock(path)
    try:
        yield
    finally:
        with suppress(OSError):
            _unlock(lock, path)


def _try_lock(path: Path) -> BaseFileLock | None:
    """Return the lock, held; None if another process, or another lock of this one, holds it. OSError if not writable."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as error:
        warn(f"{path.parent} cannot be locked ({error.strerror}): make sure that no other process writes there")
    with suppress(OSError), path.open("r+b") as file:
        file.seek(1)  # Windows locks the first byte, for reading too
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        file.truncate()
    return lock


def _unlock(lock: BaseFileLock, path: Path) -> None:
    if os.name != "nt":  # there filelock removes it, after closing it
        path.unlink(missing_ok=True)  # while it is still held: who locked it meanwhile sees that it is gone, and tries again
    lock.release()


def _holder(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(1)
            return file.read().decode("utf-8", "replace").strip() or "another process"
    except OSError:
        return "another process"
