"""Read photos as a viewer shows them: upright, in sRGB, on white; refuse what cannot be used, with the reason."""

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from etherdiff.system.errors import UserError

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


class UnreadableImage(UserError, ValueError):  # noqa: N818 - reads as what it says of the file
    """An image file that cannot be used as it is: `path`, and in a few words `why`."""

    def __init__(self, path: Path, why: str) -> None:
        self.path = path
        self.why = why
        super().__init__(f"{path}: {why}")


def list_images(folder: Path) -> list[Path]:
    """Return the image files (by suffix) directly in `folder`, in natural order: 2.jpg before 10.jpg.

    Hidden files and folders are left out. A broken link stays, so that reading it gives the reason.
    """
    found = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    return sorted((path for path in found if path.is_file() or _is_broken_link(path)), key=_natural_order)


def read_image(path: Path) -> Image.Image:
    """Return the image as a viewer shows it, in mode RGB (8 bits, sRGB).

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
    """Read all images by `read_image`, in order.

    Args:
        skip_bad: leave unreadable files out, and call `on_skip` for each, instead of raising.

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
