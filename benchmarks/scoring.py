"""What scoring costs beside the network alone: files read, decoded, encoded, cached and averaged, in images per second.

    python benchmarks/scoring.py                                      # 200 images, CLIP ViT-L/14, CPU
    python benchmarks/scoring.py --images 3000 --device cuda
    python benchmarks/scoring.py --images 8 --model tiny              # seconds: shows that it runs

Weights are random (only the architecture counts) and read before the clock starts; the cache of features is empty. The
network alone gets the same number of images, already decoded and in memory; it is timed before and after, and the mean counts.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from transformers import CLIPConfig, CLIPModel

from etherdiff.eval.networks import Backbone, load_backbone
from etherdiff.eval.scores import PromptImages, Scoring, score_images

REAL_IMAGES, PER_PROMPT = 5, 4
PREPROCESSING = {
    "image_processor_type": "CLIPImageProcessor",
    "do_center_crop": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}
LARGE = {
    "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}
TINY = {
    "vision": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}
MODELS = {"vit-l-14": LARGE, "tiny": TINY}


def write_clip(folder: Path, name: str) -> None:
    """A CLIP with random weights as a transformers folder; 224 px and patches of 14 px, as OpenAI's ViT-L/14."""
    parts = MODELS[name]
    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    config = CLIPConfig(
        text_config={**parts["text"], **ends},
        vision_config={**parts["vision"], "image_size": 224, "patch_size": 14},
        projection_dim=768,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING | size))


def write_images(folder: Path, count: int, side: int) -> list[Path]:
    """PNGs about as large as generated ones: smooth colours with a little noise."""
    folder.mkdir(parents=True)
    paths = []
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(pixels + rng.integers(-4, 5, pixels.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(noisy).save(paths[-1])
    return paths


def seconds(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def network_alone(backbone: Backbone, count: int, batch_size: int) -> None:
    """The forward passes that `count` images take, on pixels in memory."""
    pixels = torch.randint(0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8)
    for start in range(0, count, batch_size):
        backbone.encode(pixels[: min(batch_size, count - start)]).cpu()


def run(options: argparse.Namespace, folder: Path) -> dict[str, float | str | int]:
    os.environ["ETHERDIFF_CACHE"] = str(folder / "cache")
    write_clip(folder / "clip", options.model)
    paths = write_images(folder / "images", options.images + REAL_IMAGES, options.side)
    real, generated = paths[:REAL_IMAGES], paths[REAL_IMAGES:]
    prompts = []
    for start in range(0, len(generated), PER_PROMPT):
        images = tuple(generated[start : start + PER_PROMPT])
        prompts.append(PromptImages(f"a sks dog number {start}", images, tuple(range(len(images)))))
    backbone = load_backbone("clip", str(folder / "clip"), options.device)
    network_alone(backbone, options.batch, options.batch)  # reads the weights, warms up
    scoring = Scoring(metrics=("clip_i", "clip_t"), device=options.device, batch_size=options.batch, workers=options.workers)

    def alone() -> float:
        return seconds(lambda: network_alone(backbone, len(paths), options.batch), options.device)

    before = alone()
    whole = seconds(lambda: score_images(real, [], prompts, scoring, loaded={"clip": backbone}), options.device)
    bare = mean([before, alone()])
    return {
        "model": options.model,
        "device": options.device,
        "images": len(paths),
        "scoring_images_per_second": len(paths) / whole,
        "network_alone_images_per_second": len(paths) / bare,
        "ratio": bare / whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="generated images to score; 3000 is a whole table's subject")
    parser.add_argument("--model", choices=MODELS, default="vit-l-14")
    parser.add_argument("--side", type=int, default=512, help="pixels of the images on the disk")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=None, help="decoding processes; by default as etherdiff chooses")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(options, Path(folder))
    console = Console()
    console.print(f"{result['images']} images, CLIP {options.model} (random weights), {options.device}")
    console.print(f"scoring, files to scores   {result['scoring_images_per_second']:.2f} images/s")
    console.print(f"the network alone          {result['network_alone_images_per_second']:.2f} images/s")
    console.print(f"ratio                      {result['ratio']:.2f} (to be 0.9 or more)")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
