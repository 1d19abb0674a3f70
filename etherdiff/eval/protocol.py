"""The images that a run is judged by: which prompts and seeds, where they lie, and drawing those that are missing.

    eval/settings.json                  what the images were made with
    eval/images/NNN-prompt/SEED.png     the run's
    eval/base_images/NNN-prompt/SEED.png   the base's, of the same prompts without the identifier

An image is a function of its seed, but its last bits also depend on what is computed in the same batch. So batches are fixed
by the protocol, and one with a missing image is drawn whole: a generation that was killed ends with the same bytes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from PIL import Image

from etherdiff.eval.scores import PromptImages
from etherdiff.families.sampling import PAPER_SAMPLING, chunks, sample, slug
from etherdiff.images.png import save_png
from etherdiff.runs.identity import named_differences
from etherdiff.system.files import write_json
from etherdiff.system.terminal import track
from etherdiff.tasks.subjects import EvalPrompt

IMAGES, BASE_IMAGES = "images", "base_images"
ROUNDING = "computed_with"
"""The part of a set's settings that changes images by rounding only: device, batch size, versions of libraries."""


@dataclass(frozen=True)
class Protocol:
    """What is drawn, for the run and for its base."""

    prompts: tuple[EvalPrompt, ...]
    seeds: tuple[int, ...]
    """Of every prompt, an image each."""
    resolution: int
    """Side in pixels."""
    steps: int = 25
    guidance_scale: float = 7.5
    batch_size: int = 4

    def settings(self) -> dict[str, Any]:
        """What decides the images, rounding aside."""
        return {
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "seeds": list(self.seeds),
            **self.generation(),
        }

    def generation(self) -> dict[str, Any]:
        """How an image comes from its prompt and seed."""
        return {
            "sampler": PAPER_SAMPLING["sampler"],
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "resolution": self.resolution,
        }


@dataclass(frozen=True)
class Batch:
    """Images of one prompt that are drawn together, always."""

    text: str
    images: dict[int, Path]
    """Seed -> where the image belongs."""

    def missing(self) -> list[int]:
        """The seeds whose image is not there whole."""
        return [seed for seed, path in self.images.items() if not is_whole(path)]


def batches(protocol: Protocol, folder: Path, plain: bool) -> list[Batch]:
    """All that the protocol draws into a folder, from the prompts with the identifier or from the plain ones."""
    found = []
    for number, prompt in enumerate(protocol.prompts):
        text = prompt.plain if plain else prompt.text
        place = folder / f"{number:03d}-{slug(text)}"
        for seeds in chunks(protocol.seeds, protocol.batch_size):
            found.append(Batch(text, {seed: place / f"{seed}.png" for seed in seeds}))
    return found


def draw(
    pipeline: StableDiffusionPipeline, unfinished: Sequence[Batch], protocol: Protocol, facts: Mapping[str, Any], title: str
) -> None:
    """Draw what is missing of each batch; `facts` go into every PNG beside its prompt, seed and sampler."""
    for batch in track(unfinished, title):
        wanted = batch.missing()
        images = sample(pipeline, batch.text, list(batch.images), protocol.resolution, protocol.steps, protocol.guidance_scale)
        for (seed, path), image in zip(batch.images.items(), images, strict=True):
            if seed not in wanted:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(image, path, {"prompt": batch.text, "seed": seed, **protocol.generation(), **facts})


def found_images(protocol: Protocol, folder: Path, plain: bool) -> list[PromptImages]:
    """The images of each prompt that are there, to be scored; texts are in both forms whatever they were drawn from."""
    found = []
    every = batches(protocol, folder, plain)
    per_prompt = len(every) // len(protocol.prompts)
    for prompt, parts in zip(protocol.prompts, chunks(every, per_prompt), strict=True):
        images = {seed: path for part in parts for seed, path in part.images.items() if path.is_file()}
        found.append(PromptImages(prompt.text, tuple(images.values()), tuple(images), prompt.plain, wanted=len(protocol.seeds)))
    return found


def read_sets(folder: Path) -> dict[str, Any]:
    """What the sets of images in an eval folder were made with: name of the set -> settings. Empty where nothing is told."""
    try:
        content = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_set(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Record what a set of images is made with, before its first image."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", read_sets(folder) | {name: settings})


def why_not_these(folder: Path, name: str, wanted: Mapping[str, Any], complete: bool) -> list[str]:
    """Why images that are there already cannot be taken for those wanted; empty where they can, or where there are none.

    complete: whether none is missing. Then it does not matter where the rounding came from; else it must stay the same.
    """
    if not any((folder / name).glob("*/*.png")):
        return []
    recorded = read_sets(folder).get(name)
    if recorded is None:
        return [f"{folder / name} holds images, and nothing says how they were made: pass --overwrite to draw them anew"]
    ignored = (ROUNDING,) if complete else ()
    found = named_differences(recorded, wanted, ignored)
    if not found:
        return []
    return [f"{folder / name} holds images made with other settings ({'; '.join(found)}): pass --overwrite to draw them anew"]


def is_whole(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):  # what Pillow raises of a PNG that is cut or damaged
        return False
    return True
