"""Say what to change where the machine runs out of memory or disk."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from etherdiff.system.errors import RunError
from etherdiff.system.files import system_error

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
CPU_ALLOCATION = ("can't allocate memory", "could not create a memory object", "std::bad_alloc")  # RuntimeErrors of torch's


@contextmanager
def explained(run: Path, ways_to_save_memory: Sequence[str]) -> Iterator[None]:
    """Turn running out of memory or disk into a RunError that says what would help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise RunError(
            f"out of memory. Start again with {', or '.join(ways_to_save_memory)}; "
            f"or, if another program took the memory, go on with: etherdiff resume {run}"
        ) from error
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = error.filename or run
        raise RunError(
            f"{where} could not be written: {error.strerror}. Every checkpoint written before is whole: "
            f"make room, then go on with: etherdiff resume {run}"
        ) from error


def machine_fault(error: Exception) -> str | None:
    """Return what a command other than training says where memory or disk ran out; None where something else is wrong."""
    if _is_out_of_memory(error):
        return "out of memory. Free some and start the command again; where it draws images, a smaller --batch-size takes less"
    if isinstance(error, SafetensorError):
        error = system_error(error)
    if not isinstance(error, OSError) or error.errno not in DISK:
        return None
    return f"{error.filename or 'the disk'}: {error.strerror}. Make room there, or write elsewhere, and start the command again"


def _is_out_of_memory(error: Exception) -> bool:
    in_words = isinstance(error, RuntimeError) and any(text in str(error) for text in CPU_ALLOCATION)
    return in_words or isinstance(error, torch.OutOfMemoryError | MemoryError)
