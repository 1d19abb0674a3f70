"""Images in and out, against pixels computed here without Pillow's conversions."""

import hashlib
import io
import json
import os
import stat
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from etherdiff.images.reading import (
    IMAGE_SUFFIXES,
    UnreadableImage,
    describe_left_out,
    list_images,
    pixels_digest,
    read_image,
    read_photos,
    resize_and_crop,
    to_array,
)
from etherdiff.images.writing import MIN_CELL, PADDING, contact_sheet, read_png_settings, save_png
from etherdiff.system.errors import UserError

PHOTOS = Path(os.environ.get("ETHERDIFF_DATA") or Path(__file__).parents[3] / "shared/data") / "dreambooth"
ORIENTATION = 0x0112


def noise(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def icc_profile(space: bytes, connection_space: bytes, tag: bytes, data: bytes) -> bytes:
    """A minimal ICC v2 profile with one tag and a D50 white point."""
    d50 = b"XYZ \0\0\0\0" + struct.pack(">3i", round(0.9642 * 65536), 65536, round(0.8249 * 65536))
    start = 128 + 4 + 2 * 12
    table = struct.pack(">I", 2) + b"wtpt" + struct.pack(">II", start, len(d50))
    table += tag + struct.pack(">II", start + len(d50), len(data))
    device = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(">I4sI4s4s4s", start + len(d50) + len(data), b"\0" * 4, 0x02100000, device, space, connection_space)
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + d50 + data


# Listing


def test_images_are_listed_in_natural_order_whatever_the_case(tmp_path):
    for name in ("10.jpg", "2.JPG", "b2.png", "B10.webp", "notes.txt", ".hidden.jpg", "._2.jpg", "noext", "jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.jpg").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["2.JPG", "10.jpg", "b2.png", "B10.webp"]


def test_links_to_files_and_broken_links_are_listed_but_not_links_to_folders(tmp_path):
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "a.jpg").symlink_to(tmp_path / "real")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "c.jpg").symlink_to(tmp_path)
    (tmp_path / "d.jpg").symlink_to(tmp_path / "d.jpg")
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.jpg", "d.jpg"]


@given(st.lists(st.text("0123456789aA²٣é._", min_size=1, max_size=8), unique=True))
def test_any_names_have_one_order(names):
    from etherdiff.images.reading import _natural_order

    paths = [Path(name) for name in names]
    backwards = paths[::-1]
    assert sorted(paths, key=_natural_order) == sorted(backwards, key=_natural_order)


# Reading: what a viewer shows


def upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """The EXIF standard's meaning of each value, on an array (H, W, 3)."""
    transposed = stored.transpose(1, 0, 2)
    return {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: transposed,
        6: transposed[:, ::-1],
        7: transposed[::-1, ::-1],
        8: transposed[::-1],
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("format_name", "tolerance"), [("PNG", 0), ("TIFF", 0), ("JPEG", 6)])
def test_exif_orientation_is_applied(tmp_path, format_name, tolerance, orientation):
    stored = np.kron(noise(2, 3), np.ones((16, 16, 1), np.uint8))  # whole blocks survive JPEG
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 100, "subsampling": 0} if format_name == "JPEG" else {}
    Image.fromarray(stored).save(tmp_path / "x", format_name, exif=exif, **options)
    shown = pixels(tmp_path / "x")
    expected = upright(stored, orientation)
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).max() <= tolerance


def test_damaged_exif_leaves_the_pixels_as_stored(tmp_path):
    stored = noise()
    Image.fromarray(stored).save(tmp_path / "x.png", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), stored)


