"""Small datasets of scenes and short controllable runs on them."""

import json
from pathlib import Path

from PIL import Image

from etherdiff.config import S2IConfig
from etherdiff.tiny.world import render_scene

STEPS = 4


def scenes_folder(folder: Path, training: int = 6, validation: int = 2) -> Path:
    """A dataset in the imagefolder style: scenes of the tiny world, label maps, captions that name one thing."""
    for split, count in (("train", training), ("validation", validation)) if validation else (("train", training),):
        place = folder / split
        (place / "images").mkdir(parents=True)
        (place / "maps").mkdir()
        lines = []
        for index in range(count):
            scene, name = render_scene("train" if split == "train" else "validation", index), f"{index:03d}.png"
            Image.fromarray(scene.image).save(place / "images" / name)
            Image.fromarray(scene.segmentation).save(place / "maps" / name)
            lines.append(json.dumps({"image": f"images/{name}", "control": f"maps/{name}", "text": scene.short_caption}))
        (place / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def s2i_config(output: Path, **options) -> S2IConfig:
    """A run with all that keeps state; its dataset lies beside it."""
    dataset = output.parent / "scenes"
    if not dataset.exists():
        scenes_folder(dataset)
    settings = {
        "base": "tiny",
        "dataset": str(dataset),
        "palette": "tiny",
        "output": output,
        "tracker": "none",
        "device": "cpu",
        "steps": STEPS,
        "batch_size": 2,
        "checkpoint_every": 2,
        "eval_every": 2,
        "ema_decay": 0.9,
        "flip": True,
        "caption_dropout": 0.3,
        "seed": 3,
    }
    return S2IConfig(**(settings | options))
