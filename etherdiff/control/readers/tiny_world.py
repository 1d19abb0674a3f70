"""Scenes of the tiny world, rendered once into the cache in the imagefolder style."""

import json
from pathlib import Path

from PIL import Image

from etherdiff.control.readers import Listing
from etherdiff.control.readers.imagefolder import METADATA, read_imagefolder
from etherdiff.system.files import cache_dir, make_once
from etherdiff.system.terminal import track
from etherdiff.tiny.world import render_scene

VERSION = 1  # of what is rendered here; a new version is rendered into a folder of its own
TRAINING = 6000
EVALUATED = 400


def read_tiny_world(evaluation: str, training_scenes: int = TRAINING, evaluated_scenes: int = EVALUATED) -> Listing:
    """List scenes of the split train, and of `evaluation` (test or validation) to judge by; captions name one thing."""
    training = read_imagefolder(scenes_folder("train", training_scenes)).training
    evaluated = read_imagefolder(scenes_folder(evaluation, evaluated_scenes)).training
    return Listing(training, evaluated)


def scenes_folder(split: str, count: int) -> Path:
    """Return the first `count` scenes of a split; under train/, images, label maps and metadata.jsonl."""
    folder = cache_dir() / f"tiny-scenes-{VERSION}" / f"{split}-{count}"
    return make_once(folder, lambda new: _render(split, count, new / "train"))


def _render(split: str, count: int, folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    (folder / "controls").mkdir()
    lines = []
    for index in track(range(count), f"scenes of the tiny world ({split})"):
        scene, name = render_scene(split, index), f"{index:05d}.png"
        Image.fromarray(scene.image).save(folder / "images" / name)
        Image.fromarray(scene.segmentation).save(folder / "controls" / name)
        lines.append(json.dumps({"image": f"images/{name}", "control": f"controls/{name}", "text": scene.short_caption}))
    (folder / METADATA).write_text("\n".join(lines) + "\n", encoding="utf-8")