@pytest.mark.parametrize("save_as", ["PNG", "TIFF", "I", "I;16B"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, save_as):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    if save_as == "I":
        image = Image.fromarray(ramp.astype(np.int32))
    elif save_as == "I;16B":
        image = Image.frombytes("I;16B", ramp.shape, ramp.astype(">u2").tobytes())
    else:
        image = Image.fromarray(ramp)
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    image.save(tmp_path / "x", save_as if save_as == "PNG" else "TIFF", exif=exif)
    expected = np.rint(ramp[::-1, ::-1] / 257)
    np.testing.assert_array_equal(pixels(tmp_path / "x"), np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("white", [1, 255])
def test_float_grey_goes_from_0_to_1_or_to_255(tmp_path, white):
    shares = np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)
    Image.fromarray(shares * white).save(tmp_path / "x.tif")
    np.testing.assert_allclose(pixels(tmp_path / "x.tif")[..., 1], shares * 255, atol=0.501)


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, 70000.0], [float("nan"), 0.0]])
@pytest.mark.filterwarnings("error")
def test_values_no_viewer_agrees_on_are_refused(tmp_path, values):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(UnreadableImage, match="rescale it to 8 bits"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("white", [255, 1023, 4095, 16383, 65535])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_integers_of_fewer_bits_than_their_file_has_are_not_black(tmp_path, white, dtype):
    shares = np.linspace(0, 1, 256).reshape(8, 32)
    Image.fromarray((shares * white).astype(dtype)).save(tmp_path / "x.tif")
    np.testing.assert_allclose(pixels(tmp_path / "x.tif")[..., 0], shares * 255, atol=1)


@pytest.mark.parametrize(
    ("values", "dtype", "named"),
    [
        ([0, 1.05], np.float32, "0 to 1.05"),
        ([0, 127], np.float32, "0 to 127"),
        ([0, 256], np.float32, "0 to 256"),
        ([0, 254], np.uint16, "0 to 254"),
        ([7, 4000], np.uint16, "7 to 4000"),
        ([0, 16384 - 2], np.int32, "0 to 16382"),
        ([0, 70000], np.int32, "0 to 70000"),
        ([-1, 255], np.int32, "-1 to 255"),
    ],
)
def test_a_range_that_does_not_say_what_is_white_is_refused_by_name(tmp_path, values, dtype, named):
    Image.fromarray(np.array([values], dtype)).save(tmp_path / "x.tif")
    assert f"its values go from {named}," in why(tmp_path / "x.tif")


def test_a_file_may_say_what_is_white(tmp_path):
    ramp = np.arange(4000, dtype=np.uint16).reshape(40, 100)
    Image.fromarray(ramp).save(tmp_path / "x.tif", tiffinfo={281: 4095})  # MaxSampleValue
    np.testing.assert_array_equal(pixels(tmp_path / "x.tif")[..., 0], np.rint(ramp * (255 / 4095)))
    Image.fromarray(ramp).save(tmp_path / "x.png")  # whose samples are scaled up to 16 bits
    np.testing.assert_array_equal(pixels(tmp_path / "x.png")[..., 0], np.rint(ramp / 257))


def test_packed_12_bit_grey(tmp_path):
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3)]
    strip = bytes([0xFF, 0xF8, 0x00, 0])  # 4095 and 2048
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    content = b"II*\0" + struct.pack("<I", 12) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "x.tif").write_bytes(content)
    assert pixels(tmp_path / "x.tif")[0, :, 0].tolist() == [255, 128]


@pytest.mark.parametrize(("dtype", "white"), [(np.uint16, 65535), (np.float32, 1)])
def test_greys_of_which_0_is_white(tmp_path, dtype, white):
    shares = np.linspace(0, 1, 256).reshape(8, 32)
    Image.fromarray((shares * white).astype(dtype)).save(tmp_path / "x.tif", tiffinfo={262: 0})  # PhotometricInterpretation
    np.testing.assert_allclose(pixels(tmp_path / "x.tif")[..., 0], 255 - shares * 255, atol=1)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("international", [True, False])
def test_a_png_with_megabytes_of_text_in_it_is_read(tmp_path, compressed, international):
    text = PngImagePlugin.PngInfo()
    add = text.add_itxt if international else text.add_text
    for number in range(1 if compressed else 70):  # Pillow takes 1 MB of compressed text, and 64 MB of any
        add(f"workflow {number}", "x" * 1_050_000, zip=compressed)
    Image.fromarray(noise()).save(tmp_path / "x.png", pnginfo=text)
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), noise())


