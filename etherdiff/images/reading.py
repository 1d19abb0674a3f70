"""Read photos as a viewer shows them: upright, in sRGB, on white; refuse what cannot be used, with the reason; cut them."""

import contextlib
import hashlib
import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, JpegImagePlugin, UnidentifiedImageError

from etherdiff.system.errors import UserError
from etherdiff.system.terminal import warn
from etherdiff.system.text import counted, listed

T = TypeVar("T")

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif",
)  # fmt: skip
"""Suffixes, in lower case, of image files. HEIC is among them so that phone photos are refused with a reason."""

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
_WHITES = (255, 1023, 4095, 16383, 65535)  # of 8, 10, 12, 14 and 16 bits
_DARK = 16  # of 255
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_BITS, _PHOTOMETRIC, _MAX_SAMPLE = 258, 262, 281  # TIFF tags
_SYSTEM_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "__macosx", "$recycle.bin"}


class UnreadableImage(UserError, ValueError):  # noqa: N818 - reads as what it says of the file
    """An image file that cannot be used as it is: `path`, and in a few words `why`."""

    def __init__(self, path: Path, why: str) -> None:
        self.path = path
        self.why = why
        super().__init__(f"{path}: {why}")


@dataclass(frozen=True)
class Photos:
    """Image files that can be read. Their pixels are not kept: photos take 36 MB each, and are needed one at a time."""

    paths: tuple[Path, ...]
    digests: tuple[str, ...]
    """Digest of each image's pixels."""
    digest: str
    """Digest of all pixels: what the images show, whatever their files are called."""


def list_images(folder: Path) -> list[Path]:
    """Return the image files (by suffix) directly in `folder`, in natural order: 2.jpg before 10.jpg.

    Hidden files and folders are left out. A broken link stays, so that reading it gives the reason.
    """
    found = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path)]
    return sorted((path for path in found if path.is_file() or _is_broken_link(path)), key=_natural_order)


def is_hidden(path: Path) -> bool:
    """Whether a system keeps this for itself: .DS_Store, ._photo.jpg, Thumbs.db, desktop.ini, and other hidden files."""
    return path.name.startswith(".") or path.name.casefold() in _SYSTEM_NAMES


def describe_left_out(folder: Path, used: Iterable[str] = (), suffixes: Sequence[str] = IMAGE_SUFFIXES) -> str:
    """Say what `list_images` leaves out of a folder: "1 .DNG file, 1 folder with 4 images". Empty if that is nothing.

    Args:
        used: names of what is used for something else.
        suffixes: of the files that are read, where they are no images.
    """
    stems = {path.stem for path in folder.iterdir() if path.suffix.lower() in suffixes}
    others = [path for path in folder.iterdir() if path.suffix.lower() not in suffixes or path.is_dir()]
    others = [path for path in others if path.name not in used and not (path.is_dir() and not count_images(path))]
    captions = [path for path in others if path.suffix.lower() in (".txt", ".caption") and path.stem in stems]
    found = [describe_files([path for path in others if path not in captions])]
    found.append(f"{counted(len(captions), 'caption')} beside images" if captions else "")
    return ", ".join(filter(None, found))


def describe_files(paths: Iterable[Path]) -> str:
    """Count files by suffix, and folders with the images in them: "2 .txt files, 1 folder with 4 images"."""
    seen = [path for path in paths if not is_hidden(path)]
    folders = [path for path in seen if path.is_dir()]
    suffixes = Counter(path.suffix for path in seen if path not in folders)
    named = [counted(count, f"{suffix} file") for suffix, count in sorted(suffixes.items()) if suffix]
    if count := suffixes[""]:
        named.append(f"{counted(count, 'file')} without suffix")
    if folders:
        images = sum(map(count_images, folders))
        named.append(counted(len(folders), "folder") + (f" with {counted(images, 'image')}" if images else ""))
    return ", ".join(named)


def count_images(folder: Path) -> int:
    """Count the image files in `folder` and below."""
    return sum(1 for _ in walk_images(folder))


