"""The runs of a sweep, and the commands that make them."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etherdiff.runs.folder import RunFolder
from etherdiff.sweeps.scoring import Scoring
from etherdiff.sweeps.tasks import TASKS


@dataclass(frozen=True)
class Run:
    """A run of a sweep: where it belongs and what it is told."""

    name: str
    """Its label and eight digits of its configuration's hash."""
    output: Path
    """The sweep's folder, absolute."""
    task: str
    config: dict[str, Any]
    """Resolved, as run.yaml records it, without `output`."""
    scoring: Scoring | None

    @property
    def folder(self) -> Path:
        return self.output / "runs" / self.name

    @property
    def eval(self) -> Path:
        """What `etherdiff eval` leaves in it."""
        return self.folder / "eval"

    @property
    def recipe(self) -> Path:
        """What its command reads."""
        return self.output / "recipes" / f"{self.name}.yaml"

    @property
    def state(self) -> Path:
        return self.output / "states" / f"{self.name}.json"

    @property
    def log(self) -> Path:
        return self.output / "logs" / f"{self.name}.log"

    @property
    def results(self) -> list[Path]:
        """The folders that its task saves, whole, when it has ended."""
        folder = RunFolder(self.folder)
        found = [folder.control_encoder] if self.task == "s2i" else []
        found += [folder.adapter] if self.config["method"] != "none" else []
        return found + ([folder.refitted_adapter] if self.config.get("refit") else [])

    @property
    def steps(self) -> int:
        """Of its training; 0 where nothing is trained."""
        return int(self.config.get("steps", 0))

    def make_command(self) -> list[str]:
        """Arguments of etherdiff that make the run folder."""
        return [TASKS[self.task].command, "--config", str(self.recipe), "--output", str(self.folder)]

    def resume_command(self) -> list[str]:
        """Arguments of etherdiff that go on with it."""
        return ["resume", str(self.folder)]

    def score_command(self) -> list[str]:
        """Arguments of etherdiff that score it; images that other options drew are drawn anew."""
        assert self.scoring is not None
        return ["eval", str(self.folder), *self.scoring.arguments(), "--overwrite"]


@dataclass(frozen=True)
class Unit:
    """A run and those on top of it: done in order, in one place."""

    runs: tuple[Run, ...]
    threads: int
    gpus: float

    @property
    def name(self) -> str:
        return self.runs[0].name

    def environment(self) -> dict[str, str]:
        """What its commands are to find, so that they compute the same wherever they run."""
        hidden = {} if self.gpus else {"CUDA_VISIBLE_DEVICES": ""}
        return {"OMP_NUM_THREADS": str(self.threads), **hidden}


def shell_command(unit: Unit, arguments: list[str]) -> str:
    """A command of a unit as a shell takes it."""
    settings = [f"{name}={shlex.quote(value) if value else ''}" for name, value in unit.environment().items()]
    return " ".join([*settings, shlex.join([sys.executable, "-m", "etherdiff", *arguments])])
