"""Image files in and out: photos as a viewer shows them, contact sheets, PNGs that carry their settings."""

import contextlib
import io
import json
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageFile, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

from etherdiff.system.errors import UserError
from etherdiff.system.files import staged_file

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif",
)  # fmt: skip
"""Suffixes, in lower case, of the files that count as images; HEIC does, for phone photos to be refused aloud."""

# By content, whatever the suffix says: no format that runs a program (EPS) or draws vectors (WMF).
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
_SIGNATURES = (
    rb"\xff\xd8\xff",
    rb"\x89PNG",
    rb"RIFF....WEBP",
    rb"....ftypavif",
    rb"BM",
    rb"GIF8",
    rb"II\*\0",
    rb"MM\0\*",
)
_HEIC_SIGNATURE = rb"....ftyp(hei|hev|mif1|msf1)"
_PAGED_FORMATS = ("MPO", "TIFF")  # further frames are thumbnails or pages: a viewer shows the first

_SETTINGS_CHUNK = "etherdiff"
_WEBUI_FIELDS = {"Steps": "steps", "Sampler": "sampler", "CFG scale": "guidance_scale", "Seed": "seed"}

PADDING = 8
"""Pixels of white around every cell of a contact sheet."""
MIN_CELL = 128
"""Pixels: the side of a contact sheet's cell when its images are smaller than that."""
_COLUMN_LABEL_LINES = 3


class UnreadableImage(ValueError):  # noqa: N818 - reads as what it says of the file
    """An image file that cannot be used as it is: `path`, and in a few words `why`."""

    def __init__(self, path: Path, why: str) -> None:
        self.path = path
        self.why = why
        super().__init__(f"{path}: {why}")


def list_images(folder: Path) -> list[Path]:
    """The image files (by suffix) right inside `folder`, in natural order: 2.jpg before 10.jpg.

    Hidden files and anything but files are left out; a broken link stays, for reading it to be refused aloud.
    """
    found = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    return sorted((path for path in found if path.is_file() or _is_broken_link(path)), key=_natural_order)


def read_image(path: Path) -> Image.Image:
    """The image as a viewer shows it, in mode RGB (8 bits, sRGB).

    EXIF orientation and an embedded ICC profile are applied, transparency is laid on white, 16-bit grey is divided by
    257, float grey is taken as 0..1 (or 0..255 when it goes beyond 1).

    Raises:
        UnreadableImage: missing, empty, truncated, damaged, not an image, animated, or a decompression bomb.
    """
    path = Path(path)
    try:
        _refuse_what_is_no_file(path)
        with _strict_pillow(), _open(path) as image:
            image.load()
            return _to_rgb(_upright(image))
    except _RefusedError as error:
        raise UnreadableImage(path, str(error)) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(path, f"decompression bomb: {_size_text(path)}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(path, _why_unidentified(path)) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise UnreadableImage(path, _why_undecodable(error)) from error


def read_images(
    paths: Iterable[Path], skip_bad: bool = False, on_skip: Callable[[UnreadableImage], None] | None = None
) -> list[Image.Image]:
    """All images by `read_image`, in order.

    Args:
        skip_bad: leave unreadable files out, telling `on_skip` of each, rather than refuse.

    Raises:
        UserError: naming every unreadable file and its reason; or no image is left.
    """
    images: list[Image.Image] = []
    bad: list[UnreadableImage] = []
    for path in paths:
        try:
            images.append(read_image(path))
        except UnreadableImage as error:
            bad.append(error)
    if bad and not skip_bad:
        count = f"{len(bad)} of {len(bad) + len(images)} images cannot be read"
        raise UserError([f"{count}: remove them or pass --skip-bad", *map(str, bad)])
    if not images:
        raise UserError(["no readable image is left", *map(str, bad)])
    if on_skip:
        for skipped in bad:
            on_skip(skipped)
    return images


def resize_and_crop(
    image: Image.Image,
    size: int,
    crop: Literal["center", "random"] = "center",
    position: tuple[float, float] = (0.5, 0.5),
) -> Image.Image:
    """Scale `image` until its shorter side is `size` (Lanczos, antialiased), and cut a size x size window.

    Args:
        crop: "center", or "random": the window at `position`, which the caller draws.
        position: (u, v) in [0, 1]: 0 is the window furthest left / at the top, 1 furthest right / at the bottom.
            Not looked at for "center".

    Raises:
        ValueError: `size`, `crop` or `position` out of range.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if crop not in ("center", "random"):
        raise ValueError(f"crop must be 'center' or 'random', got {crop!r}")
    if not all(0 <= share <= 1 for share in position):
        raise ValueError(f"position must lie in [0, 1] x [0, 1], got {position}")
    u, v = (0.5, 0.5) if crop == "center" else position
    left, right = crop_window(image.width, size / min(image.size), size, u)
    top, bottom = crop_window(image.height, size / min(image.size), size, v)
    # One step: scaling a very long image whole, to cut most of it away, can take gigabytes.
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, right, bottom))


def crop_window(length: int, scale: float, size: int, share: float) -> tuple[float, float]:
    """Start and end, in source pixels, of a window of `size` whole target pixels along one side of the image."""
    scaled = max(size, round(length * scale))
    start = round(share * (scaled - size))
    return start * length / scaled, (start + size) * length / scaled


def to_array(image: Image.Image) -> np.ndarray:
    """An RGB image (H, W) as float32 (3, H, W) in [-1, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1) / 127.5 - 1.0)


