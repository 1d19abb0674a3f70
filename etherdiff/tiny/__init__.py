"""`--base tiny`: a Stable Diffusion small enough to run anywhere. For now its weights are random: it draws noise."""

from etherdiff.tiny.pipeline import RANDOM_WEIGHTS_NOTICE, tiny_folder

__all__ = ["RANDOM_WEIGHTS_NOTICE", "tiny_folder"]