def test_text_after_the_pixels_and_damaged_text_do_not_matter_to_them(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    end = len(content) - 12  # before IEND
    deflated = zlib.compress(b"x" * 3_000_000)
    for kind, data in ((b"zTXt", b"workflow\0\0" + deflated), (b"zTXt", b"workflow\0\7" + deflated)):
        chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for place in (33, end):  # after IHDR
            (tmp_path / "x.png").write_bytes(content[:place] + chunk + content[place:])
            np.testing.assert_array_equal(pixels(tmp_path / "x.png"), noise())


def test_alpha_is_laid_on_white(tmp_path):
    colours = noise()
    alpha = np.random.default_rng(1).integers(0, 256, colours.shape[:2], dtype=np.uint8)
    Image.fromarray(np.dstack([colours, alpha])).save(tmp_path / "x.png")
    share = alpha[..., None] / 255
    np.testing.assert_allclose(pixels(tmp_path / "x.png"), colours * share + 255 * (1 - share), atol=1)


def test_grey_with_alpha(tmp_path):
    Image.fromarray(np.array([[[40, 255], [40, 0], [40, 51]]], np.uint8), "LA").save(tmp_path / "x.png")
    assert pixels(tmp_path / "x.png")[0].tolist() == [[40] * 3, [255] * 3, [212] * 3]


@pytest.mark.filterwarnings("error")
def test_palette_with_a_transparency_per_entry(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "x.png", transparency=bytes([255, 0, 51]))
    assert pixels(tmp_path / "x.png")[0].tolist() == [[255, 0, 0], [255, 255, 255], [204, 204, 255]]
    image.save(tmp_path / "x.gif", transparency=2)
    assert pixels(tmp_path / "x.gif")[0].tolist() == [[255, 0, 0], [0, 255, 0], [255, 255, 255]]
    image.save(tmp_path / "opaque.png")
    assert pixels(tmp_path / "opaque.png")[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_a_transparent_level_of_8_and_16_bit_grey(tmp_path):
    Image.fromarray(np.array([[7, 8, 9]], np.uint8)).save(tmp_path / "8.png", transparency=8)
    assert pixels(tmp_path / "8.png")[0, :, 0].tolist() == [7, 255, 9]
    Image.fromarray(np.array([[257, 258, 514]], np.uint16)).save(tmp_path / "16.png", transparency=258)
    assert pixels(tmp_path / "16.png")[0, :, 0].tolist() == [1, 255, 2]


def test_1_bit(tmp_path):
    bits = noise()[..., 0] > 127
    Image.fromarray(bits).save(tmp_path / "x.png")
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), np.stack([bits * 255] * 3, axis=-1))


@pytest.mark.parametrize("format_name", ["TIFF", "JPEG"])
def test_cmyk_without_a_profile(tmp_path, format_name):
    inks = np.zeros((16, 64, 4), np.uint8)
    for block, ink in enumerate([(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)]):
        inks[:, 16 * block : 16 * block + 16] = ink
    Image.fromarray(inks, "CMYK").save(tmp_path / "x", format_name)  # Pillow writes JPEGs inverted, as Adobe does
    shown = pixels(tmp_path / "x")[8, 8::16]
    assert np.abs(shown - [[255, 255, 255], [0, 255, 255], [255, 0, 0], [0, 0, 0]]).max() <= 3


@pytest.mark.parametrize("alpha", [False, True])
def test_an_rgb_profile_is_applied(tmp_path, alpha):
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"  # its red primary is sRGB's green
    stored = noise()
    image = Image.fromarray(stored)
    if alpha:
        image.putalpha(255)
    image.save(tmp_path / "x.png", icc_profile=bytes(profile))
    np.testing.assert_allclose(pixels(tmp_path / "x.png"), stored[..., [1, 0, 2]], atol=2)


@pytest.mark.parametrize("alpha", [False, True])
def test_a_grey_profile_is_applied(tmp_path, alpha):
    gamma = round(1.8 * 256)  # that of old Macintosh screens
    profile = icc_profile(b"GRAY", b"XYZ ", b"kTRC", b"curv" + struct.pack(">IIH", 0, 1, gamma) + b"\0\0")
    grey = np.arange(256, dtype=np.uint8)[None]
    image = Image.fromarray(grey)
    if alpha:
        image.putalpha(255)
    image.save(tmp_path / "x.png", icc_profile=profile)
    light = (grey / 255) ** 1.8
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    np.testing.assert_allclose(pixels(tmp_path / "x.png"), np.stack([srgb * 255] * 3, axis=-1), atol=1.5)


