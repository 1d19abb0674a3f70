"""Captions: from files that others wrote, and from BLIP where there are none."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from etherdiff.images.reading import read_image
from etherdiff.system.errors import UserError
from etherdiff.system.files import cache_dir, file_hash
from etherdiff.system.terminal import track
from etherdiff.system.text import listed, read_user_json, read_user_text

BLIP = "Salesforce/blip-image-captioning-base"
MAX_NEW_TOKENS = 40
BATCH = 8
IMAGE_KEYS = ("image", "file_name", "target")
CONTROL_KEYS = ("control", "conditioning_image", "conditioning", "source")
TEXT_KEYS = ("text", "prompt", "caption")
"""What the fields of a line are called, here and elsewhere; the first that a line has counts."""
_EXAMPLES = 5


@dataclass(frozen=True)
class Caption:
    """One entry of a caption file."""

    name: str
    """The image's (or control's) path as the file has it; its folders may be those of another machine."""
    text: str
    where: str
    """File and line."""

    def likeness(self, image: Path) -> tuple[int, bool]:
        """Return how many folders above the file the two paths share, and whether the files' whole names are one."""
        own, other = _parts(self.name), _parts(str(image))
        shared = (one == two for one, two in zip(own[-2::-1], other[-2::-1], strict=False))
        return sum(1 for _ in takewhile(bool, shared)), own[-1] == other[-1]


def read_captions(path: Path) -> list[Caption]:
    """Return what a caption file lists: lines of JSON with an image (or a control) and a text.

    A JSON array of such objects, or one object {"image": "text", …}, does as well.

    Raises:
        UserError: unreadable, or lines that are something else.
    """
    found, wrong = [], []
    for where, entry in _entries(path):
        image = first_of(entry, (*IMAGE_KEYS, *CONTROL_KEYS))
        text = first_of(entry, TEXT_KEYS)
        if isinstance(image, str) and _parts(image) and isinstance(text, str):
            found.append(Caption(image, text.strip(), f"{path.name}, {where}"))
        else:
            wrong.append(where)
    if wrong:
        more = ", …" if len(wrong) > _EXAMPLES else ""
        raise UserError(
            f"{path}: {len(wrong)} entries without an image ({', '.join(IMAGE_KEYS)}) and a text ({', '.join(TEXT_KEYS)}): "
            f"{', '.join(wrong[:_EXAMPLES])}{more}"
        )
    return found


