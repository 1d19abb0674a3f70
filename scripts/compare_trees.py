"""Prove that two checkouts give the same results: train, draw, score, export and merge in each, then compare bit for bit.

    python scripts/compare_trees.py ../old . --output build/compare        # about 4 minutes a checkout on one core

Both run the same seeded commands on the tiny base and on made-up maps, on one thread, each with a cache of its own. What a
checkout computed stays in OUTPUT/old and OUTPUT/new. It is computed again only when its package, the commands or the libraries
differ. Running one checkout as both shows that the commands are deterministic.
Exit status: 0 if every item is equal, else 1. Texts for people, versions and timings are not compared.
"""

import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from safetensors.torch import load_file

SIDE = 64
TRAIN_MAPS, VALIDATION_MAPS = 8, 66  # FID to 64 features needs more than 64 images
CLASSES = 21  # of the tiny world's label maps
PROMPTS = "a sks ball on grass\na sks ball in the snow\n"

ON_TINY = "--base tiny --seed 7"
TRAINED = f"{ON_TINY} --device cpu --mixed-precision no --tracker none --optimizer adamw"
ON_MAPS = (
    f"train-s2i {TRAINED} --dataset ../inputs/maps --signal segmentation --palette tiny --targets attention+geglu "
    "--batch-size 2 --encoder-init scaled --encoder-learning-rate 5e-3"
)
OFT = f"{ON_MAPS} --method oft --blocks 4 --steps 3 --learning-rate 1e-3 --checkpoint-every 3 --eval-every 3"
DRAWN = "--device cpu --batch-size 4 --seed 0"
SCORED = f"{DRAWN} --checkpoint last --preset tiny --base"
COMMANDS = {
    "train dreambooth": f"train-dreambooth {TRAINED} --subject candy_ball --identifier sks --class-noun ball --method ether+ "
    "--targets attention --blocks 1 --steps 12 --learning-rate 0.02 --lr-schedule cosine --warmup-steps 2 --batch-size 2 "
    "--ema-decay 0.9 --caption-dropout 0.2 --flip --prior-preservation --prior-weight 1.0 --class-images 4 "
    "--class-sampling-steps 5 --checkpoint-every 6 --eval-every 6 --eval-scores on --sample-every 6 --sample-count 1 "
    "--sample-prompts 'a sks ball on the beach' --output dreambooth",
    "train s2i": f"{ON_MAPS} --method ether+ --blocks 2 --steps 6 --learning-rate 5e-3 --lr-schedule constant "
    "--caption-dropout 0.2 --debiased-estimation --flip --gradient-accumulation 2 --checkpoint-every 3 --eval-every 3 "
    "--output s2i",
    "train oft": f"{OFT} --output oft",
    "refit oft": f"{OFT} --refit oft --output refit",
    "perturb": f"perturb {ON_TINY} --subject candy_ball --identifier sks --class-noun ball --method ether+ --targets attention "
    "--blocks 1 --distance 0.5 --output perturbed",
    "eval dreambooth": f"eval dreambooth {SCORED} --prompts ../inputs/prompts.txt --num 2 --steps 5",
    "eval s2i": f"eval s2i {SCORED} --num-maps {VALIDATION_MAPS} --steps 1 --guidance-scale 3 --real",
    "eval refit": f"eval refit {SCORED} --num-maps 4 --steps 4 --guidance-scale 9 --guide-control --shuffle-maps "
    "--without-control",
    "eval perturbed": f"eval perturbed {SCORED} --prompts ../inputs/prompts.txt --num 1 --steps 5",
    "generate dreambooth": f"generate --run dreambooth {DRAWN} --prompts ../inputs/prompts.txt --num 2 --steps 5 "
    "--guidance-scale 7.5 --scale 0.9 --output drawn-dreambooth",
    "generate s2i": f"generate --run s2i {DRAWN} --control ../inputs/maps/validation/control-0.png "
    "--prompts ../inputs/prompts.txt --num 1 --steps 5 --guidance-scale 9 --control-scale 1.0 --output drawn-s2i",
    "export lora": "export dreambooth --format lora --scale 1.0 --output lora.safetensors",
    "export kohya": "export dreambooth --format kohya --scale 0.5 --output kohya.safetensors",
    "export peft": "export dreambooth --format peft --scale 1.0 --output peft",
    "merge dreambooth": "merge dreambooth --scale 1.0 --dtype fp32 --output merged-dreambooth --single-file merged.safetensors",
    "merge refit": "merge refit --scale 1.0 --dtype fp32 --output merged-refit",
}
IMAGES = "/**/[0-9]*.png"  # one image each, named by its seed; sheets have texts in them
ITEMS = {
    f"{run}: {name}": f"{run}/{files}"
    for runs, name, files in [
        ("dreambooth s2i oft refit perturbed", "adapter", "*adapter/*.safetensors"),
        ("s2i oft refit", "control encoder", "control_encoder/*.safetensors"),
        ("dreambooth s2i refit", "checkpoints", "checkpoints/**/*.safetensors"),
        ("dreambooth", "best adapter", "best/*.safetensors"),
        ("dreambooth s2i oft refit", "metrics.jsonl", "metrics.jsonl"),
        ("dreambooth", "samples", f"samples{IMAGES}"),
        ("dreambooth s2i refit perturbed", "scores", "eval/metrics.json"),
        ("dreambooth s2i refit perturbed", "scored images", f"eval{IMAGES}"),
    ]
    for run in runs.split()
} | {
    "generate dreambooth: images": f"drawn-dreambooth{IMAGES}",
    "generate s2i: images": f"drawn-s2i{IMAGES}",
    "export lora": "lora.safetensors",
    "export kohya": "kohya.safetensors",
    "export peft": "peft/*.safetensors",
    "merge dreambooth: UNet": "merged-dreambooth/unet/*.safetensors",
    "merge dreambooth: one file": "merged.safetensors",
    "merge refit: whole pipeline": "merged-refit/**/*.safetensors",
}
IGNORED = {"versions", "drawn", "dataset", "not_scored", "paper"}  # versions; what drew; a path; two tables of texts
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow", "torchmetrics")

