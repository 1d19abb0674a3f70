"""One process per run folder; and one after another where several would compute the same."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from etherdiff.system.errors import UserError
from etherdiff.system.terminal import is_main_process, say, warn

LOCK = ".lock"
LOOK_AGAIN = 0.2
"""Seconds between looks at a lock that another process holds."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run folder, made where there is none. UserError where another process holds it, or nothing can be written.

    The lock is the kernel's, so a process that dies in any way lets go of it; the file that it leaves is taken over. Of a
    torchrun launch the first process holds it for all.
    """
    if not is_main_process():
        yield
        return
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _locked(folder / LOCK)
    except OSError as error:
        raise UserError(f"output: {folder} cannot be written: {error.strerror}") from error
    if handle is None:
        holder = (folder / LOCK).read_text(encoding="utf-8", errors="replace").strip() or "another process"
        raise UserError(f"{folder} is in use by {holder}: wait for it, stop it, or choose another folder")
    try:
        yield
    finally:
        with suppress(OSError):  # a disk that became read-only is told of already
            (folder / LOCK).unlink(missing_ok=True)  # while it is still held: see _locked
            if made and not any(folder.iterdir()):
                folder.rmdir()
        os.close(handle)


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Hold a lock file, made and removed here, after whoever holds it now. A process that dies lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked(path)
    if handle is None:
        say("another process is at work on what this one needs: waiting for it")
    while handle is None:
        time.sleep(LOOK_AGAIN)
        handle = _locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held: see _locked
        os.close(handle)


def _locked(path: Path) -> int | None:
    """An open handle that holds the lock; None where another process does."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as error:
            warn(f"{path.parent} cannot be locked ({error.strerror}): see to it that no other process writes there")
        if _is_still(path, handle):
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return handle
        os.close(handle)  # its last holder removed the file between our opening and locking it


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