def test_a_cmyk_profile_is_applied(tmp_path):
    corners = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), axis=-1).reshape(16, 4)
    lab = [(255 * (1 - black), 128, 128) for *_, black in corners.tolist()]  # only black ink darkens this paper
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).ravel().tolist())
    lut += ramp * 4 + bytes(np.array(lab, np.uint8).ravel()) + ramp * 3
    profile = icc_profile(b"CMYK", b"Lab ", b"A2B0", lut)
    inks = np.array([[[0, 0, 0, 0], [255, 255, 255, 0], [0, 0, 0, 255]]], np.uint8)
    Image.fromarray(inks, "CMYK").save(tmp_path / "x.tif", icc_profile=profile)
    np.testing.assert_allclose(pixels(tmp_path / "x.tif")[0], [[255] * 3, [255] * 3, [0] * 3], atol=2)


@pytest.mark.parametrize(
    "profile",
    [ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"garbage" * 40],
    ids=["sRGB", "bad"],
)
def test_an_srgb_profile_and_a_damaged_one_change_nothing(tmp_path, profile):
    stored = noise()
    Image.fromarray(stored).save(tmp_path / "x.png", icc_profile=profile)
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), stored)


def test_the_content_decides_not_the_suffix(tmp_path):
    stored = noise()
    Image.fromarray(stored).save(tmp_path / "x.jpg", "PNG")
    np.testing.assert_array_equal(pixels(tmp_path / "x.jpg"), stored)


def test_of_pages_and_thumbnails_the_first_is_shown(tmp_path):
    stored = noise()
    Image.fromarray(stored).save(tmp_path / "x.tif", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    np.testing.assert_array_equal(pixels(tmp_path / "x.tif"), stored)


def test_real_photos_are_read_as_pillow_decodes_them():
    if not PHOTOS.is_dir():
        pytest.skip(f"no real photos at {PHOTOS}: set ETHERDIFF_DATA")
    paths = sorted(PHOTOS.glob("*/*.jpg"))
    assert paths
    for path in paths:
        image = read_image(path)
        with Image.open(path) as stored:
            assert sorted(image.size) == sorted(stored.size)
            assert stored.info.get("icc_profile") or image.tobytes() == stored.convert("RGB").tobytes()


# Reading: what is refused


def why(path: Path) -> str:
    with pytest.raises(UnreadableImage) as caught:
        read_image(path)
    assert caught.value.path == path
    assert str(caught.value) == f"{path}: {caught.value.why}"
    return caught.value.why


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "zero bytes"),
        (b"<html>404 not found</html>", "not an image (text?)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (bytes(range(200)), "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image (text?)"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC; convert it"),
        (b"\x89PNG\r\n\x1a\n", "truncated"),
    ],
)
def test_files_that_are_no_images(tmp_path, content, reason):
    (tmp_path / "x.jpg").write_bytes(content)
    assert why(tmp_path / "x.jpg").startswith(reason)


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone")
    assert why(tmp_path / "folder.jpg") == "not a file"
    assert why(tmp_path / "link.jpg") == "broken link"
    assert why(tmp_path / "gone.jpg") == "no such file"


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_files_are_refused_even_where_pillow_was_told_to_take_them(tmp_path, monkeypatch, format_name, tolerant):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    whole = io.BytesIO()
    Image.fromarray(noise(100, 100)).save(whole, format_name)
    for share in (0.01, 0.5, 0.95):
        (tmp_path / "x").write_bytes(whole.getvalue()[: max(16, int(share * len(whole.getvalue())))])
        assert why(tmp_path / "x").startswith(("truncated", "damaged"))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant


