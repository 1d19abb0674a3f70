"""Control signals against OpenCV, Pillow and pictures made by hand; all of them through one contract."""

import json
import sys
import types

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, PngImagePlugin

from etherdiff.control.signals import make_signal, recorded_signal
from etherdiff.control.signals.canny import Canny, edges
from etherdiff.control.signals.landmarks import Landmarks, detect, find_task_file, with_size
from etherdiff.control.signals.segmentation import Palette, Segmentation, find_palette
from etherdiff.control.signals.signal import crop_box, crop_labels, upright_size
from etherdiff.images.reading import resize_and_crop
from etherdiff.system.errors import UserError
from etherdiff.tiny.world import CLASSES, PALETTE, render_scene

ADE20K = Segmentation(find_palette("ade20k"))
TINY = Segmentation(find_palette("tiny"))
QUICK = settings(max_examples=60, deadline=None)
SIDES = st.integers(9, 90)


def saved(array, path, mode=None):
    Image.fromarray(array).save(path) if mode is None else Image.fromarray(array).convert(mode).save(path)
    return path


def face_points(count=68, size=(100, 80), seed=0):
    return np.random.default_rng(seed).uniform(0.1, 0.9, (count, 2)) * size


# geometry


@QUICK
@given(SIDES, SIDES, st.integers(16, 80), st.booleans())
def test_labels_land_where_the_image_lands(width, height, resolution, upright):
    """On a ramp, Lanczos gives each pixel's middle, nearest neighbour its source pixel: at most half a source pixel apart."""
    margin = int(np.ceil(3 * max(1, resolution / min(width, height)))) + 1
    assume(resolution > 2 * margin + 2)
    step = 255 / max(width, height)
    ramp = np.arange(height if upright else width) * step
    labels = np.broadcast_to(ramp[:, None] if upright else ramp, (height, width)).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(labels)).convert("RGB")
    shown = np.asarray(resize_and_crop(image, resolution))[..., 0].astype(float)
    inner = slice(margin, resolution - margin)
    difference = crop_labels(np.ascontiguousarray(labels), resolution)[inner, inner] - shown[inner, inner]
    assert np.abs(difference).max() <= 0.65 * step + 2
    assert abs(difference.mean()) <= 0.5 * step + 1  # half a source pixel everywhere, where the image is exactly halved


@pytest.mark.parametrize("size", [(64, 64), (97, 64), (64, 151), (301, 200), (33, 50)])
@pytest.mark.parametrize("resolution", [64, 96])
def test_an_image_in_its_own_labels_colours_stays_aligned_with_them(size, resolution, tmp_path):
    scene = render_scene("train", 3).segmentation
    labels = np.asarray(Image.fromarray(scene).resize(size, Image.Resampling.NEAREST))
    image = Image.fromarray(PALETTE[labels])
    picture = TINY.picture(saved(labels, tmp_path / "map.png"), resolution)
    shown = np.asarray(resize_and_crop(image, resolution))
    target = TINY.target(tmp_path / "map.png", resolution)
    reach = int(np.ceil(3.5 * max(1, resolution / min(size)))) + 1  # of Lanczos beyond an edge, in pixels of the square
    padded = np.pad(target, reach, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1))
    flat = (windows == target[..., None, None]).all(axis=(2, 3))
    assert flat.sum() > 50
    assert np.abs(picture[flat].astype(int) - shown[flat]).max() <= 2


