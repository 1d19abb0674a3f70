"""Render the tiny world and train everything that comes with etherdiff: about eight hours on 2 cores; stop and go on at will.

    python scripts/build_tiny.py            # everything that is not in --output yet, in order
    python scripts/build_tiny.py unet       # one stage, also where it is there

Checkpoints and sample sheets are kept in --work; learning curves end in --curves.
"""

import importlib
import shutil
from pathlib import Path
from typing import Annotated

import typer

STAGES = {  # module, function, and a file that is there when it is done
    "tokenizer": ("pipeline", "build_tokenizer", "sd/tokenizer/vocab.json"),
    "autoencoder": ("pipeline", "build_autoencoder", "sd/vae/config.json"),
    "unet": ("pipeline", "build_unet", "sd/unet/config.json"),
    "clip": ("clip", "build", "clip/config.json"),
    "dino": ("dino", "build", "dino/config.json"),
    "upernet": ("upernet", "build", "upernet/config.json"),
    "features": ("features", "build", "features/config.json"),
}


def main(
    stages: Annotated[
        list[str] | None, typer.Argument(help=f"any of {', '.join(STAGES)} [default: all that are missing]")
    ] = None,
    work: Annotated[Path, typer.Option(help="scenes, checkpoints and logs")] = Path("build/tiny"),
    output: Annotated[Path, typer.Option(help="where the finished models go")] = Path("etherdiff/assets/tiny"),
    curves: Annotated[Path, typer.Option(help="where the learning curves go")] = Path("benchmarks/tiny_training"),
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
    fraction: Annotated[float, typer.Option(min=0, max=1, help="of the steps, to try the builder out")] = 1.0,
) -> None:
    """Build the tiny models."""
    unknown = sorted(set(stages or []) - set(STAGES))
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: stages are {', '.join(STAGES)}")
    import torch

    torch.set_num_threads(threads)
    missing = [stage for stage, (*_, done) in STAGES.items() if not (output / done).exists()]
    for stage in stages or missing:
        module, function, _ = STAGES[stage]
        build = getattr(importlib.import_module(f"tiny_world.{module}"), function)
        build(work, output, fraction)
        curves.mkdir(parents=True, exist_ok=True)
        for log in work.glob("*/log.jsonl"):
            shutil.copy(log, curves / f"{log.parent.name}.jsonl")


if __name__ == "__main__":
    typer.run(main)
