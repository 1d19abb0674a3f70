"""Whatever bytes stand in a recipe or in an image: an answer or a sentence, and nothing else."""

import io
import json

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from etherdiff.config import DreamBoothConfig, read_config
from etherdiff.images.reading import UnreadableImage, read_image
from etherdiff.system.errors import UserError

QUICK, MANY = 200, 10_000


def fuzz(cases: int):
    """The same examples every time in the quick tier, which must not fail now and then."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=cases, deadline=None, derandomize=cases == QUICK, suppress_health_check=checks, database=None)


# --- Recipes -----------------------------------------------------------------------------------------------------------

RECIPE = yaml.safe_dump(DreamBoothConfig(subject="dog").model_dump(mode="json")).encode()
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["ether", "6e-3", "\0", "*a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*DreamBoothConfig.model_fields, "provenance", "<<", "stpes"]) | st.text(max_size=8)
FRAGMENTS = st.sampled_from(
    [
        *(name.encode() for name in DreamBoothConfig.model_fields),
        *(
            b": ",
            b"\n",
            b"- ",
            b"{",
            b"}",
            b"[",
            b"]",
            b"&a ",
            b"*a",
            b"? ",
            b"|\n ",
            b"!!str ",
            b"'",
            b'"',
            b"\t",
            b"#",
            b"---\n",
        ),
        *(
            b".nan",
            b"1e400",
            b"true",
            b"~",
            b"<<: ",
            b"0o7",
            b"2020-01-01",
            b"\xc2\x85",
            b"\xff",
            b"\0",
            b"!!python/name:os.system ",
        ),
    ]
)


@st.composite
def harmed_recipes(draw):
    """A whole recipe with some bytes replaced."""
    content = bytearray(RECIPE)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 6))] = draw(st.binary(max_size=6) | FRAGMENTS)
    return bytes(content)


RECIPES = (
    st.binary(max_size=200)
    | st.lists(FRAGMENTS, max_size=12).map(b"".join)
    | st.dictionaries(NAMES, VALUES, max_size=5).map(lambda values: yaml.safe_dump(values, allow_unicode=True).encode())
    | st.dictionaries(NAMES, VALUES, max_size=5).map(lambda values: json.dumps(values).encode())
    | harmed_recipes()
)


def read_recipe(path, content: bytes) -> None:
    path.write_bytes(content)
    refused = None
    try:
        config = read_config(DreamBoothConfig, path, [], {"subject": "dog"})
    except UserError as error:
        refused = error
    if refused is not None:
        assert refused.problems
        assert all(isinstance(problem, str) and problem.strip() for problem in refused.problems)
        return
    assert config.subject == "dog"
    assert config.steps >= 1
    assert config.learning_rate is None or 0 < config.learning_rate < float("inf")
    assert "\0" not in str(config.output) + config.base + config.identifier


@fuzz(QUICK)
@given(content=RECIPES)
def test_any_recipe(tmp_path, content):
    read_recipe(tmp_path / "recipe.yaml", content)


@pytest.mark.slow
@fuzz(MANY)
@given(content=RECIPES)
def test_ten_thousand_recipes(tmp_path, content):
    read_recipe(tmp_path / "recipe.yaml", content)


# --- Images ------------------------------------------------------------------------------------------------------------


def whole_images() -> list[bytes]:
    """Small images in every format and mode that is read, with metadata to be harmed."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 4), dtype=np.uint8)
    colour, alpha = Image.fromarray(noise[..., :3]), Image.fromarray(noise, "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    wanted = [(colour, name, {}) for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")]
    wanted += [
        (alpha, "PNG", {}),
        (alpha, "WEBP", {}),
        (colour.convert("P"), "PNG", {"transparency": 3}),
        (colour, "PNG", {"exif": exif}),
    ]
    wanted += [(colour, "JPEG", {"exif": exif, "progressive": True}), (colour.convert("CMYK"), "JPEG", {})]
    wanted += [
        (colour.convert("L"), "TIFF", {"compression": "tiff_lzw"}),
        (Image.fromarray(noise[..., 0].astype(np.uint16)), "PNG", {}),
    ]
    wanted += [
        (colour, "GIF", {"save_all": True, "append_images": [alpha.convert("RGB")]}),
        (colour, "JPEG", {"icc_profile": b"x" * 200}),
    ]
    contents = []
    for image, name, options in wanted:
        file = io.BytesIO()
        image.save(file, name, **options)
        contents.append(file.getvalue())
    return contents


@st.composite
def harmed_images(draw, whole=tuple(whole_images())):  # noqa: B008  made once
    """An image with bytes changed, cut off, put in, or the tail of another at its end."""
    content = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.integers(0, 4))
        if kind == 0 and at < len(content):
            content[at] ^= draw(st.integers(1, 255))
        elif kind == 1:
            content[at : at + 4] = draw(st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1"]))
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            content[at:at] = draw(st.binary(max_size=8))
        else:
            content[at:] = draw(st.sampled_from(whole))[at:]
    return bytes(content)


# a GIF of 12 x 9 pixels whose first frame ends at 120,000 x 120,000, and nothing after it: found by the test below
HUGE_FRAME = b"GIF87a\x0c\0\x09\0\x86\0\0" + bytes(3 * 128) + b"," + b"\x60\xea" * 4 + b"\0"


def read_as_image(path, content: bytes) -> None:
    path.write_bytes(content)
    refused = None
    try:
        image = read_image(path)
    except UnreadableImage as error:
        refused = error
    if refused is not None:
        assert refused.why.strip()
        assert refused.path == path
        return
    assert image.mode == "RGB"
    assert min(image.size) >= 1
    assert len(image.tobytes()) == 3 * image.width * image.height


@fuzz(QUICK)
@given(content=st.binary(max_size=100) | harmed_images())
@example(content=b"")
@example(content=HUGE_FRAME)
@example(content=HUGE_FRAME + b"\x08\x06\x00\x00")
def test_any_image(tmp_path, content):
    read_as_image(tmp_path / "x.png", content)


@pytest.mark.slow
@fuzz(MANY)
@given(content=st.binary(max_size=100) | harmed_images())
def test_ten_thousand_images(tmp_path, content):
    read_as_image(tmp_path / "x.png", content)