def walk_images(folder: Path) -> Iterator[Path]:
    """Yield the image files (by suffix) in `folder` and below; hidden ones are left out."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(Path(name))]
        found = (Path(place, name) for name in files)
        yield from (path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path))


def read_image(path: Path) -> Image.Image:
    """Return the image as a viewer shows it, in mode RGB (8 bits, sRGB).

    EXIF orientation and an embedded ICC profile are applied, and transparency is laid on white. Grey of more than 8 bits
    is scaled where it is clear which value is white. JPEGs too large for Pillow are read at half their size.

    Raises:
        UnreadableImage: missing, empty, truncated, damaged, not an image, animated, too large, or grey of an unclear range.
    """
    path = Path(path)
    try:
        _refuse_what_is_no_file(path)
        with _strict_pillow():
            return despite_text(_decode, path)
    except _RefusedError as error:
        raise UnreadableImage(path, str(error)) from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(path, _why_unidentified(path)) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise UnreadableImage(path, _why_undecodable(error)) from error


def despite_text(read: Callable[[Path | io.BytesIO], T], path: Path) -> T:
    """Read an image file; of a PNG that cannot be read as it is, all but the text, of which Pillow takes a megabyte."""
    try:
        return read(path)
    except (_RefusedError, FileNotFoundError, PermissionError):
        raise
    except Exception:  # Pillow's decoders raise nearly anything
        content = path.read_bytes()
        pixels = without_text(content)
        if len(pixels) == len(content):
            raise
        return read(io.BytesIO(pixels))


def without_text(content: bytes) -> bytes:
    """Return a PNG file's content without its text; that of any other file as it is."""
    if not content.startswith(_PNG_SIGNATURE):
        return content
    kept, start = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while start < len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        if content[start + 4 : start + 8] not in _PNG_TEXT:
            kept.append(content[start:end])
        start = end
    return b"".join(kept)


def read_photos(paths: Iterable[Path], skip_bad: bool = False) -> Photos:
    """Read all images by `read_image`, one at a time; warn of those that come out nearly black.

    Args:
        skip_bad: leave unreadable files out, with a warning, instead of raising.

    Raises:
        UserError: naming every unreadable file and its reason; or no image is left.
    """
    found: list[Path] = []
    digests: list[str] = []
    black: list[Path] = []
    bad: list[UnreadableImage] = []
    total = hashlib.sha256()
    for path in paths:
        try:
            image = read_image(path)
        except UnreadableImage as error:
            bad.append(error)
            continue
        if is_nearly_black(image):
            black.append(path)
        found.append(path)
        content = _content(image)
        digests.append(hashlib.sha256(content).hexdigest())
        total.update(content)
    if bad and not skip_bad:
        count = f"{len(bad)} of {len(bad) + len(found)} images cannot be read"
        raise UserError([f"{count}: remove them or pass --skip-bad", *map(str, bad)])
    if not found:
        raise UserError(["no readable image is left", *map(str, bad)])
    for skipped in bad:
        warn(f"left out: {skipped}")
    if black:
        names = listed(list(map(str, black)))
        warn(f"nearly black as read here: {names}. If a viewer shows more, save what it shows with 8 bits")
    return Photos(tuple(found), tuple(digests), total.hexdigest())


def pixels_digest(image: Image.Image) -> str:
    """Return a digest of what an image shows."""
    return hashlib.sha256(_content(image)).hexdigest()


def is_nearly_black(image: Image.Image) -> bool:
    """Whether in each channel of an RGB image all pixels but one in a thousand are below 16 of 255."""
    levels = image.histogram()
    bright = max(sum(levels[256 * channel + _DARK : 256 * (channel + 1)]) for channel in range(3))
    return bright <= image.width * image.height / 1000


def _content(image: Image.Image) -> bytes:
    return repr(image.size).encode() + image.tobytes()


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


