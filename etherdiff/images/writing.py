"""Write images: PNG files that carry the settings they were made with, and contact sheets."""

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from etherdiff.system.errors import UserError
from etherdiff.system.files import staged_file

# --- PNG with settings ----------------------------------------------------------------------------------------------


_SETTINGS_CHUNK = "etherdiff"
_WEBUI_SAMPLERS: dict[str, dict[str, Any]] = {
    "DPM++ 2M": {"Schedule type": "SGM Uniform", "SGM noise multiplier": True},
    "DDIM": {"Schedule type": "Automatic"},
}
"""Sampler -> the WebUI's settings whose timesteps and first noise are ours."""
_WEBUI_SYNTAX = re.compile(r"[\\()\[\]]")
"""What the WebUI reads as weights of words, unless Emphasis is None."""


def save_png(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Write a PNG with `settings` in it, whole or not at all.

    The text chunk "etherdiff" holds the settings as JSON; "parameters" holds what WebUI shows of a picture, from the
    keys prompt, negative_prompt, adapters, adapter_scale, steps, sampler, guidance_scale, seed and model, where given,
    and the image's size.

    Raises:
        TypeError, ValueError: the settings are not JSON (NaN included).
    """
    path = Path(path)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(_SETTINGS_CHUNK, json.dumps(settings, allow_nan=False))
    _add_unicode(chunks, "parameters", _webui_parameters(settings, image.size))
    with staged_file(path) as staged:
        image.save(staged, format="PNG", pnginfo=chunks)


def read_png_settings(path: Path) -> dict[str, Any]:
    """Read the settings that `save_png` wrote into `path`.

    Raises:
        UserError: no such file, not a PNG, or no settings in it.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            settings = json.loads(image.info[_SETTINGS_CHUNK])
    except KeyError:
        raise UserError(f"{path}: a PNG without etherdiff's settings in it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read settings from it ({error})") from error
    return settings


def is_whole(path: Path) -> bool:
    """Say whether a PNG is there and not cut or damaged."""
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):  # what Pillow raises of a PNG that is cut or damaged
        return False
    return True


def _webui_parameters(settings: dict[str, Any], size: tuple[int, int]) -> str:
    """Return what AUTOMATIC1111's WebUI shows, and draws the same from: prompts, then a line of "Name: value" pairs.

    Adapters stand in the prompt, as <lora:NAME:SCALE>, by the names that `etherdiff export` files have.
    """
    prompt, negative = str(settings.get("prompt") or ""), str(settings.get("negative_prompt") or "")
    scale = settings.get("adapter_scale", 1)
    adapters = [f"<lora:{_adapter_name(str(place))}:{scale:g}>" for place in settings.get("adapters") or ()]
    lines = [" ".join(filter(None, [prompt, *adapters]))]
    if negative:
        lines.append(f"Negative prompt: {negative}")
    sampler, has_noise = _WEBUI_SAMPLERS.get(settings.get("sampler", ""), {}), settings.get("seed") is not None
    values = {
        "Steps": settings.get("steps"),
        "Sampler": settings.get("sampler"),
        "Schedule type": sampler.get("Schedule type"),
        "CFG scale": settings.get("guidance_scale"),
        "Seed": settings.get("seed"),
        "Size": f"{size[0]}x{size[1]}",
        "Model": settings.get("model") or None,
        "RNG": "CPU" if has_noise else None,  # noise is drawn there whatever the device
        "SGM noise multiplier": sampler.get("SGM noise multiplier"),
        "Emphasis": "None" if sampler and _WEBUI_SYNTAX.search(prompt + negative) else None,
    }
    lines.append(", ".join(f"{name}: {_webui_quoted(str(value))}" for name, value in values.items() if value is not None))
    return "\n".join(lines)


def _adapter_name(place: str) -> str:
    """Return the name of a LoRA file, or of the run whose folder holds an adapter."""
    path = Path(place)
    return path.stem if path.suffix == ".safetensors" else (path.parent.name if path.name == "adapter" else "") or path.name


def _webui_quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


def _add_unicode(chunks: PngImagePlugin.PngInfo, key: str, text: str) -> None:
    """tEXt where Latin-1 does, else iTXt in UTF-8; half a surrogate pair, which neither has, becomes "?"."""
    chunks.add_text(key, text.encode("utf-8", "replace").decode())


