"""The tiny world (`world.py`), and `--base tiny`: a Stable Diffusion trained on it, small enough to run anywhere."""

from pathlib import Path

from etherdiff.system.files import ASSETS


def tiny_folder() -> Path:
    """Return the tiny pipeline's folder, which comes with the package."""
    return ASSETS / "tiny" / "sd"
