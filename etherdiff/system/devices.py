"""Where to compute, in which precision and with how much memory; what to change where memory or disk runs out."""

import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError

from etherdiff.system.errors import RunError
from etherdiff.system.files import system_error
from etherdiff.system.text import program

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Data type of the frozen model for each --mixed-precision."""


def resolve_device(name: str) -> str:
    """Return the device that is named; for `auto` the first of cuda, mps and cpu that torch can use."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_problem(name: str) -> str | None:
    """Return why this machine cannot compute on a device, and what would work; None if it can."""
    if name == "cuda" and not torch.cuda.is_available():
        return "device: there is no CUDA GPU that torch can use; try --device auto"
    if name == "mps" and not torch.backends.mps.is_available():
        return "device: torch cannot use MPS on this machine; try --device auto"
    if name not in ("auto", "cpu", "cuda", "mps"):
        return f"device: must be auto, cpu, cuda or mps, not {name!r}"
    return None


def peak_memory() -> int:
    """Return the most bytes of main memory that this process has occupied; those it occupies now if the system does not say."""
    try:
        import resource  # Unix only
    except ImportError:
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))  # peak_wset: Windows only
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- Out of memory or disk ------------------------------------------------------------------------------------------


DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
REFUSED = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
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
            f"or, if another program took the memory, go on with: {program('resume', run)}"
        ) from error
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = error.filename or run
        raise RunError(
            f"{where} could not be written: {error.strerror}. Every checkpoint written before is whole: "
            f"make room, then go on with: {program('resume', run)}"
        ) from error


def machine_fault(error: Exception) -> str | None:
    """Return what is said where memory or disk ran out, or the system refused a path; None where something else is wrong."""
    if _is_out_of_memory(error):
        return "out of memory. Free some and start the command again; where it draws images, a smaller --batch-size takes less"
    if isinstance(error, SafetensorError):
        error = system_error(error)
    if isinstance(error, OSError) and error.errno in REFUSED and error.filename:
        return f"{error.filename}: {error.strerror}. Give another place, or change that one, and start the command again"
    if not isinstance(error, OSError) or error.errno not in DISK:
        return None
    return f"{error.filename or 'the disk'}: {error.strerror}. Make room there, or write elsewhere, and start the command again"


def _is_out_of_memory(error: Exception) -> bool:
    in_words = isinstance(error, RuntimeError) and any(text in str(error) for text in CPU_ALLOCATION)
    return in_words or isinstance(error, torch.OutOfMemoryError | MemoryError)
