"""A subject for `etherdiff demo`: five drawings of one striped ball, so that the demo needs no photos."""

from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 256
SCENES = (  # sky, ground, ball's left and top edge, its size
    ("#9fd0ff", "#5b8f3a", 60, 90, 120),
    ("#f7c59f", "#b08968", 100, 70, 110),
    ("#22304a", "#3c4f3f", 30, 110, 100),
    ("#dfe7ee", "#e8e2d0", 90, 100, 130),
    ("#b8e0d2", "#7f5539", 120, 60, 90),
)


def draw_subject(folder: Path) -> None:
    """Write the five images."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(SCENES):
        _draw(*scene).save(folder / f"{index:02d}.png")


def _draw(sky: str, ground: str, left: int, top: int, size: int) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), sky)
    ImageDraw.Draw(image).rectangle((0, 150, SIZE, SIZE), fill=ground)
    stripes = Image.new("RGB", (size, size), "#ff5fa2")
    pen = ImageDraw.Draw(stripes)
    for x in range(0, size, size // 5):
        pen.rectangle((x, 0, x + size // 10, size), fill="#33d6e0")
    ball = Image.new("L", (size, size), 0)
    ImageDraw.Draw(ball).ellipse((0, 0, size - 1, size - 1), fill=255)
    image.paste(stripes, (left, top), ball)
    return image