def from_array(array: np.ndarray) -> Image.Image:
    """The inverse of `to_array`: (3, H, W) to an RGB image; values beyond [-1, 1] are clipped.

    Raises:
        ValueError: another shape, or NaN in it (which has no colour).
    """
    if array.ndim != 3 or array.shape[0] != 3:
        raise ValueError(f"expected an array of shape (3, H, W), got {array.shape}")
    if np.isnan(array).any():
        raise ValueError("the array holds NaN")
    pixels = (np.clip(array.astype(np.float32), -1.0, 1.0) + 1.0) * 127.5
    return Image.fromarray(np.rint(pixels).astype(np.uint8).transpose(1, 2, 0))


def contact_sheet(
    images: Sequence[Image.Image],
    columns: int,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    cell: int | None = None,
) -> Image.Image:
    """The images, row by row, in a white grid of square cells with `PADDING` around each; labels left and above.

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
    """The settings that `save_png` wrote into `path`.

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


# Reading


class _RefusedError(ValueError):
    """A file that decodes, or would, but is not used; the text is the reason."""


def _is_broken_link(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _natural_order(path: Path) -> tuple[list[str | int], str]:
    pieces = re.split(r"(\d+)", path.name.casefold())  # text and digits take turns, so like compares with like
    return [int(piece) if index % 2 else piece for index, piece in enumerate(pieces)], path.name


def _refuse_what_is_no_file(path: Path) -> None:
    if _is_broken_link(path):
        raise _RefusedError("broken link")
    if not path.exists():
        raise _RefusedError("no such file")
    if not path.is_file():
        raise _RefusedError("not a file")
    if path.stat().st_size == 0:
        raise _RefusedError("zero bytes")


@contextlib.contextmanager
def _strict_pillow() -> Iterator[None]:
    """Truncated files raise, whatever other libraries set globally; warnings stay in: what matters raises."""
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _open(path: Path) -> Image.Image:
    """The opened, not yet decoded file, if it is a still image of a format we take."""
    image = Image.open(path, formats=_formats())
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in _PAGED_FORMATS:
        image.close()
        raise _RefusedError(f"animated: {frames} frames; extract one frame")
    return image


def _size_text(path: Path) -> str:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path, formats=_formats()) as image:  # reads the header only
            return f"{image.width} x {image.height} pixels"
    except Exception:  # what is behind the size that was refused can be damaged in any way
        return "too many pixels"
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _why_unidentified(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the image; run git lfs pull"
    if re.match(_HEIC_SIGNATURE, start, re.DOTALL):
        return "HEIC; convert it to JPEG or PNG"
    if any(re.match(signature, start, re.DOTALL) for signature in _SIGNATURES):
        return "truncated, damaged, or of a kind that Pillow cannot read"
    is_text = not re.search(rb"[\x00-\x08\x0e-\x1f\x80-\xff]", start)
    return "not an image (text?)" if is_text else "not an image"


def _why_undecodable(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "permission denied"
    reason = str(error) or type(error).__name__
    return "truncated" if "truncated" in reason.lower() else f"damaged: {reason}"


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata raises nearly anything; a viewer shows the pixels as stored
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as RGB: 8 bits, sRGB, transparency laid on white."""
    profile = image.info.get("icc_profile")
    image = _to_8_bits(image)
    if not image.has_transparency_data:
        return _to_srgb(image, profile)
    colours = image.getchannel("L") if image.mode == "LA" else image.convert("RGBA").convert("RGB")
    opacity = image.convert("RGBA").getchannel("A")
    white = Image.new("RGB", image.size, "white")
    return Image.composite(_to_srgb(colours, profile), white, opacity)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey as L, or as LA where one grey level is declared transparent."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    white = (1.0 if high <= 1 else 255.0) if image.mode == "F" else 65535.0
    if not 0 <= low <= high <= white:  # also when they are NaN
        raise _RefusedError(f"its values go from {low:g} to {high:g}; rescale it to 8 bits")
    grey = Image.fromarray(np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB, through the embedded profile where it fits the image, else by Pillow's plain conversion."""
    if image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")  # a palette's profile, or a luma coding's, speaks of its RGB
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB")
        if image.mode == "RGB" and _changes_nothing(transform):
            return image
        return ImageCms.applyTransform(image, transform) or image.convert("RGB")
    except (ImageCms.PyCMSError, OSError, ImportError):
        return image.convert("RGB")


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether the profile is sRGB, whatever its name: it moves no colour of a coarse cube by more than rounding."""
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    moved = np.asarray(ImageCms.applyTransform(Image.fromarray(cube), transform))
    return int(np.abs(moved.astype(int) - cube).max()) <= 2


# Labels

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


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


# PNG text


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
