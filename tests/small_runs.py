"""Runs of a few steps on the tiny base, and what they leave, for the tests of faults and signals."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml
from subject_photos import draw_subject

from etherdiff.config import DreamBoothConfig

STEPS = 6


def small_config(output: Path, **options) -> DreamBoothConfig:
    """A run with all that keeps state: EMA, schedule, accumulation, dropout of captions. Its subject lies beside it."""
    subject = output.parent / "ball"
    if not subject.exists():
        draw_subject(subject)
    settings = {
        "base": "tiny",
        "subject": str(subject),
        "class_noun": "ball",
        "output": output,
        "prior_preservation": False,
        "tracker": "none",
        "device": "cpu",
        "steps": STEPS,
        "checkpoint_every": 2,
        "eval_every": 3,
        "eval_scores": "off",
        "ema_decay": 0.9,
        "gradient_accumulation": 2,
        "lr_schedule": "cosine",
        "caption_dropout": 0.3,
        "seed": 3,
    }
    return DreamBoothConfig(**(settings | options))


def results(run: Path) -> dict[str, bytes]:
    """What a run learned and how it went, byte by byte."""
    return {path.name: path.read_bytes() for path in [run / "metrics.jsonl", *sorted((run / "adapter").iterdir())]}


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def leftovers(run: Path) -> list[Path]:
    """Hidden files and folders: what a run may only leave when it is killed."""
    return [path for path in run.rglob(".*") if path.name not in (".", "..")]


def as_recipe(config: DreamBoothConfig) -> Path:
    path = config.output.parent / f"{config.output.name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude={"overwrite", "dry_run"})))
    return path


def start(*arguments: object, processes: int = 1, **more) -> subprocess.Popen:
    """The program in a process of its own, or in several under torchrun; what it says goes to a pipe as text."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "etherdiff", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **more)


def finish(process: subprocess.Popen, seconds: float = 600) -> tuple[int, str]:
    """Its status and what it said."""
    _, said = process.communicate(timeout=seconds)
    return process.returncode, said


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def flip_a_bit(path: Path, at: float) -> None:
    """Change one bit, at a share of the file's length."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)
