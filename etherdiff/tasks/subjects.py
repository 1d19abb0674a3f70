"""The subjects to learn: DreamBooth's 30 with their class nouns and prompts, the tiny world's, and any folder of images."""

import contextlib
import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from etherdiff.images.reading import (
    IMAGE_SUFFIXES,
    Photos,
    UnreadableImage,
    describe_files,
    describe_left_out,
    list_images,
    pixels_digest,
    read_image,
)
from etherdiff.system.errors import UserError
from etherdiff.system.files import ASSETS
from etherdiff.system.hub import fetch, find_cached
from etherdiff.system.terminal import warn
from etherdiff.system.text import listed, read_user_text
from etherdiff.tiny.things import SUBJECTS as TINY_SUBJECTS
from etherdiff.tiny.world import PROMPTS as TINY_PROMPTS
from etherdiff.tiny.world import subject_folder

HUB_DATASET = "google/dreambooth"
"""The Hugging Face hub dataset with the 30 subjects, as dataset/NAME/*.jpg."""

HELD_OUT = "held_out"
"""Folder, in a subject's, of further images that nothing is learned from."""

_DREAMBOOTH = json.loads((ASSETS / "dreambooth.json").read_text(encoding="utf-8"))

SUBJECT_CLASSES: dict[str, str] = _DREAMBOOTH["subjects"]
"""DreamBooth's 30 subjects and the class noun of each (prompts_and_classes.txt of the dataset)."""

LIVE_CLASSES = tuple(_DREAMBOOTH["live"])
"""Class nouns that take `LIVE_PROMPTS`; every other takes `OBJECT_PROMPTS`."""

OBJECT_PROMPTS: tuple[str, ...] = tuple(_DREAMBOOTH["object_prompts"])
"""DreamBooth's 25 prompt templates for objects, in the dataset's order."""

LIVE_PROMPTS: tuple[str, ...] = tuple(_DREAMBOOTH["live_prompts"])
"""DreamBooth's 25 prompt templates for live subjects, in the dataset's order."""


SLOT = re.compile(r"\{(identifier|class_noun)\}")
"""A place in a prompt that is filled in."""


@dataclass(frozen=True)
class Subject:
    """What a run learns: its images, and the class noun where it is known (a subject of DreamBooth or of the tiny world)."""

    name: str
    class_noun: str | None
    images: tuple[Path, ...]
    held_out: tuple[Path, ...] = ()
    """Further images, in the subfolder `held_out`, that nothing is trained on: for evaluation."""


def prompts_for(class_noun: str, tiny: bool = False) -> tuple[str, ...]:
    """Return DreamBooth's 25 templates of evaluation prompts, or those of what the tiny base knows."""
    return TINY_PROMPTS if tiny else LIVE_PROMPTS if class_noun in LIVE_CLASSES else OBJECT_PROMPTS


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt in both forms."""

    text: str
    """With the identifier: "a sks dog in the jungle"."""
    plain: str
    """Without it: "a dog in the jungle"."""


def make_prompts(texts: Sequence[str], identifier: str, class_noun: str) -> tuple[EvalPrompt, ...]:
    """Fill in {identifier} and {class_noun}; in the plain form nothing stands for the identifier.

    A text without {identifier} may hold the identifier itself. UserError where it is not clear which word that is.
    """
    templates = [_as_template(text, identifier, class_noun) for text in texts]
    both = [(template, re.sub(r"\{identifier\}\s*", "", template)) for template in templates]
    return tuple(EvalPrompt(*(fill_in(text, identifier, class_noun) for text in forms)) for forms in both)


def fill_in(template: str, identifier: str, class_noun: str) -> str:
    """Fill in {identifier} and {class_noun}, in one pass: what is filled in is not looked at again."""
    values = {"identifier": identifier, "class_noun": class_noun}
    return SLOT.sub(lambda slot: values[slot[1]], template).strip()


def _as_template(text: str, identifier: str, class_noun: str) -> str:
    """Mark the identifier's place in a prompt: before the class noun, else where it stands alone."""
    if "{identifier}" in text:
        return text
    word, noun = re.escape(identifier), re.escape(class_noun)
    parts = re.compile(rf"(?<!\w)(?:(?P<named>{word}(?=\s+{noun}(?!\w)))|(?P<noun>{noun})|(?P<alone>{word}))(?!\w)")
    found = {kind: [part for part in parts.finditer(text) if part.lastgroup == kind] for kind in ("named", "alone")}
    places = found["named"] or found["alone"]
    if found["alone"] and len(places) > 1:
        raise UserError(
            f"prompts: {text!r} holds {identifier!r} more than once: write {{identifier}} where it is the subject's"
        )
    for place in reversed(places):
        text = f"{text[: place.start()]}{{identifier}}{text[place.end() :]}"
    return text


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file, one per line, each once; empty lines and lines that start with # are left out."""
    lines = [line.strip() for line in read_user_text(path).split("\n") if not line.startswith("#")]
    return list(dict.fromkeys(line for line in lines if line))


def photo_of(what: str) -> str:
    """Return the prompt that images are trained on."""
    return f"a photo of {what}"


def warn_of_left_out(subject: Subject) -> None:
    """Warn of what is in the subject's folder and is not read."""
    folder = subject.images[0].parent
    for place, used in ((folder, [HELD_OUT]), (folder / HELD_OUT, [])):
        if _is_folder(place) and (found := describe_left_out(place, used)):
            warn(f"left out of {place}: {found}")


