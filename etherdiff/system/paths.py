"""Where things are kept on the user's machine."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
"""What comes with the package: the tiny models, configurations, tokenizers."""


def cache_dir() -> Path:
    """What can be computed again: latents, text embeddings, class images. ETHERDIFF_CACHE, else the user's cache folder."""
    named = os.environ.get("ETHERDIFF_CACHE")
    root = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "etherdiff"
    return root.expanduser()


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder of the cache, whole: `make` fills it where it is not there yet."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            make(temporary)
            temporary.rename(folder)  # another process may have won the race; its folder is as good
        except OSError:
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def data_root(named: Path | None) -> Path | None:
    """Where subjects and datasets are looked up: the folder named, else ETHERDIFF_DATA, else nowhere."""
    if named is not None:
        return named.expanduser()
    from_environment = os.environ.get("ETHERDIFF_DATA")
    return Path(from_environment).expanduser() if from_environment else None
