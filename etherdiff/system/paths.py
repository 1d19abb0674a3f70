"""Where things are kept on the user's machine."""

import os
from pathlib import Path

import platformdirs

ASSETS = Path(__file__).parents[1] / "assets"
"""What comes with the package: the tiny models, configurations, tokenizers."""


def cache_dir() -> Path:
    """Return the folder of what can be computed again: latents, class images.

    ETHERDIFF_CACHE names it; else it is in XDG_CACHE_HOME, on any system, or where the system keeps caches.
    """
    if named := os.environ.get("ETHERDIFF_CACHE"):
        return Path(named).expanduser()
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root).expanduser() / "etherdiff"
    return platformdirs.user_cache_path("etherdiff", appauthor=False)


def data_root(named: Path | None) -> Path | None:
    """Return the folder in which subjects and datasets are looked up: the one named, else ETHERDIFF_DATA, else none."""
    if named is not None:
        return named.expanduser()
    from_environment = os.environ.get("ETHERDIFF_DATA")
    return Path(from_environment).expanduser() if from_environment else None
