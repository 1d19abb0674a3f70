"""Face landmarks: points in a file, drawn as lines where they are the usual 68, else as dots."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from etherdiff.control.signals.signal import Signal, Size, crop_box, upright_size
from etherdiff.images.reading import read_image
from etherdiff.system.errors import UserError
from etherdiff.system.files import cache_dir, file_hash, write_text
from etherdiff.system.text import expand_home, read_user_text

TASK_FILE = "ETHERDIFF_FACE_LANDMARKER"
"""The environment variable that names mediapipe's model (face_landmarker.task)."""
GROUPS_68 = (
    (0, 17, False),  # jaw
    (17, 22, False),
    (22, 27, False),  # brows
    (27, 31, False),
    (31, 36, False),  # nose
    (36, 42, True),
    (42, 48, True),  # eyes
    (48, 60, True),
    (60, 68, True),  # lips, outer and inner
)
"""iBUG's 68 points: from, to, and whether the line closes."""
_MAX_FRACTION = 2.0  # points may be outside the image; in pixels, no face is that small

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Landmarks(Signal):
    """Control files are points (x, y), in pixels or as fractions of width and height, as .npy (K, 2) or .json.

    JSON is [[x, y], …], or {"points": [[x, y], …], "size": [width, height]} with the size of the image they belong to.
    Without it, fractions are taken as of a square, and pixels are refused; datasets add it (`with_size`).
    """

    task_file: Path | None = None

    name: ClassVar[str] = "landmarks"
    suffixes: ClassVar[tuple[str, ...]] = (".json", ".npy")
    suffix: ClassVar[str | None] = ".json"

    @classmethod
    def choose(cls, palette: str | None, resolution: int) -> Self:
        return cls()

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        return cls()

    def picture(self, control: Path, resolution: int) -> NDArray[np.uint8]:
        """Return white lines or dots on black: (resolution, resolution, 3)."""
        points = self.target(control, resolution)
        image = Image.new("RGB", (resolution, resolution))
        draw = ImageDraw.Draw(image)
        if len(points) == GROUPS_68[-1][1]:
            for start, end, closed in GROUPS_68:
                group = [(float(x), float(y)) for x, y in points[start:end]]
                draw.line([*group, group[0]] if closed else group, fill="white", width=max(1, resolution // 128), joint="curve")
        else:
            radius = resolution / 256
            for x, y in points:
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white")
        return np.asarray(image)

    def target(self, control: Path, resolution: int) -> FloatArray:
        """Return x and y, (K, 2), in pixels of the square; a point outside it stays outside."""
        points, size = _read(control)
        width, height = size or _assumed_size(control, points)
        if _are_fractions(points):
            points = points * (width, height)
        left, top, right, _ = crop_box((width, height), resolution)
        return (points - (left, top)) * (resolution / (right - left))

    def problems(self, control: Path) -> list[str]:
        """Find files that are unreadable, not points, or all of them outside the image."""
        try:
            points, size = _read(control)
            width, height = size or _assumed_size(control, points)
        except UserError as error:
            return error.problems
        bounds = (1, 1) if _are_fractions(points) else (width, height)
        inside = ((points >= 0) & (points <= bounds)).all(axis=1)
        return [] if inside.any() else [f"none of its {len(points)} points is inside the image"]

    def settings(self) -> dict[str, Any]:
        """Return which model finds points where files lack them, if any does."""
        task_file = find_task_file(self.task_file)
        return {"signal": self.name, "task_sha256": file_hash(task_file) if task_file else None}

    def can_derive(self) -> bool:
        return find_task_file(self.task_file) is not None

    def completed(self, control: Path, image: Path) -> Path:
        return with_size(control, upright_size(image))

    def size(self, control: Path) -> Size | None:
        return None

    def count(self, control: Path) -> int:
        """Return how many points there are."""
        return len(self.target(control, 1))

    def odd(self, counts: Sequence[Any]) -> dict[str, list[tuple[int, str]]]:
        """Find files with another number of points than most."""
        known = Counter(count for count in counts if count is not None)
        usual = known.most_common(1)[0][0] if known else None
        odd = [(place, f"{count}, most have {usual}") for place, count in enumerate(counts) if count not in (None, usual)]
        return {"landmarks of another number than most": odd}

    def derive(self, image: Path, control: Path) -> None:
        """Write the points that mediapipe finds. UserError without its model or package, or where there is no face."""
        task_file = find_task_file(self.task_file)
        if task_file is None:
            raise UserError(
                f"{image} has no landmarks: give them as .json or .npy, or name mediapipe's face_landmarker.task in {TASK_FILE}"
            )
        shown = read_image(image)
        try:
            points = detect(shown, task_file)
        except UserError as error:
            raise UserError([f"{image}: {problem}" for problem in error.problems]) from error
        write_text(control, _as_text(points, shown.size))


def find_task_file(named: Path | None = None) -> Path | None:
    """Return the model for `detect`: the one named, else ETHERDIFF_FACE_LANDMARKER's. UserError where there is no such file."""
    path = named or (Path(expand_home(os.environ[TASK_FILE])) if os.environ.get(TASK_FILE) else None)
    if path is None:
        return None
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; {TASK_FILE} names mediapipe's model, face_landmarker.task")
    return path


class NoFaceError(UserError):
    """There is no face in an image."""


def detect(image: Image.Image, task_file: Path) -> FloatArray:
    """Return the landmarks of the first face in an RGB image, by mediapipe Tasks: (K, 2) in pixels.

    Raises:
        UserError: mediapipe is not installed or cannot read the model.
        NoFaceError: it finds no face.
    """
    try:
        import mediapipe
        from mediapipe.tasks.python import BaseOptions, vision
    except ImportError as error:
        raise UserError(
            "landmarks are found by mediapipe, which is not installed here (pip install mediapipe; it breaks "
            "`import controlnet_aux`, so better in an environment of its own). Or give landmarks as .json or .npy files"
        ) from error
    options = vision.FaceLandmarkerOptions(base_options=BaseOptions(model_asset_path=str(task_file)), num_faces=1)
    pixels = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(image.convert("RGB")))
    try:
        with vision.FaceLandmarker.create_from_options(options) as landmarker:
            faces = landmarker.detect(pixels).face_landmarks
    except (RuntimeError, ValueError) as error:
        raise UserError(f"mediapipe cannot work with {task_file} ({str(error).splitlines()[0]})") from error
    if not faces:
        raise NoFaceError("mediapipe finds no face in it")
    return np.array([(point.x * image.width, point.y * image.height) for point in faces[0]], np.float64)


def with_size(control: Path, size: tuple[int, int]) -> Path:
    """Return the file itself if it holds its image's size (or cannot be read), else a copy in the cache that does."""
    try:
        points, own = _read(control)
    except UserError:
        return control  # `problems` finds what is wrong with it
    if own is not None:
        return control
    text = _as_text(points, size)
    copy = cache_dir() / "landmarks-1" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_text(copy, text)
    return copy


def _as_text(points: FloatArray, size: tuple[int, int]) -> str:
    return json.dumps({"points": points.tolist(), "size": list(size)})


def _read(control: Path) -> tuple[FloatArray, tuple[int, int] | None]:
    """Return the points (K, 2) as they are in the file, and the image's size, if that is in it."""
    try:
        if control.suffix.lower() == ".npy":
            content: Any = np.load(control, allow_pickle=False)
        else:
            content = json.loads(read_user_text(control))
        given = content.get("size") if isinstance(content, dict) else None
        points = np.asarray(content["points"] if isinstance(content, dict) else content, np.float64)
        size = None if given is None else (int(given[0]), int(given[1]))
    except Exception as error:  # JSON's, NumPy's, the disk's, and whatever another kind of content makes of it
        raise UserError(f"{control}: cannot be read as points ({type(error).__name__}: {error})") from error
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or not np.isfinite(points).all():
        raise UserError(f"{control}: must hold finite points (K, 2), but its shape is {points.shape}")
    if size is not None and min(size) < 1:
        raise UserError(f"{control}: its image's size is {list(size)}")
    return points, size


def _are_fractions(points: FloatArray) -> bool:
    return bool(np.abs(points).max() <= _MAX_FRACTION)


def _assumed_size(control: Path, points: FloatArray) -> tuple[int, int]:
    if _are_fractions(points):
        return 1, 1
    raise UserError(
        f'{control}: points in pixels, but of an image of what size? Write {{"points": …, "size": [width, height]}}, '
        "or divide them by width and height"
    )
