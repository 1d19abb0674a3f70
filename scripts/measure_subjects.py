"""What ETHER+ learns of the tiny world's test subjects: likeness to images nobody trained on, and prompts still followed.

    python scripts/measure_subjects.py --json benchmarks/tiny_subjects.json     # about 5 minutes a subject on 2 cores

Each subject is trained with the command line as it stands. The base draws the same prompts without the identifier.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from PIL import Image
from transformers import UperNetForSemanticSegmentation, ViTModel

from etherdiff.adapters.io import load_adapter
from etherdiff.models import find_base, load_base, make_pipeline
from etherdiff.sampling import sample, sheet
from etherdiff.shipped import ASSETS
from etherdiff.tiny.builder.data import to_tensor
from etherdiff.tiny.captions import ON, UNDER
from etherdiff.tiny.dreambooth import PROMPTS, subject_folder
from etherdiff.tiny.subjects import SUBJECTS
from etherdiff.tiny.world import CLASSES, GROUNDS, SKIES
from etherdiff.ui import quiet_libraries, say, track

TINY = ASSETS / "tiny"
SHOWN = (0, 8, 12, 18)  # prompts on the sheet: a ground, a sky, both, company


def main(
    subjects: Annotated[list[str] | None, typer.Argument(help="names [default: the test subjects]")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="where to write the figures")] = None,
    runs: Annotated[Path, typer.Option(help="where the run folders go; finished ones are not trained again")] = Path(
        "runs/tiny"
    ),
    images: Annotated[int, typer.Option(help="images for each prompt")] = 2,
    options: Annotated[str, typer.Option(help="of train-dreambooth")] = "",
    picture: Annotated[Path | None, typer.Option(help="where to save a sheet of them all")] = None,
) -> None:
    """Train and measure each subject; print the mean over subjects with its standard error."""
    quiet_libraries()
    names = subjects or [name for name, subject in SUBJECTS.items() if subject.split == "test"]
    rows, shown = {}, []
    for name in names:
        run = runs / name
        seconds = _train(name, run, options.split())
        scores, pictures = _measure(name, run, images)
        rows[name] = {**scores, "train_seconds": seconds}
        shown.append([Image.open(subject_folder(name) / "00.png").convert("RGB"), *pictures])
        say(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in rows[name].items()))
    keys = next(iter(rows.values()))
    gains = [row["dino"] - row["dino_base"] for row in rows.values()]
    summary = {key: _mean([row[key] for row in rows.values()]) for key in keys} | {"dino_gain": _mean(gains)}
    text = json.dumps({"options": options, "images_per_prompt": images, "summary": summary, "subjects": rows}, indent=2)
    say(text)
    if json_file:
        json_file.write_text(text + "\n", encoding="utf-8")
    if picture:
        labels = ["to learn", *(PROMPTS[index].format(identifier="sks", class_noun="…") for index in SHOWN)]
        sheet(shown, names, labels).save(picture)


def _train(name: str, run: Path, options: list[str]) -> float:
    """Seconds of the whole command, or those on record."""
    record = run / "seconds.json"
    if not record.exists():
        command = [
            "train-dreambooth",
            "--base",
            "tiny",
            "--subject",
            name,
            "--method",
            "ether+",
            "--output",
            str(run),
            *options,
        ]
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "etherdiff", *command], check=True)
        record.write_text(json.dumps(time.monotonic() - started), encoding="utf-8")
    return float(json.loads(record.read_text(encoding="utf-8")))


@torch.no_grad()
def _measure(name: str, run: Path, images: int) -> tuple[dict[str, float], list[Image.Image]]:
    noun = SUBJECTS[name].class_noun
    dino = ViTModel.from_pretrained(TINY / "dino", add_pooling_layer=False).eval()
    segmenter = UperNetForSemanticSegmentation.from_pretrained(TINY / "upernet").eval()
    held_out = [
        np.asarray(Image.open(path).convert("RGB")) for path in sorted((subject_folder(name) / "held_out").glob("*.png"))
    ]
    seen = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(subject_folder(name).glob("*.png"))]
    real, learnt = _features(dino, held_out), _features(dino, seen)
    scores: dict[str, float] = {"dino_real": float((learnt @ real.T).mean())}
    shown = []
    for kind in ("base", "adapted"):
        model = load_base(find_base("tiny"))
        if kind == "adapted":
            load_adapter(model.unet, run / "adapter")
        pipeline = make_pipeline(model)
        prompts = [p.format(identifier="sks" if kind == "adapted" else "", class_noun=noun).replace("  ", " ") for p in PROMPTS]
        drawn = [sample(pipeline, prompt, range(images), 64) for prompt in track(prompts, f"{name}, {kind}")]
        arrays = [np.asarray(image) for group in drawn for image in group]
        suffix = "" if kind == "adapted" else "_base"
        scores[f"dino{suffix}"] = float((_features(dino, arrays) @ real.T).mean())
        scores[f"place{suffix}"] = _places_right(segmenter, arrays, [p for p in prompts for _ in range(images)])
        shown += [drawn[index][0] for index in SHOWN] if kind == "adapted" else []
    return scores, shown


def _features(dino: ViTModel, images: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
    return F.normalize(dino(to_tensor(np.stack(images))).last_hidden_state[:, 0], dim=-1)


def _places_right(segmenter: torch.nn.Module, images: list[NDArray[np.uint8]], prompts: list[str]) -> float:
    """Share of the skies and grounds that the prompts ask for which are the largest in the picture."""
    maps = segmenter(to_tensor(np.stack(images))).logits.argmax(1).numpy()
    right = []
    for seen, prompt in zip(maps, prompts, strict=True):
        areas = dict(zip(CLASSES, np.bincount(seen.ravel(), minlength=len(CLASSES)), strict=True))
        for phrases, group in ((ON, GROUNDS), (UNDER, SKIES)):
            asked = [place for place, words in phrases.items() if any(prompt.endswith(w) or f"{w} " in prompt for w in words)]
            right += [max(group, key=areas.__getitem__) == asked[0]] if asked else []
    return float(np.mean(right))


def _mean(values: list[float]) -> dict[str, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {"mean": statistics.mean(values), "standard_error": error}


if __name__ == "__main__":
    typer.run(main)
