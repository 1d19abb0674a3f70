"""Render the tiny world and train everything that comes with etherdiff: about four hours on 2 cores; stop and go on at will.

    python scripts/build_tiny.py            # everything that is not yet complete, in order
    python scripts/build_tiny.py unet       # one stage

Checkpoints and sample sheets are kept in --work; learning curves end in --curves.
"""

import importlib
import shutil
from pathlib import Path
from typing import Annotated

import typer

STAGES = {
    "tokenizer": ("pipeline", "build_tokenizer"),
    "autoencoder": ("pipeline", "build_autoencoder"),
    "unet": ("pipeline", "build_unet"),
    "clip": ("clip", "build"),
    "dino": ("dino", "build"),
    "upernet": ("upernet", "build"),
    "features": ("features", "build"),
}


def main(
    stages: Annotated[list[str] | None, typer.Argument(help=f"any of {', '.join(STAGES)} [default: all]")] = None,
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
    for stage in stages or STAGES:
        module, function = STAGES[stage]
        build = getattr(importlib.import_module(f"etherdiff.tiny.builder.{module}"), function)
        build(work, output, fraction)
        if (work / stage / "log.jsonl").exists():
            curves.mkdir(parents=True, exist_ok=True)
            shutil.copy(work / stage / "log.jsonl", curves / f"{stage}.jsonl")


if __name__ == "__main__":
    typer.run(main)