def test_a_truncated_jpeg_is_called_that(tmp_path):
    Image.fromarray(noise(100, 100)).save(tmp_path / "x.jpg")
    content = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(content[: len(content) // 2])
    assert why(tmp_path / "x.jpg") == "truncated"


def test_a_damaged_png_is_refused(tmp_path):
    Image.fromarray(noise(100, 100)).save(tmp_path / "x.png")
    content = bytearray((tmp_path / "x.png").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "x.png").write_bytes(content)
    assert why(tmp_path / "x.png").startswith("damaged")


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG"])
def test_animations_are_refused(tmp_path, format_name):
    frames = [Image.fromarray(noise(seed=seed)) for seed in range(3)]
    frames[0].save(tmp_path / "x", format_name, save_all=True, append_images=frames[1:])
    assert why(tmp_path / "x") == "animated: 3 frames; extract one frame"


@pytest.mark.filterwarnings("error")
def test_decompression_bombs_are_refused_with_their_size(tmp_path, monkeypatch):
    Image.new("1", (300, 200)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 29_999)
    assert why(tmp_path / "x.png") == "too large: 60,000 pixels, and 59,998 can be read; scale it down"
    assert Image.MAX_IMAGE_PIXELS == 29_999


def test_large_photos_are_read_without_a_warning(tmp_path, monkeypatch):
    Image.new("1", (300, 200)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)  # Pillow warns from here to twice as much
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read_image(tmp_path / "x.png").size == (300, 200)
    assert not caught


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_too_large_for_pillow_are_read_at_half_their_size(tmp_path, monkeypatch, mode):
    blocks = Image.fromarray(np.kron(noise(4, 6), np.ones((32, 32, 1), np.uint8))).convert(mode)
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    blocks.save(tmp_path / "x.jpg", quality=100, subsampling=0, exif=exif)
    whole = read_image(tmp_path / "x.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", whole.width * whole.height // 4)
    half = read_image(tmp_path / "x.jpg")
    assert half.size == (whole.width // 2, whole.height // 2)
    np.testing.assert_allclose(np.asarray(half.reduce(16), float), np.asarray(whole.reduce(32), float), atol=2)


def test_jpegs_of_more_than_twice_the_pixels_stay_bombs(tmp_path, monkeypatch):
    Image.new("L", (300, 200)).save(tmp_path / "x.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 14_999)
    assert why(tmp_path / "x.jpg") == "too large: 60,000 pixels, and 59,996 can be read; scale it down"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read every file")
def test_forbidden_files(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    (tmp_path / "x.png").chmod(0)
    assert why(tmp_path / "x.png") == "permission denied"


# Reading many


@pytest.fixture
def mixed_folder(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"")
    (tmp_path / "3.png").write_text("hello")
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "4.png")
    (tmp_path / "5.png").symlink_to(tmp_path / "gone")
    return tmp_path


def test_all_unreadable_images_are_named_in_one_error(mixed_folder):
    with pytest.raises(UserError) as caught:
        read_photos(list_images(mixed_folder))
    assert caught.value.problems == [
        "3 of 5 images cannot be read: remove them or pass --skip-bad",
        f"{mixed_folder / '2.png'}: zero bytes",
        f"{mixed_folder / '3.png'}: not an image (text?)",
        f"{mixed_folder / '5.png'}: broken link",
    ]


def test_no_image_left_is_an_error(mixed_folder):
    with pytest.raises(UserError, match=r"no readable image is left\n.*2.png: zero bytes"):
        read_photos([mixed_folder / "2.png"], skip_bad=True)
    with pytest.raises(UserError, match="no readable image"):
        read_photos([])


def test_skipping_reports_each_and_keeps_the_rest_in_order(mixed_folder, capsys):
    photos = read_photos(list_images(mixed_folder), skip_bad=True)
    assert [path.name for path in photos.paths] == ["1.png", "4.png"]
    red, blue = (read_image(path) for path in photos.paths)
    assert photos.digests == (pixels_digest(red), pixels_digest(blue))
    assert photos.digest == hashlib.sha256(b"(4, 4)" + red.tobytes() + b"(4, 4)" + blue.tobytes()).hexdigest()
    said = capsys.readouterr().err
    names = ("1.png", "2.png", "3.png", "4.png", "5.png")
    assert [name for name in names if f"left out: {mixed_folder / name}: " in said] == ["2.png", "3.png", "5.png"]


def test_photos_that_come_out_nearly_black_are_warned_of(tmp_path, capsys):
    dark = np.full((100, 100, 3), 15, np.uint8)
    dark[0, :10] = 255
    Image.fromarray(dark).save(tmp_path / "dark.png")
    Image.fromarray(dark.clip(0, 14) + np.array([0, 0, 3], np.uint8)).save(tmp_path / "blue.png")
    dark[1, 0] = 255
    Image.fromarray(dark).save(tmp_path / "stars.png")
    read_photos(list_images(tmp_path))
    assert f"nearly black as read here: {tmp_path / 'dark.png'}." in capsys.readouterr().err
    Image.new("L", (9, 9), 3).save(tmp_path / "more.png")
    read_photos(list_images(tmp_path))
    assert f"nearly black as read here: {tmp_path / 'dark.png'}, {tmp_path / 'more.png'}." in capsys.readouterr().err


# What is left out


def test_what_is_left_out_of_a_folder_is_counted(tmp_path):
    for name in ("0.png", "1.png", "a.jxl", "b.DNG", "c.jpg_large", "noext", "d.jp2", "e.jp2", "0.txt", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("more/deep/0.png", "more/1.JPG", "held_out/0.png", "empty/0.md", "more/.hidden/0.png", "more/._1.JPG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert describe_left_out(tmp_path, ["held_out"]) == (
        "1 .DNG file, 2 .jp2 files, 1 .jpg_large file, 1 .jxl file, 1 .txt file, 1 file without suffix, "
        "1 folder with 2 images, 1 caption beside images"
    )


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini", "._0.png", ".thumbs/0.png", "@eaDir/0.png"])
def test_what_systems_keep_for_themselves_is_no_image_and_not_left_out(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    assert list_images(tmp_path) == []
    assert describe_left_out(tmp_path) == ""


# Resizing


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64), (10, 17)])
@pytest.mark.parametrize("position", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.3, 0.8)])
def test_cropping_equals_scaling_the_whole_and_cutting(shape, position):
    image = Image.fromarray(noise(*shape)).resize((shape[1] * 3, shape[0] * 3), Image.Resampling.BICUBIC)
    width, height = (max(48, round(side * 48 / min(image.size))) for side in image.size)
    whole = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)).astype(int)
    x, y = round(position[0] * (width - 48)), round(position[1] * (height - 48))
    cut = np.asarray(resize_and_crop(image, 48, "random", position)).astype(int)
    assert np.abs(cut - whole[y : y + 48, x : x + 48]).max() <= 1


