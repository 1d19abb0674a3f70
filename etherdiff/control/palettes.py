"""What the values and colours of a label map mean: ADE20K's palette, the tiny world's, or one from a JSON file."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from etherdiff.system.errors import UserError

IGNORED = 255
"""What a pixel that belongs to no class is in a target, whatever it is in the file."""
MOST_CLASSES = 255
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
        return Palette("ade20k", ADE20K_CLASSES, ADE20K_COLOURS, first=1, ignored=(0,))
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
    if len(colours) > MOST_CLASSES:
        raise UserError(f"palette {path}: {len(colours)} classes, but {MOST_CLASSES} at most can be told apart")
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


ADE20K_CLASSES = tuple(
    " ".join(name.split())
    for name in [
        "\n    wall",
        " building",
        " sky",
        " floor",
        " tree",
        " ceiling",
        " road",
        " bed",
        " windowpane",
        " grass",
        " cabinet",
        " sidewalk",
        " person",
        " earth",
        " door",
        " table",
        "\n    mountain",
        " plant",
        " curtain",
        " chair",
        " car",
        " water",
        " painting",
        " sofa",
        " shelf",
        " house",
        " sea",
        " mirror",
        " rug",
        " field",
        " armchair",
        " seat",
        "\n    fence",
        " desk",
        " rock",
        " wardrobe",
        " lamp",
        " bathtub",
        " railing",
        " cushion",
        " base",
        " box",
        " column",
        " signboard",
        " chest of drawers",
        " counter",
        "\n    sand",
        " sink",
        " skyscraper",
        " fireplace",
        " refrigerator",
        " grandstand",
        " path",
        " stairs",
        " runway",
        " case",
        " pool table",
        " pillow",
        "\n    screen door",
        " stairway",
        " river",
        " bridge",
        " bookcase",
        " blind",
        " coffee table",
        " toilet",
        " flower",
        " book",
        " hill",
        " bench",
        " countertop",
        "\n    stove",
        " palm",
        " kitchen island",
        " computer",
        " swivel chair",
        " boat",
        " bar",
        " arcade machine",
        " hovel",
        " bus",
        " towel",
        " light",
        " truck",
        " tower",
        "\n    chandelier",
        " awning",
        " streetlight",
        " booth",
        " television receiver",
        " airplane",
        " dirt track",
        " apparel",
        " pole",
        " land",
        " bannister",
        "\n    escalator",
        " ottoman",
        " bottle",
        " buffet",
        " poster",
        " stage",
        " van",
        " ship",
        " fountain",
        " conveyer belt",
        " canopy",
        " washer",
        " plaything",
        "\n    swimming pool",
        " stool",
        " barrel",
        " basket",
        " waterfall",
        " tent",
        " bag",
        " minibike",
        " cradle",
        " oven",
        " ball",
        " food",
        " step",
        " tank",
        " trade name",
        "\n    microwave",
        " pot",
        " animal",
        " bicycle",
        " lake",
        " dishwasher",
        " screen",
        " blanket",
        " sculpture",
        " hood",
        " sconce",
        " vase",
        " traffic light",
        " tray",
        "\n    ashcan",
        " fan",
        " pier",
        " crt screen",
        " plate",
        " monitor",
        " bulletin board",
        " shower",
        " radiator",
        " glass",
        " clock",
        " flag\n    ",
    ]
)
"""The 150 classes of ADE20K's scene parsing benchmark, in the order of its label values 1 to 150; 0 is anything else."""

ADE20K_COLOURS = tuple(
    _colour(list(bytes.fromhex(colour)))
    for colour in [
        "787878",
        "b47878",
        "06e6e6",
        "503232",
        "04c803",
        "787850",
        "8c8c8c",
        "cc05ff",
        "e6e6e6",
        "04fa07",
        "e005ff",
        "ebff07",
        "96053d",
        "787846",
        "08ff33",
        "ff0652",
        "8fff8c",
        "ccff04",
        "ff3307",
        "cc4603",
        "0066c8",
        "3de6fa",
        "ff0633",
        "0b66ff",
        "ff0747",
        "ff09e0",
        "0907e6",
        "dcdcdc",
        "ff095c",
        "7009ff",
        "08ffd6",
        "07ffe0",
        "ffb806",
        "0aff47",
        "ff290a",
        "07ffff",
        "e0ff08",
        "6608ff",
        "ff3d06",
        "ffc207",
        "ff7a08",
        "00ff14",
        "ff0829",
        "ff0599",
        "0633ff",
        "eb0cff",
        "a09614",
        "00a3ff",
        "8c8c8c",
        "fa0a0f",
        "14ff00",
        "1fff00",
        "ff1f00",
        "ffe000",
        "99ff00",
        "0000ff",
        "ff4700",
        "00ebff",
        "00adff",
        "1f00ff",
        "0bc8c8",
        "ff5200",
        "00fff5",
        "003dff",
        "00ff70",
        "00ff85",
        "ff0000",
        "ffa300",
        "ff6600",
        "c2ff00",
        "008fff",
        "33ff00",
        "0052ff",
        "00ff29",
        "00ffad",
        "0a00ff",
        "adff00",
        "00ff99",
        "ff5c00",
        "ff00ff",
        "ff00f5",
        "ff0066",
        "ffad00",
        "ff0014",
        "ffb8b8",
        "001fff",
        "00ff3d",
        "0047ff",
        "ff00cc",
        "00ffc2",
        "00ff52",
        "000aff",
        "0070ff",
        "3300ff",
        "00c2ff",
        "007aff",
        "00ffa3",
        "ff9900",
        "00ff0a",
        "ff7000",
        "8fff00",
        "5200ff",
        "a3ff00",
        "ffeb00",
        "08b8aa",
        "8500ff",
        "00ff5c",
        "b800ff",
        "ff001f",
        "00b8ff",
        "00d6ff",
        "ff0070",
        "5cff00",
        "00e0ff",
        "70e0ff",
        "46b8a0",
        "a300ff",
        "9900ff",
        "47ff00",
        "ff00a3",
        "ffcc00",
        "ff008f",
        "00ffeb",
        "85ff00",
        "ff00eb",
        "f500ff",
        "ff007a",
        "fff500",
        "0abed4",
        "d6ff00",
        "00ccff",
        "1400ff",
        "ffff00",
        "0099ff",
        "0029ff",
        "00ffcc",
        "2900ff",
        "29ff00",
        "ad00ff",
        "00f5ff",
        "4700ff",
        "7a00ff",
        "00ffb8",
        "005cff",
        "b8ff00",
        "0085ff",
        "ffd600",
        "19c2c2",
        "66ff00",
        "5c00ff",
    ]
)
"""mmsegmentation's colours of them, which ControlNet's annotators draw too.

Road and skyscraper share one, so that a coloured map's skyscrapers are read as road; label maps tell them apart.
"""
