"""PEFT's BOFT without its complaints about a CUDA extension that it can do without."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_boft() -> Iterator[None]:
    """PEFT's BOFT tries to compile a CUDA extension for every layer and warns each time that it fails.

    The compiler's output goes to stderr, as stdout may be read as JSON.
    """
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.filterwarnings("ignore", message="Failed to load the CUDA extension")
            # said even where one factor is what was asked for
            warnings.filterwarnings("ignore", message="Setting boft_n_butterfly_factor to 1")
            yield
    finally:
        logger.setLevel(level)