def test_the_position_runs_from_edge_to_edge_and_the_centre_ignores_it():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (50, 1))).convert("RGB")
    firsts = [resize_and_crop(ramp, 50, "random", (u, 0.0)).getpixel((0, 0))[0] for u in (0.0, 0.5, 1.0)]
    assert firsts == [0, 75, 150]
    assert resize_and_crop(ramp, 50, "center", (1.0, 1.0)).getpixel((0, 0))[0] == 75


def test_downscaling_is_antialiased():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (256, 128))).convert("RGB")
    assert abs(np.asarray(resize_and_crop(stripes, 32)).astype(int) - 127).max() <= 12


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 33), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_any_image_gives_a_square_of_its_own_colours(width, height, size, u, v):
    out = resize_and_crop(Image.new("RGB", (width, height), (9, 99, 199)), size, "random", (u, v))
    assert out.size == (size, size)
    assert out.getcolors() == [(size * size, (9, 99, 199))]


def test_a_very_long_image_is_cropped_without_scaling_it_whole():
    assert resize_and_crop(Image.new("RGB", (1, 60_000), "red"), 512).size == (512, 512)  # whole: 47 GB


@pytest.mark.parametrize(
    "arguments",
    [(0,), (8, "middle"), (8, "random", (1.1, 0)), (8, "random", (0, -0.1)), (8, "random", (float("nan"), 0))],
)
def test_impossible_crops_are_refused(arguments):
    with pytest.raises(ValueError, match="must"):
        resize_and_crop(Image.new("RGB", (9, 9)), *arguments)


def test_arrays_are_channels_first_from_minus_one_to_one():
    image = Image.fromarray(np.array([[[0, 51, 255], [255, 0, 0]]], np.uint8))
    array = to_array(image)
    assert array.dtype == np.float32
    assert array.shape == (3, 1, 2)
    np.testing.assert_allclose(array[:, 0, 0], [-1, -0.6, 1], atol=1e-6)


def test_every_level_survives_the_round_trip():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels, levels.T, levels[::-1]], axis=-1))
    pixels = np.rint((to_array(image).astype(np.float64) + 1) * 127.5).astype(np.uint8)
    assert pixels.transpose(1, 2, 0).tobytes() == image.tobytes()


