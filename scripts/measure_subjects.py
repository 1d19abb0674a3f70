"""What ETHER+ learns of the tiny world's test subjects: likeness to images nobody trained on, and prompts still followed.

    python scripts/measure_subjects.py --json subjects.json --picture subjects.png   # 4 minutes each

Each subject is trained and scored with the command line as it stands; what is finished is not done again.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from tiny_world.data import to_tensor
from transformers import UperNetForSemanticSegmentation

from etherdiff.images.writing import contact_sheet
from etherdiff.system.files import ASSETS
from etherdiff.system.terminal import quiet_libraries, say
from etherdiff.tiny.things import SUBJECTS
from etherdiff.tiny.world import CLASSES, GROUNDS, ON, PROMPTS, SKIES, UNDER, subject_folder

SCORES = ("dino_held_out", "clip_i_held_out", "clip_t")
OPTIONS = "--method ether+ --learning-rate 0.02 --debiased-estimation --steps 300 --batch-size 4 --eval-every 150"
SHOWN = (0, 3, 6, 9, 15, 17)  # prompts on the picture
ENLARGED = 2


def main(
    subjects: Annotated[list[str] | None, typer.Argument(help="names [default: the test subjects]")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="where to write the figures")] = None,
    runs: Annotated[Path, typer.Option(help="where the run folders go")] = Path("runs/tiny"),
    options: Annotated[str, typer.Option(help="of train-dreambooth")] = OPTIONS,
    num: Annotated[int, typer.Option(help="images per prompt")] = 4,
    picture: Annotated[Path | None, typer.Option(help="where to save a sheet of them all")] = None,
) -> None:
    """Train and score each subject; print the mean over subjects with its standard error."""
    quiet_libraries()
    names = subjects or [name for name, subject in SUBJECTS.items() if subject.split == "test"]
    rows = {name: _measure(name, runs / name, options, num) for name in names}
    gains = [row["dino_held_out"]["mean"] - row["base_dino_held_out"]["mean"] for row in rows.values()]
    summary = {"dino_gain": _mean(gains), "train_seconds": _mean([row["train_seconds"] for row in rows.values()])}
    for key in (*SCORES, *(f"base_{name}" for name in SCORES)):
        summary[key] = _mean([row[key]["mean"] for row in rows.values()])
    for key in ("place", "base_place"):
        summary[key] = _mean([row[key] for row in rows.values()])
    text = json.dumps({"options": options, "num": num, "summary": summary, "subjects": rows}, indent=2)
    say(text)
    if json_file:
        json_file.write_text(text + "\n", encoding="utf-8")
    if picture:
        picture.parent.mkdir(parents=True, exist_ok=True)
        _sheet(names, runs).save(picture)


def _measure(name: str, run: Path, options: str, num: int) -> dict[str, Any]:
    seconds = run / "seconds.json"
    if not (run / "adapter.sha256.json").exists():
        started = time.monotonic()
        _etherdiff("train-dreambooth", "--base", "tiny", "--subject", name, "--output", str(run), *options.split())
        seconds.write_text(json.dumps(time.monotonic() - started), encoding="utf-8")
    if not (run / "eval" / "metrics.json").exists():
        _etherdiff("eval", str(run), "--num", str(num))
    result = json.loads((run / "eval" / "metrics.json").read_text(encoding="utf-8"))
    row: dict[str, Any] = {"train_seconds": json.loads(seconds.read_text(encoding="utf-8"))}
    for key in SCORES:
        for prefix, found in (("", result["scores"][key]), ("base_", result["base"]["scores"][key])):
            row[prefix + key] = {part: found[part] for part in ("mean", "low", "high")}
    row["place"], row["base_place"] = (_places_right(run / "eval" / kind) for kind in ("images", "base_images"))
    return row


def _etherdiff(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "etherdiff", *arguments], check=True)


@torch.no_grad()
def _places_right(folder: Path) -> float:
    """Share of the skies and grounds that the prompts ask for which are the largest in the picture."""
    segmenter = UperNetForSemanticSegmentation.from_pretrained(ASSETS / "tiny" / "upernet").eval()
    right: list[bool] = []
    for number, prompt in enumerate(PROMPTS):
        (place,) = folder.glob(f"{number:03d}-*")
        images = np.stack([_read(path) for path in sorted(place.glob("*.png"))])
        for seen in segmenter(to_tensor(images)).logits.argmax(1).numpy():
            areas = dict(zip(CLASSES, np.bincount(seen.ravel(), minlength=len(CLASSES)), strict=True))
            for phrases, group in ((ON, GROUNDS), (UNDER, SKIES)):
                asked = [name for name, words in phrases.items() if any(prompt.endswith(w) or f"{w} " in prompt for w in words)]
                right += [max(group, key=areas.__getitem__) == asked[0]] if asked else []
    return float(np.mean(right))


def _read(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


def _sheet(names: list[str], runs: Path) -> Image.Image:
    """A row per subject: one of its photos, and what the run drew for some prompts at the first seed."""
    pictures = []
    for name in names:
        pictures.append(_enlarged(subject_folder(name) / "00.png"))
        folder = runs / name / "eval" / "images"
        pictures += [_enlarged(next(folder.glob(f"{number:03d}-*")) / "0.png") for number in SHOWN]
    labels = ["to learn", *(PROMPTS[number].format(identifier="sks", class_noun="…") for number in SHOWN)]
    return contact_sheet(pictures, len(labels), [name.replace("_", " ") for name in names], labels)


def _enlarged(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGB")
    return image.resize((image.width * ENLARGED, image.height * ENLARGED), Image.Resampling.NEAREST)


def _mean(values: list[float]) -> dict[str, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {"mean": statistics.mean(values), "standard_error": error}


if __name__ == "__main__":
    typer.run(main)
