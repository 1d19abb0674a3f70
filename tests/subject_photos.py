"""A subject's photos for the tests: five, larger than the tiny base draws, and none held out."""

from pathlib import Path

from PIL import Image

from etherdiff.tiny.world import IMAGES, render_subject

SIZE = 256


def draw_subject(folder: Path) -> None:
    """Write the five images of a ball."""
    folder.mkdir(parents=True, exist_ok=True)
    for view in range(IMAGES):
        Image.fromarray(render_subject("candy_ball", view).image).resize((SIZE, SIZE)).save(folder / f"{view:02d}.png")
