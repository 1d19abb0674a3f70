"""ADE20K as MIT hands it out, for scene parsing: images/ and annotations/, each with training/ and validation/."""

from pathlib import Path

from etherdiff.control.readers import Listing, Row
from etherdiff.images.reading import list_images
from etherdiff.system.errors import UserError

FOLDERS = ("ade20k", "ade20k/ADEChallengeData2016", "ADEChallengeData2016")
CAPTION_FILES = ("captions.jsonl", "prompt_train.json", "prompt_val.json")
HUB_DATASET = "limingcv/Captioned_ADE20K"


def find_ade20k(data_root: Path | None) -> Path | None:
    """Return the folder that holds images/ and annotations/ in the data root, if one does."""
    if data_root is None:
        return None
    return next((data_root / name for name in FOLDERS if (data_root / name / "images").is_dir()), None)


def read_ade20k(root: Path, captions: Path | None) -> Listing:
    """Return images and label maps of one stem, with captions from the file named, else from those next to them.

    Raises:
        UserError: a caption file cannot be read, or a folder is missing.
    """
    missing = [
        str(root / kind / split)
        for kind in ("images", "annotations")
        for split in ("training", "validation")
        if not (root / kind / split).is_dir()
    ]
    if missing:
        raise UserError([f"ade20k: {folder} is missing" for folder in missing])
    nearby = [root / name for name in CAPTION_FILES] + [root.parent / name for name in CAPTION_FILES]
    listing = Listing()
    listing.training = _read_split(root, "training", listing)
    listing.evaluation = _read_split(root, "validation", listing)
    listing.describe([captions] if captions else [path for path in nearby if path.is_file()])
    kinds, splits = ("images", "annotations"), ("training", "validation")
    listing.note_left_out(root, *(f"{kind}/{split}" for kind in kinds for split in splits))
    return listing


def _read_split(root: Path, split: str, listing: Listing) -> list[Row]:
    images: dict[str, Path] = {}
    maps: dict[str, Path] = {}
    for kind, folder, found in (("images", "images", images), ("label maps", "annotations", maps)):
        files = list_images(root / folder / split)
        listing.report_twins(kind, root, files)
        found |= {path.stem: path for path in files}
    for stem in [stem for stem in images if stem not in maps]:
        listing.report("images without a label map", f"{split}/{images[stem].name}")
    for stem in [stem for stem in maps if stem not in images]:
        listing.report("label maps without an image", f"{split}/{maps[stem].name}")
    return [Row(stem, path, maps[stem], None) for stem, path in images.items() if stem in maps]