Leaf = torch.Tensor | str | float | None


def main(
    old: Annotated[Path, typer.Argument(help="checkout to compare with")],
    new: Annotated[Path, typer.Argument(help="checkout to judge")],
    output: Annotated[Path, typer.Option(help="folder for inputs and results")] = Path("build/compare"),
) -> None:
    """Run both checkouts where needed, print what is equal, and exit with 1 if anything is not."""
    output = output.resolve()
    write_inputs(output / "inputs")
    failed = [run_tree(tree.resolve(), output / name) for name, tree in (("old", old), ("new", new))]
    differences = compare_folders(output / "old", output / "new")
    for item, difference in differences.items():
        typer.echo(f"{item:32}{difference or 'equal'}")
    different = sum(map(bool, differences.values()))
    typer.echo(f"{len(differences) - different} of {len(differences)} items are equal; {sum(failed)} failures")
    raise typer.Exit(int(different > 0 or sum(failed) > 0))


def write_inputs(folder: Path) -> None:
    """Write prompts, and a dataset of blocks: label maps of the tiny world's classes, images that follow them, and captions."""
    random = np.random.default_rng(0)
    colours = random.integers(0, 256, (CLASSES, 3))
    for split, count in (("train", TRAIN_MAPS), ("validation", VALIDATION_MAPS)):
        (folder / "maps" / split).mkdir(parents=True, exist_ok=True)
        lines = []
        for index in range(count):
            labels = random.integers(0, CLASSES, (4, 4)).repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)
            image = (colours[labels] + random.integers(-20, 21, (SIDE, SIDE, 3))).clip(0, 255)
            for kind, pixels in (("image", image), ("control", labels)):
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "maps" / split / f"{kind}-{index}.png")
            line = {"image": f"image-{index}.png", "control": f"control-{index}.png", "text": f"a scene of {index % 5} blocks"}
            lines.append(json.dumps(line) + "\n")
        (folder / "maps" / split / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")


def run_tree(tree: Path, folder: Path) -> int:
    """Run every command with a checkout's package, unless its results are complete; return how many failed."""
    state = {
        "package": digest_files(tree / "etherdiff"),
        "inputs": digest_files(folder.parent / "inputs"),
        "commands": COMMANDS,
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    complete = folder / "complete.json"
    if complete.exists() and json.loads(complete.read_text(encoding="utf-8"))["state"] == state:
        typer.echo(f"{folder}: complete, not run again")
        return 0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ETHERDIFF_")}
    environment |= {"PYTHONPATH": str(tree), "ETHERDIFF_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    refuse_another_package(tree, folder, environment)
    seconds: dict[str, float] = {}
    failed = 0
    for name, command in COMMANDS.items():
        start = time.perf_counter()
        log = folder / f"{name.replace(' ', '-')}.log"
        arguments = [sys.executable, "-m", "etherdiff", *shlex.split(command)]
        with log.open("w", encoding="utf-8") as said:
            status = subprocess.run(arguments, cwd=folder, env=environment, stdout=said, stderr=said, check=False).returncode
        seconds[name] = round(time.perf_counter() - start, 1)
        typer.echo(f"{folder.name}: {name}: {seconds[name]:.0f} s" + (f", FAILED with {status}: see {log}" if status else ""))
        failed += status != 0
    typer.echo(f"{folder.name}: {tree}: {sum(seconds.values()):.0f} s")
    if digest_files(tree / "etherdiff") != state["package"]:
        typer.echo(f"{folder.name}: {tree} CHANGED while it ran; run it again")
        failed += 1
    if not failed:
        text = json.dumps({"state": state, "tree": str(tree), "seconds": seconds}, indent=2)
        complete.write_text(text, encoding="utf-8")
    return failed


def refuse_another_package(tree: Path, folder: Path, environment: Mapping[str, str]) -> None:
    """Check that the commands will import the checkout's package and not an installed one."""
    command = [sys.executable, "-c", "import etherdiff; print(etherdiff.__file__)"]
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_relative_to(tree):
        raise typer.BadParameter(f"{tree}: its package is not the one that Python imports, which is {found}")


def digest_files(folder: Path) -> str:
    """Hash the names and bytes of all files in a folder, bytecode left out."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            total.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def compare_folders(old: Path, new: Path) -> dict[str, str]:
    """Compare the results item by item: an empty text for what is equal, else what differs."""
    return {item: compare_files(old, new, pattern) for item, pattern in ITEMS.items()}


def compare_files(old: Path, new: Path, pattern: str) -> str:
    """Compare all files that match, number by number; an empty text if they are equal, and there are any."""
    leaves = [
        {f"{path.relative_to(folder)} {place}".rstrip(): leaf for path in folder.glob(pattern) for place, leaf in read(path)}
        for folder in (old, new)
    ]
    if not leaves[0]:
        return f"no {pattern} to compare with"
    sizes = find_differences(*leaves)
    if not sizes:
        return ""
    place = max(sizes, key=lambda place: sizes[place])
    count = f"{len(sizes)} of {len(leaves[0] | leaves[1])} differ"
    if math.isinf(sizes[place]):
        return f"{count}; {place}: {describe(leaves[0], place)} became {describe(leaves[1], place)}"
    return f"{count}; the largest difference is {sizes[place]:.3g} at {place}"


def read(path: Path) -> Iterator[tuple[str, Leaf]]:
    """Read a file as named leaves: tensors, the pixels of an image, or the values in JSON."""
    match path.suffix:
        case ".safetensors":
            yield from load_file(path).items()
        case ".png":
            with Image.open(path) as image:
                yield "", torch.from_numpy(np.array(image))
        case ".json":
            yield from flatten(json.loads(path.read_text(encoding="utf-8")))
        case ".jsonl":
            yield from flatten([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
        case _:
            raise ValueError(f"{path}: neither .safetensors nor .png, .json or .jsonl")


def flatten(value: Any, place: str = "") -> Iterator[tuple[str, Leaf]]:
    """List the values in JSON by their dotted places, without what is not compared; an empty list or object is a value."""
    if isinstance(value, dict):
        children = [(key, child) for key, child in value.items() if key not in IGNORED]
    elif isinstance(value, list):
        children = [(str(index), child) for index, child in enumerate(value)]
    else:
        yield place, value
        return
    if not value:
        yield place, json.dumps(value)
    for key, child in children:
        yield from flatten(child, f"{place}.{key}" if place else key)


def find_differences(old: Mapping[str, Leaf], new: Mapping[str, Leaf]) -> dict[str, float]:
    """Find the places that are not equal, with the largest difference there; infinite where there is no distance."""
    sizes = {place: measure_difference(old[place], new[place]) for place in old.keys() & new.keys()}
    sizes |= dict.fromkeys(old.keys() ^ new.keys(), math.inf)
    return {place: size for place, size in sorted(sizes.items()) if size > 0}


def measure_difference(old: Leaf, new: Leaf) -> float:
    """Measure how far apart two leaves are: 0 only if they are the same bits, infinite where they cannot be subtracted."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        if old.dtype != new.dtype or old.shape != new.shape:
            return math.inf
        if torch.equal(old.reshape(-1).view(torch.uint8), new.reshape(-1).view(torch.uint8)):
            return 0.0
        size = (old.double() - new.double()).abs().max().item()
        return size if size > 0 else math.inf  # NaN; or 0.0 against -0.0
    if type(old) is type(new) and (old == new or (old != old and new != new)):
        return 0.0
    if isinstance(old, int | float) and isinstance(new, int | float):
        size = abs(old - new)
        return size if size > 0 else math.inf  # NaN; or 1 against 1.0
    return math.inf


def describe(leaves: Mapping[str, Leaf], place: str) -> str:
    """Describe a leaf in a few words."""
    if place not in leaves:
        return "missing"
    leaf = leaves[place]
    return f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else repr(leaf)[:80]


if __name__ == "__main__":
    typer.run(main)