def _decode(file: Path | io.BytesIO) -> Image.Image:
    with _open(file) as image:
        image.load()
        return _to_rgb(_upright(image), _declared_white(image), _is_negative(image))


def _open(file: Path | io.BytesIO) -> Image.Image:
    """Return the opened, not yet decoded file, if it is a still image of a format we take and small enough."""
    try:
        image = Image.open(file, formats=_formats())
    except Image.DecompressionBombError as error:
        (pixels,) = re.findall(r"\((\d+) pixels\)", str(error))
        return _open_shrunk(file, int(pixels))
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in _PAGED_FORMATS:
        image.close()
        raise _RefusedError(f"animated: {frames} frames; extract one frame")
    return image


def _open_shrunk(file: Path | io.BytesIO, pixels: int) -> Image.Image:
    """Return a JPEG too large for Pillow, of at most twice as many pixels, to be decoded at half its size."""
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    with contextlib.suppress(SyntaxError):  # another format, which would have to be decoded whole
        image = JpegImagePlugin.JpegImageFile(file)  # does not look at the number of pixels
        limit *= 2
        if pixels <= limit:
            image.draft(None, (image.width // 2, image.height // 2))
            return image
        image.close()
    raise _RefusedError(f"too large: {pixels:,} pixels, and {limit:,} can be read; scale it down")


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


def _declared_white(image: Image.Image) -> float | None:
    """Return the value of white where the file of a grey image of more than 8 bits says it."""
    if image.format == "PNG":
        return 65535  # its standard has samples of fewer bits scaled up
    if image.format != "TIFF" or image.mode == "F":
        return None
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits = tags.get(_BITS, (16,))[0]
    return tags[_MAX_SAMPLE][0] if _MAX_SAMPLE in tags else 2**bits - 1 if bits < 16 else None


def _is_negative(image: Image.Image) -> bool:
    """Whether 0 is white in a grey TIFF of more than 8 bits; Pillow has turned around those of fewer."""
    return image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0  # type: ignore[attr-defined]


def _to_rgb(image: Image.Image, white: float | None, negative: bool) -> Image.Image:
    """Any of Pillow's modes as RGB: 8 bits, sRGB, transparency laid on white."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image, white, negative)
    if not image.has_transparency_data:
        return _to_srgb(image, profile)
    colours = image.getchannel("L") if image.mode == "LA" else image.convert("RGBA").convert("RGB")
    opacity = image.convert("RGBA").getchannel("A")
    ground = Image.new("RGB", image.size, "white")
    return Image.composite(_to_srgb(colours, profile), ground, opacity)


def _to_8_bits(image: Image.Image, white: float | None, negative: bool) -> Image.Image:
    """16-bit, 32-bit and float grey as L, or as LA where one grey level is declared transparent."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    white = white or _clear_white(image.mode, high)
    if white is None or not 0 <= low <= high <= white:  # also when they are NaN
        raise _RefusedError(f"its values go from {low:g} to {high:g}, and which is white is not clear; rescale it to 8 bits")
    levels = np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8)
    grey = Image.fromarray(255 - levels if negative else levels)
    clear = image.info.get("transparency")
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _clear_white(mode: str, high: float) -> float | None:
    """Return the value of white, if the brightest value `high` makes it clear.

    Half of white is bright enough for floats. Integers of 16 bits may hold fewer: their white is met exactly, or is 65535.
    """
    if mode == "F":
        return 1 if high <= 1 else 255 if high > 127 else None
    return high if high in _WHITES else 65535 if high == 0 or high > _WHITES[-2] else None


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


# --- Squares and arrays ---------------------------------------------------------------------------------------------


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
    """Return start and end, in source pixels, of a window of `size` whole target pixels along one side of the image."""
    scaled = max(size, round(length * scale))
    start = round(share * (scaled - size))
    return start * length / scaled, (start + size) * length / scaled


def to_array(image: Image.Image) -> np.ndarray:
    """Convert an RGB image (H, W) to float32 (3, H, W) in [-1, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1) / 127.5 - 1.0)