def match_captions(captions: Iterable[Caption], images: Iterable[Path]) -> dict[Path, str]:
    """Return the caption of each image that has one.

    A caption belongs to the image of its stem; of several such images to the one whose folders it shares most, from the file
    upwards. So the files may have been moved, and their format may be another.

    Raises:
        UserError: a caption fits several images, or several different captions fit one.
    """
    by_stem: dict[str, list[Path]] = {}
    for image in dict.fromkeys(images):
        by_stem.setdefault(_stem(image.name), []).append(image)
    given: dict[Path, list[tuple[tuple[int, bool], Caption]]] = {}
    unclear = []
    for caption in captions:
        fitting = by_stem.get(_stem(caption.name), [])
        most = max(map(caption.likeness, fitting), default=(0, False))
        best = [image for image in fitting if caption.likeness(image) == most]
        if len(best) > 1:
            unclear.append(f"{caption.where}: {caption.name} may be {listed(list(map(str, best)))}; give more of its path")
        elif best:
            given.setdefault(best[0], []).append((most, caption))
    found = {}
    for image, known in given.items():
        likeness = max(one for one, _ in known)
        fit = [caption for one, caption in known if one == likeness]
        if len({caption.text for caption in fit}) > 1:
            unclear.append(f"{image} has several captions ({listed([caption.where for caption in fit])}); keep one of them")
        found[image] = fit[0].text
    if unclear:
        more = [f"… and {len(unclear) - _EXAMPLES:,} more"] if len(unclear) > _EXAMPLES else []
        raise UserError([f"captions: {sentence}" for sentence in unclear[:_EXAMPLES] + more])
    return found


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, content) of a file with one JSON value per line; None for a line that is not JSON; no blank lines.

    Raises:
        UserError: the file cannot be read as text.
    """
    for number, line in enumerate(read_user_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                yield number, None


def first_of(entry: Any, keys: Sequence[str]) -> Any:
    """Return what an object has under the first of these keys that it has; None otherwise."""
    return next((entry[key] for key in keys if key in entry), None) if isinstance(entry, dict) else None


def make_captions(images: Sequence[Path], device: str = "auto", model: str = BLIP, batch_size: int = BATCH) -> list[str]:
    """Return a caption for each image file, by BLIP; those made before come from the cache.

    Args:
        model: a hub id or a folder with a BlipForConditionalGeneration and its processor.

    Raises:
        UserError: the model cannot be had, or images cannot be read.
    """
    hashes = _hashes(images)
    cache = cache_dir() / "captions-1" / f"{_model_key(model)}.jsonl"
    made = _read_made(cache)
    missing: dict[str, Path] = {}
    for content, path in zip(hashes, images, strict=True):
        if content not in made:
            missing.setdefault(content, path)
    if missing:
        describe = _load(model, device)
        cache.parent.mkdir(parents=True, exist_ok=True)
        todo = list(missing.items())
        for start in track(range(0, len(todo), batch_size), f"captions by {model}"):
            part = todo[start : start + batch_size]
            texts = describe([path for _, path in part])
            made |= dict(zip([content for content, _ in part], texts, strict=True))
            lines = [json.dumps({"sha256": content, "text": made[content]}) for content, _ in part]
            with cache.open("a", encoding="utf-8") as file:  # at once: a stopped run goes on where it was
                file.write("\n" + "\n".join(lines) + "\n")  # the first ends a line that a kill cut short
    return [made[content] for content in hashes]


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where, object) of everything that a caption file lists."""
    lines = list(read_lines(path))
    if len(lines) == 1 or (lines and lines[0][1] is None):  # not one object per line: one value in all?
        try:
            whole = read_user_json(path)
        except UserError:
            whole = None
        if isinstance(whole, list):
            yield from ((f"entry {number}", entry) for number, entry in enumerate(whole, 1))
            return
        if isinstance(whole, dict) and first_of(whole, TEXT_KEYS) is None:
            yield from ((name, {"image": name, "text": text}) for name, text in whole.items())
            return
    yield from ((f"line {number}", entry) for number, entry in lines)


def _parts(name: str) -> list[str]:
    """Return folders and name of a path, whichever system wrote it."""
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]


def _stem(name: str) -> str:
    return PurePosixPath(_parts(name)[-1]).stem


def _hashes(images: Sequence[Path]) -> list[str]:
    try:
        return [file_hash(path) for path in images]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _model_key(model: str) -> str:
    """Return what distinguishes models: the hub id, or the hashes of a folder's files."""
    folder = Path(model)
    if not folder.is_dir():
        return model.replace("/", "--")
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".txt"))
    return hashlib.sha256("".join(f"{path.name} {file_hash(path)}\n" for path in files).encode()).hexdigest()


def _read_made(cache: Path) -> dict[str, str]:
    """Read the captions made earlier. A last line that a kill cut short is left out, and made again."""
    if not cache.is_file():
        return {}
    entries = [entry for _, entry in read_lines(cache) if isinstance(entry, dict)]
    return {entry["sha256"]: entry["text"] for entry in entries if {"sha256", "text"} <= entry.keys()}


def _load(model: str, device: str) -> Callable[[list[Path]], list[str]]:
    """Return what describes a batch of image files."""
    import torch
    from transformers import AutoProcessor, BlipForConditionalGeneration

    from etherdiff.system.devices import device_problem, resolve_device
    from etherdiff.system.terminal import quiet_libraries

    if problem := device_problem(device):
        raise UserError(problem)
    quiet_libraries()
    place = resolve_device(device)
    try:
        processor = AutoProcessor.from_pretrained(model)
        blip = BlipForConditionalGeneration.from_pretrained(model, use_safetensors=True, dtype=torch.float32)
    except Exception as error:  # the hub's own, its HTTP library's, transformers', the disk's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"captions: {model} cannot be loaded ({reason}). Without a network, write captions yourself: "
            'a file with a line {"image": …, "text": …} per image, named with --captions'
        ) from error
    blip = blip.eval().to(place)

    def describe(paths: list[Path]) -> list[str]:
        images = [read_image(path) for path in paths]
        pixels = processor(images=images, return_tensors="pt").to(place)
        with torch.inference_mode():
            tokens = blip.generate(**pixels, max_new_tokens=MAX_NEW_TOKENS, num_beams=3, do_sample=False)
        return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]

    return describe