def warn_of_copies(subject: Subject, photos: Photos) -> None:
    """Warn of held-out images that are photos to learn from: scores by them reward copying."""
    shown = {digest: path for path, digest in zip(photos.paths, photos.digests, strict=True)}
    copies = []
    for path in subject.held_out:
        with contextlib.suppress(UnreadableImage):  # what is scored by it says so
            if original := shown.get(pixels_digest(read_image(path))):
                copies.append(f"{HELD_OUT}/{path.name} is {original.name}")
    if copies:
        count = f"{len(copies)} of {len(subject.held_out)} held-out images"
        warn(f"{count} are photos that are trained on ({listed(copies)}): remove them")


def find_subject(subject: str, data_root: Path | None, download: bool = True) -> Subject:
    """Find the images of a folder, else of data_root/dreambooth/NAME, else of a tiny world's subject, else of one of the 30.

    The tiny world's are rendered in the cache, the 30 come from the hub.

    Args:
        subject: a folder of images (absolute, or relative to the working directory), or a subject's name.
        data_root: where --data-root or ETHERDIFF_DATA points.
        download: whether the hub may be asked; else only what is on this machine is found.

    Raises:
        UserError: no such folder or name, no images in it, or the hub did not give them.
    """
    folder = Path(subject)
    if subject.strip() and _is_folder(folder):
        return _from_folder(folder)
    if _is_plain_name(subject) and data_root is not None and _is_folder(data_root / "dreambooth" / subject):
        return _from_folder(data_root / "dreambooth" / subject)
    if subject in TINY_SUBJECTS:
        return _from_folder(subject_folder(subject))
    if subject in SUBJECT_CLASSES:
        return _from_folder(_fetch_from_hub(subject, data_root) if download else _find_cached(subject))
    raise UserError(_why_not_found(subject, folder, data_root))


def _is_folder(path: Path) -> bool:
    return _holds(path.is_dir)


def _holds(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except (OSError, ValueError):  # a name too long or impossible for the file system, a parent not to be entered
        return False


def _is_plain_name(subject: str) -> bool:
    """Return whether a name is one path component that stays in the folder where it is looked up."""
    return bool(subject.strip()) and subject not in (".", "..") and not set(subject) & set("/\\:\0")


def _from_folder(folder: Path) -> Subject:
    name = folder.resolve().name if folder.name in ("", "..") else folder.name
    try:
        images = tuple(list_images(folder))
        if not images:
            content = describe_files(folder.iterdir()) or "nothing"
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise UserError(
                f"no images in {folder}: it holds {content}; images are files that end in {suffixes}, right inside the folder"
            )
        held_out = tuple(list_images(folder / HELD_OUT)) if _is_folder(folder / HELD_OUT) else ()
    except OSError as error:
        raise UserError(f"cannot look into {error.filename}: {error.strerror or error}") from error
    return Subject(name, _class_noun(name), images, held_out)


def _class_noun(name: str) -> str | None:
    return TINY_SUBJECTS[name].class_noun if name in TINY_SUBJECTS else SUBJECT_CLASSES.get(name)


def _fetch_from_hub(name: str, data_root: Path | None) -> Path:
    """Return the folder with the subject's images in the hub's cache; they are downloaded if they are missing."""
    where = f"dataset/{name}"
    snapshot = fetch(
        HUB_DATASET,
        [f"{where}/*.jpg"],
        kind="dataset",
        needed=f"{where}/*.jpg",
        what=f"no images of subject '{name}': tried the folder ./{name} (not there), {_data_root_tried(name, data_root)}, "
        f"and the hub dataset {HUB_DATASET}",
        instead="Pass a folder of images as --subject, or point --data-root or ETHERDIFF_DATA at a folder DATA that holds "
        f"them as DATA/dreambooth/{name}",
    )
    return snapshot / where


def _find_cached(name: str) -> Path:
    snapshot = find_cached(HUB_DATASET, "dataset")
    if snapshot is None:
        raise UserError(f"no images of subject '{name}': the hub's cache has nothing of {HUB_DATASET}")
    return snapshot / "dataset" / name


def _data_root_tried(name: str, data_root: Path | None) -> str:
    if data_root is None:
        return "the data root (none is given)"
    return f"the data root's {data_root / 'dreambooth' / name} (not there)"


def _why_not_found(subject: str, folder: Path, data_root: Path | None) -> str:
    if not subject.strip():
        return "--subject is empty: give a folder of images or a subject's name"
    if _holds(folder.is_file):
        return f"{subject} is a file: give the folder that holds the images as --subject"
    if not _is_plain_name(subject):
        return f"no folder at {subject!r}: give an existing folder of images, or a subject's name such as dog"
    return _why_unknown(subject, data_root)


def _why_unknown(subject: str, data_root: Path | None) -> str:
    local = _subjects_in(data_root)
    close = difflib.get_close_matches(subject.lower(), sorted({*SUBJECT_CLASSES, *TINY_SUBJECTS, *local}), n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    if data_root is None:
        found = "No data root is given (--data-root or ETHERDIFF_DATA)"
    else:
        found = f"Subjects in {data_root / 'dreambooth'}: {', '.join(local) or 'none'}"
    return (
        f"subject '{subject}' is neither a folder nor a known name.{hint} {found}. "
        f"The tiny world's: {', '.join(TINY_SUBJECTS)}. Fetched from the hub by name: {', '.join(SUBJECT_CLASSES)}"
    )


def _subjects_in(data_root: Path | None) -> list[str]:
    if data_root is None:
        return []
    try:
        return sorted(path.name for path in (data_root / "dreambooth").iterdir() if _is_folder(path))
    except OSError:
        return []
