"""PNG files that carry the settings they were made with."""

import json
import re
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from etherdiff.system.errors import UserError
from etherdiff.system.files import staged_file

_SETTINGS_CHUNK = "etherdiff"
_WEBUI_FIELDS = {"Steps": "steps", "Sampler": "sampler", "CFG scale": "guidance_scale", "Seed": "seed"}


def save_png(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Write a PNG with `settings` in it, whole or not at all.

    The text chunk "etherdiff" holds the settings as JSON; "parameters" holds what WebUI shows of a picture, from the
    keys prompt, negative_prompt, steps, sampler, guidance_scale, seed and model, where given, and the image's size.

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


def _webui_parameters(settings: dict[str, Any], size: tuple[int, int]) -> str:
    """The "parameters" text of AUTOMATIC1111's WebUI: prompt, negative prompt, one line of "Name: value" pairs."""
    lines = [str(settings.get("prompt") or "")]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    values = {name: settings[key] for name, key in _WEBUI_FIELDS.items() if settings.get(key) is not None}
    values["Size"] = f"{size[0]}x{size[1]}"
    if settings.get("model"):
        values["Model"] = settings["model"]
    lines.append(", ".join(f"{name}: {_webui_quoted(str(value))}" for name, value in values.items()))
    return "\n".join(lines)


def _webui_quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


def _add_unicode(chunks: PngImagePlugin.PngInfo, key: str, text: str) -> None:
    """tEXt where Latin-1 does, else iTXt in UTF-8; half a surrogate pair, which neither has, becomes "?"."""
    chunks.add_text(key, text.encode("utf-8", "replace").decode())
