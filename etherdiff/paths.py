"""Where things are kept on the user's machine."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """What can be computed again: latents, text embeddings, class images. ETHERDIFF_CACHE, else the user's cache folder."""
    named = os.environ.get("ETHERDIFF_CACHE")
    root = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "etherdiff"
    return root.expanduser()


def data_root(named: Path | None) -> Path | None:
    """Where subjects and datasets are looked up: the folder named, else ETHERDIFF_DATA, else nowhere."""
    if named is not None:
        return named.expanduser()
    from_environment = os.environ.get("ETHERDIFF_DATA")
    return Path(from_environment).expanduser() if from_environment else None
