"""Draw images of prompts and seeds, each a function of its own seed; save them and put them on sheets."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from etherdiff.images.writing import contact_sheet
from etherdiff.system.errors import RunError

T = TypeVar("T")
PAPER_SAMPLING: dict[str, Any] = {"sampler": "DPM++ 2M", "steps": 25, "guidance_scale": 7.5}
"""How the paper draws subject images (its design follows DreamBooth's): see `make_pipeline` for the scheduler."""

S2I_SAMPLING: dict[str, Any] = {"sampler": "DDIM", "steps": 50, "guidance_scale": 9.0}
"""How the paper draws from control: see `make_s2i_pipeline`."""


def sample(
    pipeline: StableDiffusionPipeline,
    prompt: str | Sequence[str] | None,
    seeds: Sequence[int],
    resolution: int,
    steps: int = PAPER_SAMPLING["steps"],
    guidance_scale: float = PAPER_SAMPLING["guidance_scale"],
    **more: Any,
) -> list[Image.Image]:
    """Draw an image per seed, in one batch. An image's noise comes from its own seed, drawn on the CPU whatever the device.

    prompt: one for all seeds, or one for each; None where `more` holds embeddings of them. `more` goes to the pipeline:
    embeddings, a negative prompt, or control images (see `StableDiffusionS2IPipeline`).

    Raises:
        RunError: an image that is not finite, which would be saved as a black one.
    """
    prompts = 1 if isinstance(prompt, str) else len(more["prompt_embeds"] if prompt is None else prompt)
    drawn = pipeline(
        prompt,
        height=resolution,
        width=resolution,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        num_images_per_prompt=len(seeds) // prompts,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
        **more,
    ).images
    if not np.isfinite(drawn).all():
        seed = next(seed for seed, pixels in zip(seeds, drawn, strict=True) if not np.isfinite(pixels).all())
        raise RunError(
            f"the image of seed {seed} came out as NaN or infinite, and is not saved: the weights or the settings drive the "
            "UNet too far. Try a guidance scale or an adapter's scale nearer to 1, or other steps"
        )
    return VaeImageProcessor.numpy_to_pil(drawn)


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Split the items, in order, into parts of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def sheet(rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]) -> Image.Image:
    """Draw a contact sheet of rows of images, which have the same length, with labels."""
    flat = [image for row in rows for image in row]
    return contact_sheet(flat, len(rows[0]), list(row_labels), list(column_labels))


def slug(text: str, length: int = 40) -> str:
    """Return a prompt as part of a file name: ASCII letters and digits only, never empty."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text).split()
    return "-".join(words)[:length].strip("-") or "prompt"