# Contact sheets

labels_text = st.text(max_size=60) | st.just("W" * 400) | st.just("a sks dog " * 60)


@given(st.data(), st.integers(1, 7), st.integers(1, 4), st.integers(20, 90), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_images_keep_their_place_and_nothing_overlaps_them(data, count, columns, cell, with_rows, with_columns):
    rows = -(-count // columns)
    colours = [(200, 10 + 30 * index, 30) for index in range(count)]
    row_labels = [data.draw(labels_text) for _ in range(rows)] if with_rows else None
    column_labels = [data.draw(labels_text) for _ in range(columns)] if with_columns else None
    sheet = contact_sheet([Image.new("RGB", (8, 8), colour) for colour in colours], columns, row_labels, column_labels, cell)
    array = np.asarray(sheet)
    step = cell + PADDING
    left, top = sheet.width - columns * step, sheet.height - rows * step
    assert (left == PADDING, top == PADDING) == (not with_rows, not with_columns)
    for index in range(rows * columns):
        y, x = top + index // columns * step, left + index % columns * step
        window = array[y : y + cell, x : x + cell].reshape(-1, 3)
        assert (window == (colours[index] if index < count else 255)).all()
    gutters = array[top:].copy()
    for row in range(rows):
        gutters[row * step : row * step + cell] = 255
    assert (gutters == 255).all()
    assert (array[:PADDING] == 255).all()
    assert (array[:, :PADDING] == 255).all()


def test_small_images_are_shown_large_enough_and_all_in_one_size():
    sheet = contact_sheet([Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 32), "blue")], columns=2)
    assert sheet.size == (2 * MIN_CELL + 3 * PADDING, MIN_CELL + 2 * PADDING)
    second = np.asarray(sheet)[PADDING:-PADDING, 2 * PADDING + MIN_CELL : -PADDING]
    assert (second[32:96] == (0, 0, 255)).all()
    assert (second[:32] == 255).all()
    assert (second[96:] == 255).all()
    assert contact_sheet([Image.new("RGB", (300, 10))], columns=1).size == (300 + 2 * PADDING,) * 2


def test_labels_are_drawn_in_their_margins():
    sheet = contact_sheet([Image.new("RGB", (128, 128), "red")] * 2, 2, ["ether+"], ["adapter", "merged"])
    array = np.asarray(sheet)
    top, left = sheet.height - 128 - PADDING, sheet.width - 2 * (128 + PADDING)
    assert (array[top:, :left] < 128).any()
    for column in range(2):
        x = left + column * (128 + PADDING)
        assert (array[:top, x : x + 128] < 128).any()


def test_a_label_that_fits_is_whole_and_one_that_does_not_ends_in_an_ellipsis():
    from PIL import ImageFont

    from etherdiff.images.writing import _wrap

    font = ImageFont.load_default(12)
    assert _wrap("a sks dog\nin the snow", font, 500, 3) == ["a sks dog in the snow"]
    wrapped = _wrap("a sks dog in the snow", font, 60, 3)
    assert " ".join(wrapped) == "a sks dog in the snow"
    assert len(wrapped) > 1
    cut = _wrap("a sks dog in the snow " * 9, font, 60, 2)
    assert len(cut) == 2
    assert cut[-1].endswith("…")
    assert _wrap("W" * 90, font, 60, 2)[0].endswith("W…")
    assert all(font.getlength(line) <= 60 for line in [*wrapped, *cut])


@pytest.mark.parametrize("arguments", [([], 1), ([1], 0), ([1], 1, None, None, 0), ([1], 1, ["a", "b"]), ([1], 2, None, ["a"])])
def test_impossible_sheets_are_refused(arguments):
    images = [Image.new("RGB", (4, 4)) for _ in arguments[0]]
    with pytest.raises(ValueError, match=r"contact sheet|labels"):
        contact_sheet(images, *arguments[1:])


