"""Run folders with numbers written by hand: settings, scores, curves, costs; no weights unless asked for."""

import copy
import json
from pathlib import Path
from typing import Any

from etherdiff.config import DreamBoothConfig, S2IConfig
from etherdiff.eval.metrics import METRICS
from etherdiff.runs.folder import RunFolder, write_settings

PROMPTS = 25


def score(
    mean: float, name: str = "dino", subject: str = "ball", half: float = 0.01, over: str = "prompts", **identity: Any
) -> dict:
    """One entry of metrics.json, over 25 prompts x 4 images x 5 photos."""
    is_s2i = METRICS.get(name, METRICS["dino"]).compares == "control x generated" or name == "fid"
    known: dict[str, Any] = {
        "definition": f"mean of {name}",
        "backbone": {"name": "etherdiff/tiny-dino", "weights_sha256": "ab" * 32, "versions": {"torch": "2.9"}},
        "reference": {"images": "training images", "n": 5, "sha256": f"photos of {subject}"},
        "prompts": {"n": PROMPTS, "form": "with identifier", "sha256": f"prompts of {subject}"},
        "seeds": [0, 1, 2, 3],
        "generation": {"sampler": "DPM++ 2M", "steps": 25, "versions": {"diffusers": "0.40"}},
        "versions": {"etherdiff": "0.1.0", "torch": "2.9"},
    }
    return {
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
        "interval": {"level": 0.95, "over": "images" if is_s2i else over, "draws": 2000, "seed": 0},
        "n": 4 * PROMPTS,
        "pairs": None if is_s2i else 20 * PROMPTS,
        "identity": copy.deepcopy(known) | identity,
    }


def write_run(path: Path, scores: dict[str, float] | None = None, task: str = "dreambooth", **settings: Any) -> Path:
    """run.yaml, and eval/metrics.json with these means unless `scores` is None."""
    path.mkdir(parents=True)
    if task == "s2i":
        told: dict[str, Any] = {
            "base": "tiny",
            "dataset": "tiny",
            "signal": "segmentation",
            "steps": 300,
            "learning_rate": 1e-3,
        }
        config: Any = S2IConfig(**(told | settings), output=path)
    else:
        told = {"base": "tiny", "subject": "ball", "class_noun": "ball", "steps": 300, "learning_rate": 6e-3, "blocks": 1}
        config = DreamBoothConfig(**(told | settings), output=path)
    write_settings(RunFolder(path), task, config, {"base": {"name": "tiny", "fingerprint": {"unet": "abc"}}})
    if scores is not None:
        write_scores(
            path, {name: score(mean, name, getattr(config, "subject", "tiny")) for name, mean in scores.items()}, config
        )
    return path


def write_scores(path: Path, scores: dict[str, dict], config: Any) -> None:
    """eval/metrics.json as `etherdiff eval` writes it: scores, the base's, prompts whose mean is the score, the paper's."""
    task = "s2i" if hasattr(config, "dataset") else "dreambooth"
    run = {"name": path.name, "method": config.method, "base_model": config.base, "checkpoint": "last", "step": config.steps}
    result: dict[str, Any] = {"scores": scores, "left_out": {}, "not_scored": {}, "run": run}
    result["paper"] = {"scores": {name: {"value": 0.5, "differs": ["the base is not Stable Diffusion 1.5"]} for name in scores}}
    if task == "dreambooth":
        baseline = {f"{name}_real_images": score(0.8, name, config.subject) for name in ("dino", "clip_i") if name in scores}
        result["scores"] = scores | baseline
        result["base"] = {"scores": {name: score(0.3, name, config.subject) for name in scores}, "per_prompt": []}
        result["per_prompt"] = [
            {
                "prompt": f"prompt {number}",
                "scores": {
                    name: {"mean": one["mean"] + 0.01 * (number - 2), "n": 4, "pairs": 100} for name, one in scores.items()
                },
            }
            for number in range(5)
        ]
    (path / "eval").mkdir(exist_ok=True)
    (path / "eval/metrics.json").write_text(json.dumps(result))


def change_result(path: Path, change: Any) -> None:
    """Rewrite a run's metrics.json as `change` leaves it."""
    file = path / "eval/metrics.json"
    result = json.loads(file.read_text())
    change(result)
    file.write_text(json.dumps(result))


def write_curve(path: Path, rows: list[dict[str, Any]]) -> None:
    """metrics.jsonl."""
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_state(sweep: Path, name: str, error: str) -> None:
    """A sweep's record of a run that failed."""
    (sweep / "states").mkdir(parents=True, exist_ok=True)
    state = {"run": name, "status": "failed", "attempts": 2, "error": error, "config": "0" * 64}
    (sweep / "states" / f"{name}.json").write_text(json.dumps(state))
