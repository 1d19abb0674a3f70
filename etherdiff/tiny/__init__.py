"""The tiny world (`world.py`), and `--base tiny`: a Stable Diffusion small enough to run anywhere.

The world's autoencoder, tokenizer and DINO are trained (`assets/tiny`); the base's UNet is not yet, so it draws noise.
"""

from pathlib import Path

RANDOM_WEIGHTS_NOTICE = "The tiny base has random weights: its pictures are noise, and only show that every step works."


def tiny_folder() -> Path:
    """The tiny pipeline's folder, built in the cache on first use (2 s); the same bytes on every machine and call."""
    from etherdiff.tiny.pipeline import random_folder  # torch and all

    return random_folder()
