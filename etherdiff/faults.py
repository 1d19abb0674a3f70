"""What the machine does to a run, in words that say what to change."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from etherdiff.config import TrainConfig
from etherdiff.errors import RunError

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
CPU_ALLOCATION = ("can't allocate memory", "could not create a memory object", "std::bad_alloc")  # RuntimeErrors of torch's


@contextmanager
def explained(config: TrainConfig, run: Path) -> Iterator[None]:
    """Turn running out of memory or disk into a RunError that says what would do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunError(out_of_memory(config, run)) from error
    except RuntimeError as error:
        if not any(text in str(error) for text in CPU_ALLOCATION):
            raise
        raise RunError(out_of_memory(config, run)) from error
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = error.filename or run
        raise RunError(
            f"{where} could not be written: {error.strerror}. Every checkpoint written before is whole: "
            f"make room, then go on with: etherdiff resume {run}"
        ) from error


def out_of_memory(config: TrainConfig, run: Path) -> str:
    """What to change, with the options that are not used yet."""
    changes = []
    if config.batch_size > 1:
        parts = config.batch_size * config.gradient_accumulation
        changes.append(f"--batch-size 1 --gradient-accumulation {parts} (the same batch, piece by piece)")
    if not config.gradient_checkpointing:
        changes.append("--gradient-checkpointing")
    if config.mixed_precision == "no":
        changes.append("--mixed-precision bf16")
    if config.method == "full":
        changes.append("an adapter instead of --method full")
    changes.append("a smaller --resolution")
    return (
        f"out of memory. Start again with {', or '.join(changes)}; "
        f"or, if another program took the memory, go on with: etherdiff resume {run}"
    )
