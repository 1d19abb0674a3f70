"""Where to compute, in which precision, and how much memory it took."""

import sys

import psutil
import torch

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