# PNGs with their settings

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text() | st.sampled_from(["prompt", "seed", "model", "steps"]), json_values, max_size=6))
@settings(max_examples=80, deadline=None)
def test_settings_survive_the_round_trip(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("png") / "x.png"
    save_png(Image.new("RGB", (2, 2)), path, written)
    assert read_png_settings(path) == written


@pytest.mark.parametrize("prompt", ["a sks dog", "un chien à la plage", "犬 🐕‍🦺 in the snow", "half a pair \ud83d", "a\nb"])
def test_prompts_in_any_script(tmp_path, prompt):
    save_png(Image.fromarray(noise()), tmp_path / "x.png", {"prompt": prompt})
    assert read_png_settings(tmp_path / "x.png") == {"prompt": prompt}
    with Image.open(tmp_path / "x.png") as image:
        assert image.info["parameters"] == prompt.replace("\ud83d", "?") + "\nSize: 30x20"
        np.testing.assert_array_equal(np.asarray(image), noise())


def test_parameters_are_those_of_webui(tmp_path):
    written = {
        "prompt": "a sks dog",
        "negative_prompt": "blurry",
        "steps": 25,
        "sampler": "DPM++ 2M",
        "guidance_scale": 7.5,
        "seed": 0,
        "model": "sd15, fine-tuned",
        "other": 1,
    }
    save_png(Image.fromarray(noise()), tmp_path / "x.png", written)
    with Image.open(tmp_path / "x.png") as image:
        assert image.info["parameters"] == (
            "a sks dog\nNegative prompt: blurry\n"
            "Steps: 25, Sampler: DPM++ 2M, Schedule type: SGM Uniform, CFG scale: 7.5, Seed: 0, Size: 30x20, "
            'Model: "sd15, fine-tuned", RNG: CPU, SGM noise multiplier: True'
        )
        assert json.loads(image.info["etherdiff"]) == written


@pytest.mark.parametrize(
    ("adapters", "scale", "tags"),
    [
        (["runs/dog/adapter"], 1.0, " <lora:dog:1>"),
        (["dog.v2.safetensors", "styles/ink"], 0.75, " <lora:dog.v2:0.75> <lora:ink:0.75>"),
        (["adapter"], 0.5, " <lora:adapter:0.5>"),
        ([], 1.0, ""),
    ],
)
def test_parameters_name_adapters_and_their_scale_as_webui_does(tmp_path, adapters, scale, tags):
    written = {
        "prompt": "a (red) ball",
        "adapters": adapters,
        "adapter_scale": scale,
        "sampler": "DDIM",
        "steps": 50,
        "seed": 3,
    }
    save_png(Image.fromarray(noise()), tmp_path / "x.png", written)
    with Image.open(tmp_path / "x.png") as image:
        assert image.info["parameters"] == (
            f"a (red) ball{tags}\n"
            "Steps: 50, Sampler: DDIM, Schedule type: Automatic, Seed: 3, Size: 30x20, RNG: CPU, Emphasis: None"
        )


@pytest.mark.parametrize("impossible", [{"a": float("nan")}, {"a": {1, 2}}])
def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, impossible):
    save_png(Image.new("RGB", (2, 2)), tmp_path / "x.png", {"seed": 1})
    with pytest.raises((ValueError, TypeError)):
        save_png(Image.new("RGB", (2, 2)), tmp_path / "x.png", impossible)
    assert read_png_settings(tmp_path / "x.png") == {"seed": 1}
    assert list(tmp_path.iterdir()) == [tmp_path / "x.png"]


def test_an_interrupted_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    save_png(Image.new("RGB", (2, 2)), tmp_path / "x.png", {"seed": 1})
    image = Image.new("RGB", (2, 2))

    def interrupted(path, **_options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_png(image, tmp_path / "x.png", {"seed": 2})
    assert read_png_settings(tmp_path / "x.png") == {"seed": 1}
    assert list(tmp_path.iterdir()) == [tmp_path / "x.png"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_others_may_read_what_the_umask_lets_them(tmp_path):
    save_png(Image.new("RGB", (2, 2)), tmp_path / "x.png", {})
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "x.png").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_files_without_settings_are_refused(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("hello")
    for name, reason in [("plain.png", "without"), ("text.png", "cannot read"), ("gone.png", "cannot read")]:
        with pytest.raises(UserError, match=f"{name}.*{reason}"):
            read_png_settings(tmp_path / name)


def test_suffixes_are_lower_case_with_a_dot():
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in IMAGE_SUFFIXES)