@QUICK
@given(SIDES, SIDES, st.integers(1, 80))
def test_the_crop_is_a_square_in_the_middle_inside_the_image(width, height, resolution):
    left, top, right, bottom = crop_box((width, height), resolution)
    across, down = width / (right - left), height / (bottom - top)  # whole target pixels: as square as rounding allows
    assert -1e-9 <= left < right <= width + 1e-9
    assert -1e-9 <= top < bottom <= height + 1e-9
    assert min(across, down) == pytest.approx(1)
    one = max(width, height) / resolution
    assert abs((left + right) / 2 - width / 2) <= one
    assert abs((top + bottom) / 2 - height / 2) <= one


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_upright_image(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert upright_size(tmp_path / "a.jpg") == ((30, 20) if orientation < 5 else (20, 30))


# segmentation


def test_ade20k_has_mmsegmentations_names_and_colours():
    palette = ADE20K.palette
    assert len(palette.classes) == len(set(palette.classes)) == len(palette.colours) == 150
    known = {
        "wall": (0, (120, 120, 120)),
        "sky": (2, (6, 230, 230)),
        "person": (12, (150, 5, 61)),
        "chest of drawers": (44, (6, 51, 255)),
        "television receiver": (89, (0, 255, 194)),
        "traffic light": (136, (41, 0, 255)),
        "flag": (149, (92, 0, 255)),
    }
    assert {name: (palette.classes.index(name), palette.colours[palette.classes.index(name)]) for name in known} == known


def test_ade20k_values_count_from_one_and_zero_is_ignored(tmp_path):
    labels = np.array([[0, 1, 2], [150, 13, 0], [3, 3, 3]], np.uint8)
    control = saved(labels, tmp_path / "a.png")
    assert ADE20K.problems(control) == []
    assert ADE20K.target(control, 3).tolist() == [[255, 0, 1], [149, 12, 255], [2, 2, 2]]
    assert ADE20K.target(control, 3).dtype == np.int64
    picture = ADE20K.picture(control, 3)
    assert picture[0].tolist() == [[0, 0, 0], [120, 120, 120], [180, 120, 120]]
    assert picture[1, 0].tolist() == [92, 0, 255]


def test_the_tiny_worlds_values_count_from_zero_and_none_is_ignored(tmp_path):
    labels = render_scene("train", 0).segmentation
    control = saved(labels, tmp_path / "a.png")
    assert (TINY.target(control, 64) == labels).all()
    assert (TINY.picture(control, 64) == PALETTE[labels]).all()
    assert TINY.palette.classes == CLASSES
    labels = labels.copy()
    labels[0, 0] = 255
    assert TINY.problems(saved(labels, control)) == ["label values outside tiny, which has 0 to 20: 255 (1 pixels)"]


@pytest.mark.parametrize("kind", ["L", "P", "16 bits", "32 bits", "TIFF"])
def test_a_map_is_the_same_in_every_mode(kind, tmp_path):
    labels = render_scene("train", 1).segmentation
    control = tmp_path / ("a.tif" if kind in ("TIFF", "32 bits") else "a.png")
    if kind == "P":
        image = Image.fromarray(labels).convert("L")
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
        image.save(control)
    else:
        dtype = {"16 bits": np.uint16, "32 bits": np.int32}.get(kind, np.uint8)
        saved(labels.astype(dtype), control)
    with Image.open(control) as image:
        assert image.mode == {"P": "P", "16 bits": "I;16", "32 bits": "I"}.get(kind, "L")
    assert (TINY.target(control, 64) == labels).all()


@QUICK
@given(st.data())
def test_a_coloured_map_is_read_as_the_labels_it_was_coloured_by(data):
    count = data.draw(st.integers(1, 40))
    colours = data.draw(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=count, max_size=count, unique=True))
    labels = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=12, max_size=12))).reshape(3, 4)
    signal = Segmentation(Palette("some", tuple(map(str, range(count))), tuple(colours), ignored=()))
    found = signal._from_colours(np.array(colours, np.int64)[labels])
    assert (found.labels == labels).all()
    assert found.problems == ()


def test_black_in_a_coloured_map_is_ignored_where_the_palette_ignores_something(tmp_path):
    control = saved(np.zeros((4, 4, 3), np.uint8), tmp_path / "a.png")
    assert (ADE20K.target(control, 4) == 255).all()
    assert TINY.problems(control) == ["1 colours outside tiny: (0, 0, 0) (16 pixels)"]
    with pytest.raises(UserError, match=r"a\.png: 1 colours outside tiny"):
        TINY.picture(control, 4)


def test_what_is_outside_the_palette_is_named_with_its_count(tmp_path):
    labels = np.array([[151, 151, 200], [1, 0, 255]], np.uint8)
    control = saved(labels, tmp_path / "a.png")
    wanted = "label values outside ade20k, which has 1 to 150, and 0 for none: 151 (2 pixels), 200 (1 pixels), 255 (1 pixels)"
    assert ADE20K.problems(control) == [wanted]
    with pytest.raises(UserError, match="151"):
        ADE20K.target(control, 2)


