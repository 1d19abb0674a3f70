"""Whether controllable training fits at the size of Stable Diffusion 1.5: three steps, saved, resumed for a fourth, drawn.

    python benchmarks/s2i_sd15.py --json benchmarks/s2i_sd15.json       # about 15 minutes and 10 GB of disk on a CPU

Without `--base` the base is SD 1.5's architecture with random weights in a temporary folder: the pictures mean nothing,
the memory and the seconds do. Every command is a program of its own; its peak of memory is the kernel's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dreambooth_step import write_random_sd15
from PIL import Image

from etherdiff.tiny.world import render_scene

LIMIT_GIB = 20


def write_dataset(folder: Path, side: int, count: int = 4) -> Path:
    """Scenes of the tiny world, enlarged, with their label maps, as a folder with metadata.jsonl."""
    for split in ("train", "validation"):
        place = folder / split
        place.mkdir(parents=True)
        lines = []
        for index in range(count):
            scene = render_scene(split, index)
            for name, pixels in (("image", scene.image), ("control", scene.segmentation)):
                enlarged = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
                enlarged.save(place / f"{name}-{index}.png")
            lines.append(
                json.dumps({"image": f"image-{index}.png", "control": f"control-{index}.png", "text": scene.short_caption})
            )
        (place / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run(*arguments: object) -> dict[str, float]:
    """One etherdiff command: seconds, and its peak of memory in GiB."""
    command = [sys.executable, "-m", "etherdiff", *map(str, arguments)]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)}\nfailed with {os.waitstatus_to_exitcode(status)}")
    return {"seconds": round(time.perf_counter() - start, 1), "peak_memory_gib": round(usage.ru_maxrss / 2**20, 2)}


def measure(base: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    dataset, output = write_dataset(work / "scenes", options.resolution), work / "run"
    train = [
        "train-s2i",
        "--base",
        base,
        "--dataset",
        dataset,
        "--palette",
        "tiny",
        "--output",
        output,
        "--method",
        options.method,
    ]
    train += ["--steps", 3, "--resolution", options.resolution, "--batch-size", options.batch, "--tracker", "none"]
    control = dataset / "validation/control-0.png"
    draw = ["--control", control, "--prompt", "a photo of a ball", "--num", 1, "--steps", 2, "--resolution", options.resolution]
    return {
        "train 3 steps": run(*train, "--checkpoint-every", 3, "--eval-every", 3, "--mixed-precision", options.mixed_precision),
        "resume to step 4": run("resume", output, "--steps", 4),
        "draw one image in 2 steps": run("generate", "--run", output, *draw, "--output", work / "pictures"),
        "losses": [json.loads(line).get("loss") for line in (output / "metrics.jsonl").read_text().splitlines()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--method", default="ether+")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mixed-precision", default="no", choices=("no", "fp16", "bf16"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        figures = measure(options.base or write_random_sd15(work / "base"), work, options)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    peak = max(row["peak_memory_gib"] for row in figures.values() if isinstance(row, dict))
    if peak > LIMIT_GIB:
        sys.exit(f"more than {LIMIT_GIB} GiB: {peak}")


if __name__ == "__main__":
    main()
