"""The tiny subjects as DreamBooth wants them: a folder of five images to learn from, others to judge by, and 25 prompts."""

from pathlib import Path

from PIL import Image

from etherdiff.system.files import cache_dir, make_once
from etherdiff.tiny.world import render_subject

IMAGES = 5
HELD_OUT = 16
VERSION = 1  # of what is rendered here; a new version is rendered into a folder of its own

PROMPTS = (
    "a {identifier} {class_noun} on grass",
    "a {identifier} {class_noun} on sand",
    "a {identifier} {class_noun} in the snow",
    "a {identifier} {class_noun} floating on water",
    "a {identifier} {class_noun} on a brick floor",
    "a {identifier} {class_noun} on a wooden floor",
    "a {identifier} {class_noun} under a clear sky",
    "a {identifier} {class_noun} on a cloudy day",
    "a {identifier} {class_noun} at night",
    "a {identifier} {class_noun} at sunset",
    "a {identifier} {class_noun} in the rain",
    "a {identifier} {class_noun} on sand at night",
    "a {identifier} {class_noun} in the snow at sunset",
    "a {identifier} {class_noun} on a wooden floor on a cloudy day",
    "a {identifier} {class_noun} floating on water in the rain",
    "a {identifier} {class_noun} on grass at sunset",
    "a {identifier} {class_noun} on a brick floor at night",
    "a {identifier} {class_noun} next to a green star",
    "a {identifier} {class_noun} and a purple heart in the snow",
    "a {identifier} {class_noun} beside a white mug on grass",
    "a {identifier} {class_noun} and a black house at sunset",
    "a red {identifier} {class_noun}",
    "a purple {identifier} {class_noun}",
    "a dotted {identifier} {class_noun}",
    "a black outlined {identifier} {class_noun}",
)
"""25 prompts in the manner of DreamBooth's, of what the tiny base knows: grounds, skies, company, properties."""


def subject_folder(name: str) -> Path:
    """Return the subject's images, rendered in the cache on first use: 00.png to 04.png, and held_out/00.png to 15.png."""
    return make_once(cache_dir() / f"tiny-subjects-{VERSION}" / name, lambda folder: render_folder(name, folder))


def render_folder(name: str, folder: Path) -> None:
    """Write a subject's images to learn from and, in held_out/, those to judge by.

    Raises:
        KeyError: no such subject.
    """
    for held_out, count, target in ((False, IMAGES, folder), (True, HELD_OUT, folder / "held_out")):
        target.mkdir(parents=True, exist_ok=True)
        for view in range(count):
            Image.fromarray(render_subject(name, view, held_out).image).save(target / f"{view:02d}.png")
