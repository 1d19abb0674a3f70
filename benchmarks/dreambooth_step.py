"""Images per second of DreamBooth training, beside diffusers' own script, on the same base, photos, batch and precision.

    python benchmarks/dreambooth_step.py --script train_dreambooth_lora.py --photos FOLDER

`--script` is examples/dreambooth/train_dreambooth_lora.py of a diffusers release; it is run with
--pre_compute_text_embeddings. Without `--base` the base is Stable Diffusion 1.5's architecture with random weights, written
to a temporary folder. Every contestant runs as a program of its own, twice per round: with few and with more steps. The
difference of the two is the time of the steps between, free of imports, loading and saving.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from etherdiff.families.bases import shipped_config

PROMPT = "a photo of sks dog"


def write_random_sd15(folder: Path) -> Path:
    """Stable Diffusion 1.5 with random weights, as a diffusers folder (4.3 GB)."""
    config = shipped_config("sd15")
    torch.manual_seed(0)
    StableDiffusionPipeline(
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config / "unet")),
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(config / "vae")),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(config / "text_encoder")),
        tokenizer=CLIPTokenizer.from_pretrained(config / "tokenizer"),
        scheduler=PNDMScheduler.from_pretrained(config / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def diffusers_command(options: argparse.Namespace, base: Path, steps: int, output: Path) -> list[str]:
    return [
        *(sys.executable, str(options.script)),
        *("--pretrained_model_name_or_path", str(base)),
        *("--instance_data_dir", str(options.photos)),
        *("--instance_prompt", PROMPT),
        *("--output_dir", str(output)),
        *("--resolution", str(options.resolution)),
        *("--train_batch_size", str(options.batch)),
        *("--max_train_steps", str(steps)),
        *("--learning_rate", "1e-4"),
        *("--rank", "4"),
        *("--mixed_precision", options.mixed_precision),
        *("--seed", "0"),
        "--pre_compute_text_embeddings",
    ]


def etherdiff_command(method: str, options: argparse.Namespace, base: Path, steps: int, output: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "etherdiff", "train-dreambooth"),
        *("--base", str(base)),
        *("--subject", str(options.photos)),
        *("--class-noun", "dog"),
        *("--method", method),
        *("--output", str(output)),
        *("--resolution", str(options.resolution)),
        *("--batch-size", str(options.batch)),
        *("--steps", str(steps)),
        *("--mixed-precision", options.mixed_precision),
        *("--eval-every", "1000000"),
        *("--checkpoint-every", "1000000"),
        "--no-prior-preservation",
    ]


def whole_seconds(command: list[str]) -> float:
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\nfailed with {result.returncode}:\n{result.stderr[-3000:]}")
    return time.perf_counter() - start


def measure(options: argparse.Namespace, base: Path, work: Path) -> dict[str, list[dict[str, float]]]:
    contestants = {
        "diffusers train_dreambooth_lora.py, r=4": lambda *a: diffusers_command(options, base, *a),
        "etherdiff lora, r=4": lambda *a: etherdiff_command("lora", options, base, *a),
        "etherdiff ether+": lambda *a: etherdiff_command("ether+", options, base, *a),
    }
    few, more = options.few, options.few + options.steps
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for round_number in track(range(options.rounds), description="rounds", console=Console(stderr=True)):
        for index, (name, command) in enumerate(contestants.items()):
            seconds = {}
            for steps in (few, more):
                seconds[steps] = whole_seconds(command(steps, work / f"{round_number}-{index}-{steps}"))
            images = options.steps * options.batch / (seconds[more] - seconds[few])
            rows[name].append({"images_per_second": images, "start_seconds": seconds[few]})
    return rows


def show(rows: dict[str, list[dict[str, float]]]) -> None:
    reference = [row["images_per_second"] for row in next(iter(rows.values()))]
    table = Table("", "images/s", "over diffusers", "low", "high", "whole program, few steps (s)")
    for name, measured in rows.items():
        speeds = [row["images_per_second"] for row in measured]
        ratios = [mine / theirs for mine, theirs in zip(speeds, reference, strict=True)]
        figures = (
            median(speeds),
            median(ratios),
            min(ratios),
            max(ratios),
            median(r["start_seconds"] for r in measured),
        )
        table.add_row(name, *(f"{figure:.3g}" for figure in figures))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mixed-precision", default="no", choices=("no", "fp16", "bf16"))
    parser.add_argument("--few", type=int, default=2, help="steps of the shorter run")
    parser.add_argument("--steps", type=int, default=8, help="steps more in the longer run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        base = options.base or write_random_sd15(work / "base")
        rows = measure(options, base, work)
    show(rows)
    if options.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