# --- Contact sheets: images in a labelled grid ----------------------------------------------------------------------


PADDING = 8
"""White around each cell of a contact sheet, in pixels."""
MIN_CELL = 128
"""Least side of a cell of a contact sheet, in pixels, unless it is given."""
_COLUMN_LABEL_LINES = 3
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(
    images: Sequence[Image.Image],
    columns: int,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    cell: int | None = None,
) -> Image.Image:
    """Draw the images, row by row, in a white grid of square cells with `PADDING` around each; labels left and above.

    Images are scaled to fit their cell and centred in it. Labels are wrapped, and cut with an ellipsis, to their own
    margin. The grid ends at the right and lower edge of the sheet.

    Args:
        cell: the side of a cell in pixels; None: the longest side of the images, at least `MIN_CELL`.

    Raises:
        ValueError: no images, no columns, an empty cell, or labels that are not one per row / column.
    """
    if not images or columns < 1 or (cell is not None and cell < 1):
        raise ValueError("a contact sheet needs at least one image, one column and one pixel per cell")
    rows = -(-len(images) // columns)
    for labels, count, kind in ((row_labels, rows, "row"), (column_labels, columns, "column")):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{len(labels)} {kind} labels for {count} {kind}s")
    cell = cell or max(MIN_CELL, *(max(image.size) for image in images))
    font = ImageFont.load_default(max(12.0, cell / 14))
    row_texts = [_wrap(label, font, cell, _lines_in(cell, font)) for label in row_labels or []]
    column_texts = [_wrap(label, font, cell, _COLUMN_LABEL_LINES) for label in column_labels or []]
    margin_x = max((_text_size(text, font)[0] + PADDING for text in row_texts), default=0)
    margin_y = max((_text_size(text, font)[1] + PADDING for text in column_texts), default=0)

    def corner(row: int, column: int) -> tuple[int, int]:
        step = cell + PADDING
        return margin_x + PADDING + column * step, margin_y + PADDING + row * step

    sheet = Image.new("RGB", corner(rows, columns), "white")
    for index, image in enumerate(images):
        fitted = ImageOps.contain(image.convert("RGB"), (cell, cell), Image.Resampling.LANCZOS)
        x, y = corner(*divmod(index, columns))
        sheet.paste(fitted, (x + (cell - fitted.width) // 2, y + (cell - fitted.height) // 2))
    for row, text in enumerate(row_texts):
        tile = _text_tile(text, font, (margin_x - PADDING, cell), "lm")
        sheet.paste(tile, (PADDING, corner(row, 0)[1]))
    for column, text in enumerate(column_texts):
        tile = _text_tile(text, font, (cell, margin_y - PADDING), "ms")
        sheet.paste(tile, (corner(0, column)[0], PADDING))
    return sheet


def _line_height(font: _Font) -> int:
    return int(font.getbbox("Ágj")[3]) + 2


def _lines_in(height: int, font: _Font) -> int:
    return max(1, height // _line_height(font))


def _wrap(text: str, font: _Font, width: int, max_lines: int) -> list[str]:
    """`text` in lines no wider than `width` pixels, at most `max_lines`; what does not fit becomes an ellipsis."""
    lines = [""]
    for word in text.encode("utf-8", "replace").decode().split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], f"{lines[max_lines - 1]} {lines[max_lines]}"]
    return [_shorten(line, font, width) for line in lines]


def _shorten(line: str, font: _Font, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    kept = bisect_right(range(len(line)), width, key=lambda end: ceil(font.getlength(line[:end] + "…"))) - 1
    return line[: max(kept, 0)].rstrip() + "…"


def _text_size(lines: list[str], font: _Font) -> tuple[int, int]:
    return int(max(font.getlength(line) for line in lines)) + 1, len(lines) * _line_height(font)


def _text_tile(lines: list[str], font: _Font, size: tuple[int, int], anchor: str) -> Image.Image:
    """A white tile of `size` with the lines in it; what overhangs is clipped, so that no label reaches an image."""
    tile = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(tile)
    height = _text_size(lines, font)[1]
    centred, at_bottom = anchor[0] == "m", anchor[1] == "s"
    top = size[1] - height if at_bottom else (size[1] - height) // 2
    for index, line in enumerate(lines):
        left = (size[0] - font.getlength(line)) / 2 if centred else 0
        draw.text((left, top + index * _line_height(font)), line, fill="black", font=font)
    return tile
