"""COCO 2017: train2017/, val2017/ and the captions of both; the first caption of each image is taken."""

from pathlib import Path

from etherdiff.control.readers import Listing, Row
from etherdiff.images.reading import list_images
from etherdiff.system.errors import UserError
from etherdiff.system.text import read_user_json

SPLITS = ("train2017", "val2017")


def read_coco(root: Path, captions: Path | None) -> Listing:
    """Return images without controls, with the captions of annotations/, or of the file named.

    Raises:
        UserError: a folder or the captions are missing or cannot be read.
    """
    wanted = [root / split for split in SPLITS]
    if captions is None:
        wanted += [_annotations(root, split) for split in SPLITS]
    missing = [str(path) for path in wanted if not path.exists()]
    if missing:
        raise UserError([f"coco-canny: {path} is missing" for path in missing])
    listing = Listing()
    listing.training, listing.evaluation = (_read_split(root, split, captions is None, listing) for split in SPLITS)
    if captions is not None:
        listing.describe([captions])
    listing.note_left_out(root, *SPLITS)
    return listing


def _read_split(root: Path, split: str, has_captions: bool, listing: Listing) -> list[Row]:
    texts = _first_captions(_annotations(root, split)) if has_captions else {}
    images = list_images(root / split)
    listing.report_twins("images", root, images)
    return [Row(path.stem, path, None, texts.get(path.name) or None) for path in images]


def _annotations(root: Path, split: str) -> Path:
    return root / "annotations" / f"captions_{split}.json"


def _first_captions(path: Path) -> dict[str, str]:
    """Return captions by the image's name: of several captions, the one with the lowest id."""
    content = read_user_json(path)
    try:
        names = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
        last_first = sorted(content["annotations"], key=lambda one: one["id"], reverse=True)
        return {names[one["image_id"]]: one["caption"].strip() for one in last_first if one["image_id"] in names}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as COCO's captions ({type(error).__name__}: {error})") from error