def test_a_jpeg_of_a_coloured_map_is_refused(tmp_path):
    Image.fromarray(PALETTE[render_scene("train", 0).segmentation]).save(tmp_path / "a.jpg")
    assert "colours outside tiny" in TINY.problems(tmp_path / "a.jpg")[0]


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\nbroken"])
def test_a_damaged_map_is_a_problem_not_a_crash(content, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    assert "cannot be read" in TINY.problems(tmp_path / "a.png")[0]


def test_palettes_from_files(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"sky": [1, 2, 3], "sea": [4, 5, 6]}')
    palette = find_palette(str(path))
    assert (palette.name, palette.classes, palette.colours) == ("mine", ("sky", "sea"), ((1, 2, 3), (4, 5, 6)))
    assert (palette.first, palette.ignored) == (0, (255,))
    control = saved(np.array([[0, 1], [255, 1]], np.uint8), tmp_path / "a.png")
    assert Segmentation(palette).target(control, 2).tolist() == [[0, 1], [255, 1]]
    path.write_text("[[1, 2, 3], [4, 5, 6]]")
    listed = find_palette(str(path))
    assert listed.classes == ("class 0", "class 1")
    assert palette.digest() != listed.digest()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "must be"),
        ("[[1, 2]]", "must be"),
        ("[[1, 2, 256]]", "must be"),
        ("[[1, 2, true]]", "must be"),
        ("3", "must be"),
        ("{", "cannot be read as JSON"),
        ("[[1, 2, 3], [1, 2, 3]]", "more than one class"),
        (json.dumps([[i % 256, i // 256, 0] for i in range(256)]), "256 classes"),
    ],
)
def test_palettes_that_are_refused(content, said, tmp_path):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(UserError, match=said):
        find_palette(str(tmp_path / "mine.json"))


def test_a_palette_that_is_not_there():
    with pytest.raises(UserError, match="neither ade20k nor tiny nor a file"):
        find_palette("ade")


# Canny


def a_photo(size=(90, 70)):
    image = Image.fromarray(render_scene("train", 5).image).resize(size, Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).ellipse((20, 20, 50, 55), fill=(250, 20, 20))
    return image


def test_edges_are_opencvs_on_the_square(tmp_path):
    a_photo().save(tmp_path / "a.png")
    signal = Canny(64)
    signal.derive(tmp_path / "a.png", tmp_path / "edges.png")
    square = np.asarray(resize_and_crop(a_photo(), 64))
    wanted = cv2.Canny(square, 100, 200) > 0
    assert wanted.any()
    assert (signal.target(tmp_path / "edges.png", 64) == wanted).all()
    assert (edges(square) == wanted).all()
    assert (signal.picture(tmp_path / "edges.png", 64) == np.where(wanted, 255, 0)[..., None]).all()
    assert signal.problems(tmp_path / "edges.png") == []
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.png", "edges.png"]


@pytest.mark.filterwarnings("ignore")
def test_edges_are_those_of_controlnets_detector():
    import controlnet_aux as annotators

    square = np.asarray(resize_and_crop(a_photo(), 128))
    drawn = annotators.CannyDetector()(square, detect_resolution=128, image_resolution=128, output_type="np")
    assert (edges(square) == (drawn[..., 0] > 0)).all()


@pytest.mark.parametrize("factor", [2, 3])
def test_a_shrunk_edge_map_keeps_every_line_and_a_grown_one_is_blocks(factor, tmp_path):
    lines = np.random.default_rng(0).random((24, 24)) < 0.05
    control = saved(lines.astype(np.uint8) * 255, tmp_path / "a.png")
    small = lines.reshape(24 // factor, factor, 24 // factor, factor).any(axis=(1, 3))
    assert (Canny().target(control, 24 // factor) == small).all()
    assert (Canny().target(control, 24 * factor) == lines.repeat(factor, 0).repeat(factor, 1)).all()


def test_what_is_no_edge_map(tmp_path):
    a_photo().save(tmp_path / "photo.png")
    assert "pixels are grey" in Canny().problems(tmp_path / "photo.png")[0]
    assert "is white" in Canny().problems(saved(np.full((8, 8), 255, np.uint8), tmp_path / "white.png"))[0]
    (tmp_path / "none.png").write_bytes(b"")
    assert "zero bytes" in Canny().problems(tmp_path / "none.png")[0]
    with pytest.raises(UserError, match="no such file"):
        Canny().derive(tmp_path / "absent.png", tmp_path / "edges.png")


# landmarks


@pytest.mark.parametrize("size", [(100, 100), (131, 80), (80, 131)])
def test_a_point_goes_where_the_image_takes_it(size, tmp_path):
    """A bright dot in an image, cropped as images are, has its centre where the landmark says."""
    point = np.array([size[0] // 2 + 7, size[1] // 2 - 12])
    image = Image.new("RGB", size)
    ImageDraw.Draw(image).rectangle((*(point - 3), *(point + 2)), fill="white")  # pixels from -3 up to +3 around the point
    shown = np.asarray(resize_and_crop(image, 64)).astype(float)[..., 0]
    rows, columns = np.mgrid[0:64, 0:64] + 0.5
    centre = np.array([(shown * columns).sum(), (shown * rows).sum()]) / shown.sum()
    (tmp_path / "a.json").write_text(json.dumps({"points": [point.tolist(), [1, 1]], "size": size}))
    assert Landmarks().target(tmp_path / "a.json", 64)[0] == pytest.approx(centre, abs=0.15)


def test_points_are_the_same_in_every_form(tmp_path):
    points, size = face_points(), (100, 80)
    forms = {
        "pixels.json": json.dumps({"points": points.tolist(), "size": size}),
        "fractions.json": json.dumps({"points": (points / size).tolist(), "size": size}),
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "bare.json").write_text(json.dumps(points.tolist()))
    np.save(tmp_path / "bare.npy", points)
    np.save(tmp_path / "bare_fractions.npy", points / size)
    wanted = Landmarks().target(tmp_path / "pixels.json", 64)
    assert wanted.shape == (68, 2)
    for name in ("fractions.json", "bare.json", "bare.npy", "bare_fractions.npy"):
        control = with_size(tmp_path / name, size)
        assert Landmarks().problems(control) == []
        assert Landmarks().target(control, 64) == pytest.approx(wanted)
    assert with_size(tmp_path / "pixels.json", (1, 1)) == tmp_path / "pixels.json"


def test_bare_pixels_are_refused_and_bare_fractions_are_of_a_square(tmp_path):
    (tmp_path / "a.json").write_text("[[50, 40], [10, 10]]")
    assert "of an image of what size" in Landmarks().problems(tmp_path / "a.json")[0]
    (tmp_path / "a.json").write_text("[[0.5, 0.25], [1, 0]]")
    assert Landmarks().target(tmp_path / "a.json", 64).tolist() == [[32, 16], [64, 0]]


def test_68_points_are_joined_by_group_and_others_are_dots(tmp_path):
    points = np.full((68, 2), -100.0)  # everything but the right eye is outside
    points[36:42] = [[20, 20], [30, 10], [40, 10], [50, 20], [40, 30], [30, 30]]
    (tmp_path / "a.json").write_text(json.dumps({"points": points.tolist(), "size": [64, 64]}))
    picture = Landmarks().picture(tmp_path / "a.json", 64)
    assert picture.shape == (64, 64, 3)
    lit = picture[..., 0] > 0
    assert lit[[10, 30, 25], [35, 35, 25]].all()  # top, bottom, and the line that closes the eye
    assert not lit[20, 35]
    (tmp_path / "b.json").write_text(json.dumps({"points": [[20, 20], [40, 20]], "size": [64, 64]}))
    dots = Landmarks().picture(tmp_path / "b.json", 64)[..., 0] > 0
    assert dots[20, [20, 30, 40]].tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as points"),
        ("[]", "must hold finite points"),
        ("[[1, 2, 3]]", "must hold finite points"),
        ("[[1, NaN]]", "must hold finite points"),
        ('{"points": [[0.1, 0.2]], "size": [0, 4]}', "size is"),
        ('{"points": [[-50, 900]], "size": [64, 64]}', "none of its 1 points is inside"),
    ],
)
def test_what_are_no_landmarks(content, said, tmp_path):
    (tmp_path / "a.json").write_text(content)
    assert said in Landmarks().problems(tmp_path / "a.json")[0]
    assert with_size(tmp_path / "b.json", (4, 4)) == tmp_path / "b.json"  # not there: left for `problems`


def fake_mediapipe(monkeypatch, faces):
    """mediapipe Tasks' names, with a landmarker that finds these faces."""
    seen = {}

    class Landmarker:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def detect(self, image):
            seen["pixels"] = image.data
            return types.SimpleNamespace(face_landmarks=faces)

    def create(options):
        seen["options"] = options
        return Landmarker()

    vision = types.SimpleNamespace(
        FaceLandmarkerOptions=lambda **given: given, FaceLandmarker=types.SimpleNamespace(create_from_options=create)
    )
    module = types.ModuleType("mediapipe")
    module.Image = lambda image_format, data: types.SimpleNamespace(format=image_format, data=data)
    module.ImageFormat = types.SimpleNamespace(SRGB="srgb")
    python = types.ModuleType("mediapipe.tasks.python")
    python.BaseOptions, python.vision = (lambda **given: given), vision
    for name, value in {
        "mediapipe": module,
        "mediapipe.tasks": types.ModuleType("t"),
        "mediapipe.tasks.python": python,
    }.items():
        monkeypatch.setitem(sys.modules, name, value)
    return seen


def test_landmarks_are_derived_by_mediapipe_where_the_user_names_its_model(monkeypatch, tmp_path):
    face = [types.SimpleNamespace(x=0.25, y=0.5), types.SimpleNamespace(x=0.75, y=0.5)]
    seen = fake_mediapipe(monkeypatch, [face])
    image = a_photo((80, 40))
    image.save(tmp_path / "a.png")
    (tmp_path / "face.task").write_bytes(b"model")
    monkeypatch.setenv("ETHERDIFF_FACE_LANDMARKER", str(tmp_path / "face.task"))
    Landmarks().derive(tmp_path / "a.png", tmp_path / "a.json")
    assert (seen["pixels"] == np.asarray(image)).all()
    assert seen["options"]["base_options"] == {"model_asset_path": str(tmp_path / "face.task")}
    assert Landmarks().target(tmp_path / "a.json", 40).tolist() == [[0, 20], [40, 20]]


def test_landmarks_that_cannot_be_found(monkeypatch, tmp_path):
    image = a_photo()
    image.save(tmp_path / "a.png")
    with pytest.raises(UserError, match="has no landmarks: give them as"):
        Landmarks().derive(tmp_path / "a.png", tmp_path / "a.json")
    with pytest.raises(UserError, match="there is no such file"):
        find_task_file(tmp_path / "absent.task")
    (tmp_path / "face.task").write_bytes(b"model")
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(UserError, match="not installed here"):
        detect(image, tmp_path / "face.task")
    fake_mediapipe(monkeypatch, [])
    with pytest.raises(UserError, match=r"a\.png: mediapipe finds no face"):
        Landmarks(tmp_path / "face.task").derive(tmp_path / "a.png", tmp_path / "a.json")


# all of them


def example(signal, folder):
    if isinstance(signal, Landmarks):
        (folder / "a.json").write_text(json.dumps({"points": face_points().tolist(), "size": [100, 80]}))
        return folder / "a.json"
    labels = render_scene("train", 2).segmentation
    values = labels + 1 if isinstance(signal, Segmentation) else np.where(labels == labels.max(), 255, 0).astype(np.uint8)
    return saved(values, folder / "a.png")


@pytest.mark.parametrize("name", ["segmentation", "canny", "landmarks"])
@pytest.mark.parametrize("resolution", [32, 65])
def test_every_signal_keeps_the_contract(name, resolution, tmp_path):
    signal = make_signal(name)
    control = example(signal, tmp_path)
    assert signal.name == name
    assert signal.problems(control) == []
    picture, target = signal.picture(control, resolution), signal.target(control, resolution)
    assert (picture.shape, picture.dtype) == ((resolution, resolution, 3), np.uint8)
    assert picture.any()
    assert target.shape == ((68, 2) if name == "landmarks" else (resolution, resolution))
    again = recorded_signal(json.loads(json.dumps(signal.settings(), allow_nan=False)))
    assert type(again) is type(signal)
    assert (again.picture(control, resolution) == picture).all()
    assert again.settings() == signal.settings()
    assert signal.problems(tmp_path / "absent")
    with pytest.raises(UserError):
        signal.picture(tmp_path / "absent", resolution)
    with pytest.raises(UserError):
        signal.derive(tmp_path / "absent.png", tmp_path / "new")


def test_what_no_signal_can_be_made_of():
    with pytest.raises(UserError, match=r"must be segmentation, canny, .* or pidi, not 'sketch'"):
        make_signal("sketch")
    with pytest.raises(UserError, match="only segmentation has one"):
        make_signal("canny", palette="tiny")


# --- Files with megabytes of text in them -----------------------------------------------------------------------------


def test_a_map_with_megabytes_of_text_in_it_is_read(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4) % len(TINY.palette.classes)
    Image.fromarray(labels).save(tmp_path / "a.png", pnginfo=text)
    assert TINY.problems(tmp_path / "a.png") == []
    assert TINY.size(tmp_path / "a.png") == upright_size(tmp_path / "a.png") == (4, 3)
    np.testing.assert_array_equal(TINY.labels(tmp_path / "a.png"), labels)


# --- Maps that lose their meaning -------------------------------------------------------------------------------------

MASK = np.kron([[0, 255], [255, 255]], np.ones((4, 4))).astype(np.uint8)
BLACK_WHITE = {"background": [0, 0, 0], "object": [255, 255, 255]}


def palette_file(folder, classes):
    (folder / "palette.json").write_text(json.dumps(classes))
    return Segmentation(find_palette(str(folder / "palette.json")))


@pytest.mark.parametrize("white_first", [False, True])
@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_the_greys_of_a_mask_are_the_palettes_colours(mode, white_first, tmp_path):
    signal = palette_file(tmp_path, dict(sorted(BLACK_WHITE.items(), reverse=white_first)))
    Image.fromarray(MASK).convert(mode).save(tmp_path / "mask.png")
    Image.new("L", (8, 8)).save(tmp_path / "empty.png")
    settled = signal.settled([tmp_path / "mask.png", tmp_path / "empty.png"])
    assert settled.problems(tmp_path / "mask.png") == []
    assert (settled.picture(tmp_path / "mask.png", 8) == MASK[..., None]).all()
    assert (settled.picture(tmp_path / "empty.png", 8) == 0).all()
    assert Segmentation.from_settings(settled.settings()) == settled


def test_greys_between_black_and_white_are_read_and_label_values_stay(tmp_path):
    signal = palette_file(tmp_path, {"a": [0, 0, 0], "b": [128, 128, 128], "c": [255, 255, 255]})
    trimap, labels = np.array([[0, 128], [255, 128]], np.uint8), np.array([[0, 1], [255, 2]], np.uint8)
    saved(trimap, tmp_path / "trimap.png")
    saved(labels, tmp_path / "labels.png")
    assert signal.settled([tmp_path / "trimap.png"]).target(tmp_path / "trimap.png", 2).tolist() == [[0, 1], [2, 1]]
    assert signal.settled([tmp_path / "labels.png"]) == signal
    assert signal.target(tmp_path / "labels.png", 2).tolist() == [[0, 1], [255, 2]]
    mixed = signal.settled([tmp_path / "trimap.png", tmp_path / "labels.png"])
    assert "128 (2 pixels)" in mixed.problems(tmp_path / "trimap.png")[0]
    assert "greys" not in mixed.settings()


def test_a_map_of_which_no_pixel_has_a_class_is_refused_but_ade20k_knows_anything_else(tmp_path):
    signal = palette_file(tmp_path, {"a": [9, 9, 9], "b": [200, 0, 0]})
    control = saved(np.full((4, 4), 255, np.uint8), tmp_path / "a.png")
    assert signal.problems(control) == ["none of its pixels belongs to a class of palette"]
    Image.new("RGB", (4, 4)).save(control)
    assert signal.problems(control) == ["none of its pixels belongs to a class of palette"]
    assert ADE20K.problems(control) == []


@pytest.mark.parametrize(
    ("mode", "name", "options", "said"),
    [
        ("L", "a.jpg", {"quality": 100}, "JPEG changes the values"),
        ("RGB", "a.jpg", {"quality": 100}, "JPEG changes the values"),
        ("RGB", "a.webp", {"quality": 100}, "lossy WebP changes the values"),
        ("RGBA", "a.webp", {"quality": 100}, "lossy WebP changes the values"),
        ("RGB", "a.webp", {"lossless": True}, ""),
        ("L", "a.tif", {"compression": "jpeg"}, "TIFF with lossy compression changes the values"),
        ("L", "a.tif", {"compression": "tiff_lzw"}, ""),
    ],
)
def test_label_maps_in_lossy_formats_are_refused(mode, name, options, said, tmp_path):
    labels = render_scene("train", 0).segmentation
    Image.fromarray(labels if mode == "L" else PALETTE[labels]).convert(mode).save(tmp_path / name, **options)
    problems = TINY.problems(tmp_path / name)
    assert said in problems[-1] if said else problems == []


def with_palette(indices, colours):
    image = Image.fromarray(np.asarray(indices, np.uint8), mode="P")
    image.putpalette([part for colour in colours for part in colour])
    return image


def test_an_image_with_a_palette_of_its_own_is_read_by_what_it_shows_or_refused(tmp_path):
    signal, control = palette_file(tmp_path, {"sky": [10, 20, 200], "sea": [0, 90, 90]}), tmp_path / "a.png"
    with_palette([[0, 1], [1, 1]], [(10, 20, 200), (0, 90, 90)]).save(control)
    assert signal.target(control, 2).tolist() == [[0, 1], [1, 1]]
    with_palette([[0, 1], [1, 255]], [(1, 2, 3)] * 256).save(control)  # any colours: the indices count
    assert signal.target(control, 2).tolist() == [[0, 1], [1, 255]]
    with_palette([[7, 9], [9, 9]], [(0, 90, 90)] * 9 + [(10, 20, 200)]).save(control)  # as programs number colours
    assert signal.target(control, 2).tolist() == [[1, 0], [0, 0]]
    with_palette([[0, 1], [1, 1]], [(0, 90, 90), (10, 20, 200)]).save(control)
    assert "its indices and its colours say different classes" in signal.problems(control)[0]


def test_ade20ks_indices_count_though_two_classes_share_a_colour(tmp_path):
    indices = np.array([[0, 7], [49, 150]], np.uint8)  # none, road, skyscraper, flag
    with_palette(indices, [(0, 0, 0), *ADE20K.palette.colours]).save(tmp_path / "a.png")
    assert ADE20K.target(tmp_path / "a.png", 2).tolist() == [[255, 6], [48, 149]]


def test_transparency_is_none_only_where_no_class_lies_below(tmp_path):
    signal, control = palette_file(tmp_path, {"sky": [10, 20, 200], "sea": [0, 90, 90]}), tmp_path / "a.png"
    pixels = np.array([[[10, 20, 200, 255], [0, 0, 0, 0]]], np.uint8).repeat(2, axis=0)
    saved(pixels, control)
    assert signal.target(control, 2).tolist() == [[0, 255]] * 2
    for below, opacity in (((0, 90, 90), 0), ((0, 90, 90), 128), ((0, 0, 0), 1)):
        pixels[:, 1] = (*below, opacity)
        saved(pixels, control)
        assert signal.problems(control) == ["2 transparent pixels, whose class is unclear: save it opaque"]
    pixels[:, 1] = (0, 90, 90, 255)
    saved(pixels, control)
    assert signal.target(control, 2).tolist() == [[0, 1]] * 2
    Image.merge("LA", [Image.new("L", (2, 2), 1), Image.new("L", (2, 2), 255)]).save(control)
    assert signal.target(control, 2).tolist() == [[1, 1]] * 2
    Image.new("LA", (2, 2), (1, 9)).save(control)
    assert "mode LA" in signal.problems(control)[0]


def test_classes_that_occur_in_no_map_are_named(tmp_path):
    signal = palette_file(tmp_path, {"a": [9, 9, 9], "b": [200, 0, 0], "c": [0, 200, 0]})
    counts = [signal.count(saved(np.array(rows, np.uint8), tmp_path / "a.png")) for rows in ([[0, 0]], [[0, 2]])]
    assert counts == [{"0": 2}, {"0": 1, "2": 1}]
    assert signal.rare(counts) == {"classes that occur in no map to train on": ["b"]}
    assert signal.rare([*counts, {"1": 1}, None]) == {}
