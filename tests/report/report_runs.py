"""Run folders written by hand, as training and `etherdiff eval` leave them, with small pictures."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from PIL import Image, ImageDraw

from etherdiff.adapters.io import load_adapter, merge_adapter, save_adapter
from etherdiff.adapters.methods import ATTENTION, MethodOptions, add_adapter, magnitude_config
from etherdiff.config import DreamBoothConfig, S2IConfig
from etherdiff.families.bases import find_base
from etherdiff.families.diffusion import slug
from etherdiff.families.sd1 import Base, fingerprint, load_base
from etherdiff.images.writing import save_png
from etherdiff.runs.folder import RunFolder, write_settings
from etherdiff.tasks.subjects import make_prompts, prompts_for

PLACES = ["#dfe9f2", "#c9dfb8", "#f2e2c4", "#d9d2ea", "#f4d0cf", "#cfe8e4"]
SCORES = {  # the run's, its base's, the real images'
    "dino": (0.643, 0.402, "dino_real_images", 0.781),
    "clip_i": (0.812, 0.655, "clip_i_real_images", 0.874),
    "clip_t": (0.251, 0.268, None, None),
    "lpips_to_real": (0.612, 0.741, "lpips_real_images", 0.498),
    "lpips_diversity": (0.403, 0.566, None, None),
}


def picture(seed: int, adapted: bool = True, side: int = 64) -> Image.Image:
    """A ball on a ground: striped and red where the model has learnt it, else of any colour."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), PLACES[seed % len(PLACES)])
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, side * 2 // 3, side, side], fill="#9fb08a")
    x, y = rng.integers(side // 3, side * 2 // 3, 2)
    radius = side // 4
    colour = "#c8322b" if adapted else "#{:02x}{:02x}{:02x}".format(*rng.integers(40, 220, 3))
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    if adapted:
        draw.rectangle([x - radius, y - radius // 5, x + radius, y + radius // 5], fill="#f7f2e0")
    return image


def write_run(path: Path, base: Base | None = None, method: str = "ether+", **settings: Any) -> Path:
    """run.yaml, and an adapter away from its start where a base is given; nothing else."""
    path.mkdir(parents=True)
    told = {"base": "tiny" if base else "sd15", "subject": "red_ball", "class_noun": "ball", "steps": 1200}
    config = DreamBoothConfig(method=method, output=path, **(told | settings))
    facts: dict[str, Any] = {"subject_prompt": f"a photo of {config.identifier} {config.class_noun}"}
    if base is not None:
        facts["base"] = {"name": base.name, "path": str(base.local_path), "fingerprint": fingerprint(base)}
        adapted = add_adapter(load_base(base).unet, method, MethodOptions())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        save_adapter(adapted, RunFolder(path).adapter, facts["base"])
    write_settings(RunFolder(path), "dreambooth", config, facts)
    return path


def write_refitted_run(path: Path) -> Path:
    """A run of train-s2i that learned magnitudes on top of an OFT, which is beside it as a run of its own."""
    base = find_base("tiny")
    oft = write_run(path.parent / "oft", base, "oft")
    path.mkdir()
    run = RunFolder(path)
    shutil.copytree(RunFolder(oft).adapter, run.refitted_adapter)
    unet = merge_adapter(load_adapter(load_base(base).unet, run.refitted_adapter))
    magnitudes = get_peft_model(unet, magnitude_config(ATTENTION))
    with torch.no_grad():
        for parameter in magnitudes.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    recorded = {"name": base.name, "path": str(base.local_path), "fingerprint": fingerprint(base)}
    save_adapter(magnitudes, run.adapter, recorded)
    config = S2IConfig(base="tiny", dataset="stripes", method="oft", refit=oft, output=path, targets="attention")
    write_settings(run, "s2i", config, {"base": recorded})
    return path


def write_curves(path: Path, steps: int = 1200, every: int = 200, seed: int = 0) -> None:
    """metrics.jsonl, cost.json and best/best.json."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "loss": 0.12 + 0.1 * math.exp(-step / 300) + 0.05 * float(rng.standard_normal()),
            "learning_rate": 6e-3,
        }
        if step % every == 0:
            share = step / steps
            row |= {
                "validation_loss": 0.14 + 0.08 * math.exp(-2 * share) + 0.02 * share**4,
                "dino": 0.4 + 0.26 * math.sin(min(share / 0.85, 1.1) * math.pi / 2),
                "clip_t": 0.268 - 0.02 * share,
            }
        rows.append(row)
    rows[steps // 30]["loss"] = None
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seconds = {"prepare": 21.4, "class_images": 312.9, "train": 1843.0}
    cost = {
        "seconds": seconds,
        "steps": steps,
        "images_per_second": 1.302,
        "peak_memory_bytes": 9_663_676_416,
        "processes": 1,
        "device": "NVIDIA A100-SXM4-40GB",
    }
    (path / "cost.json").write_text(json.dumps(cost))
    (path / "best").mkdir(exist_ok=True)
    best = {
        "step": 1000,
        "score": 0.4075,
        "why": "step 1000 is the best of 6 evaluations: √(DINO · CLIP-T) = 0.4075 (DINO 0.6610 to the training images)",
    }
    (path / "best" / "best.json").write_text(json.dumps(best))


def write_evaluation(path: Path, prompts: list[str] | None = None, seeds: int = 4, side: int = 64, black: bool = True) -> None:
    """eval/ with images of the run and of its base, metrics.json and cost.json."""
    prompts = [prompt.text for prompt in make_prompts(prompts_for("ball"), "sks", "ball")] if prompts is None else prompts
    folder = path / "eval"
    per_prompt = []
    for number, prompt in enumerate(prompts):
        for name, adapted in (("images", True), ("base_images", False)):
            place = folder / name / f"{number:03d}-{'ball' if adapted else 'plain'}"
            place.mkdir(parents=True)
            for seed in range(seeds):
                is_black = black and adapted and (number, seed) == (1, 2)
                image = Image.new("RGB", (side, side)) if is_black else picture(7 * number + seed, adapted, side)
                save_png(image, place / f"{seed}.png", {"prompt": prompt, "seed": seed})
        wobble = 0.06 * math.sin(3 * number)
        means = {name: {"mean": mean + wobble, "n": seeds, "pairs": 5 * seeds} for name, (mean, *_) in SCORES.items()}
        per_prompt.append({"prompt": prompt, "plain_prompt": prompt, "seeds": list(range(seeds)), "n": seeds, "scores": means})
    left_out = {"black": [{"kind": "generated", "prompt": prompts[1 % len(prompts)], "seed": 2}]} if black else {"black": []}
    others: dict[str, list] = {"unreadable": [], "bad_features": [], "missing": [], "long_prompts": []}
    scores, base_scores = {}, {}
    for name, (mean, base, baseline, real) in SCORES.items():
        scores[name], base_scores[name] = score(mean), score(base)
        if baseline:
            scores[baseline] = score(real, n=5, over="real images")
    scores["dino_held_out"] = score(0.601)
    result = {
        "scores": scores,
        "per_prompt": per_prompt,
        "left_out": left_out | others,
        "not_scored": {"fid": "100 images of 64 features: at least 128 are needed"},
        "base": {"scores": base_scores, "left_out": {"black": [], **others}, "not_scored": {}},
        "run": {"name": path.name, "subject": "red_ball", "checkpoint": "best", "step": 1000},
        "paper": {
            "scope": "30 subjects, 25 prompts each, 4 images per prompt, Stable Diffusion 1.5",
            "scores": {
                "dino": {"value": 0.666, "differs": []},
                "clip_t": {"value": 0.240, "differs": ["prompts without identifier"]},
                "dino_real_images": {"value": 0.703, "differs": []},
            },
        },
    }
    (folder / "metrics.json").write_text(json.dumps(result))
    (folder / "cost.json").write_text(json.dumps({"seconds": {"draw": 260.0, "score": 31.5}}))


def score(mean: float, n: int = 100, over: str = "prompts") -> dict[str, Any]:
    identity = {
        "definition": "mean cosine over all pairs",
        "backbone": {"name": "facebook/dino-vits16", "revision": "0123abc", "weights_sha256": "ab" * 32},
        "seeds": [0, 1, 2, 3],
    }
    interval = {"level": 0.95, "over": over, "draws": 2000, "seed": 0}
    return {
        "mean": mean,
        "low": mean - 0.031,
        "high": mean + 0.028,
        "interval": interval,
        "n": n,
        "pairs": 5 * n,
        "identity": identity,
    }


def write_samples(path: Path, steps: tuple[int, ...] = (400, 800, 1200), side: int = 64) -> None:
    """samples/ of two prompts."""
    prompts = ["a photo of sks ball", "a sks ball in the snow"]
    for name in ("base", *(f"step-{step:06d}" for step in steps)):
        adapted = name != "base"
        for number, prompt in enumerate(prompts):
            folder = path / "samples" / name / f"{number:03d}-{slug(prompt)}"
            folder.mkdir(parents=True)
            for seed in range(4):
                image = picture(10 * number + seed, adapted, side)
                save_png(image, folder / f"{seed}.png", {"prompt": prompt, "seed": seed})
