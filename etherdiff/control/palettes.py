"""What the values and colours of a label map mean: ADE20K's palette, the tiny world's, or one from a JSON file."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from etherdiff.system.errors import UserError
from etherdiff.system.paths import ASSETS

ADE20K = ASSETS / "ade20k.json"
"""The 150 classes of ADE20K's scene parsing benchmark, in the order of its label values 1 to 150 (0 is anything else), and
mmsegmentation's colours of them, which ControlNet's annotators draw too.

Road and skyscraper share a colour, so that a coloured map's skyscrapers are read as road; label maps tell them apart.
"""
IGNORED = 255
"""What a pixel that belongs to no class is in a target, whatever it is in the file."""
MAX_CLASSES = 255
_Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Palette:
    """The classes of a dataset, their colours, and the values that they have in its label maps."""

    name: str
    classes: tuple[str, ...]
    colours: tuple[_Colour, ...]
    """RGB of each class."""
    first: int = 0
    """The label value of class 0; the others count up."""
    ignored: tuple[int, ...] = (IGNORED,)
    """Label values of pixels that belong to no class."""

    def as_json(self) -> dict[str, Any]:
        """Everything of it, JSON-able."""
        return json.loads(json.dumps(asdict(self)))

    def digest(self) -> str:
        """SHA-256 over what decides pictures and targets: everything but the name."""
        return hashlib.sha256(json.dumps({**self.as_json(), "name": None}, sort_keys=True).encode()).hexdigest()


def find_palette(named: str) -> Palette:
    """ade20k, tiny, or a JSON file: [[r, g, b], …] or {"class": [r, g, b], …}, in the order of the label values.

    Raises:
        UserError: neither a name nor a file, or not a palette.
    """
    if named == "ade20k":
        colours = json.loads(ADE20K.read_text(encoding="utf-8"))
        return Palette("ade20k", tuple(colours), tuple(map(_colour, colours.values())), first=1, ignored=(0,))
    if named == "tiny":
        from etherdiff.tiny.world import CLASSES, PALETTE

        return Palette("tiny", CLASSES, tuple(map(_colour, PALETTE.tolist())), ignored=())
    path = Path(named).expanduser()
    if not path.is_file():
        raise UserError(
            f'palette {named}: neither ade20k nor tiny nor a file; give a JSON file like {{"sky": [0, 90, 250], …}}'
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"palette {named}: cannot be read as JSON ({error})") from error
    return _from_content(path, content)


def _from_content(path: Path, content: Any) -> Palette:
    colours = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(colours, list) or not colours or not all(map(_is_colour, colours)):
        raise UserError(f'palette {path}: must be [[r, g, b], …] or {{"class": [r, g, b], …}} with integers from 0 to 255')
    if len(colours) > MAX_CLASSES:
        raise UserError(f"palette {path}: {len(colours)} classes, but {MAX_CLASSES} at most can be told apart")
    classes = tuple(content) if isinstance(content, dict) else tuple(f"class {index}" for index in range(len(colours)))
    palette = Palette(path.stem, classes, tuple(map(_colour, colours)))
    twice = [str(list(colour)) for colour, count in Counter(palette.colours).items() if count > 1]
    if twice:
        raise UserError(f"palette {path}: {', '.join(twice)} is the colour of more than one class")
    return palette


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(part) is int and 0 <= part <= 255 for part in value)


def _colour(values: list[int]) -> _Colour:
    red, green, blue = values
    return red, green, blue
