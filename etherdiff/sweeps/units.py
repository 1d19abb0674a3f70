"""The runs of a sweep, and the commands that make them."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from etherdiff.config import EvalOptions
from etherdiff.runs.folder import RunFolder
from etherdiff.sweeps.spec import TASKS


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
    scoring: EvalOptions | None
    """None: it is not scored."""

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
        return ["eval", str(self.folder), *eval_arguments(self.scoring_record()), "--overwrite"]

    def scoring_record(self) -> dict[str, Any]:
        """The options of its scoring as the state file holds them: what is not the default."""
        found = {} if self.scoring is None else self.scoring.model_dump(mode="json", exclude_defaults=True)
        return found | ({"metrics": ",".join(found["metrics"])} if found.get("metrics") is not None else {})

    def is_scored_with(self, record: Any) -> bool:
        """Whether a state file's record means these options."""
        try:
            return self.scoring is not None and type(self.scoring).model_validate(record) == self.scoring
        except ValidationError:
            return False


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


def eval_arguments(options: dict[str, Any]) -> list[str]:
    """Recorded options as the command line of `etherdiff eval` takes them."""
    found = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [part for one in (value if isinstance(value, list) else [value]) for part in (f"--{flag}", str(one))]
    return found


def shell_command(unit: Unit, arguments: list[str]) -> str:
    """A command of a unit as a shell takes it."""
    settings = [f"{name}={shlex.quote(value) if value else ''}" for name, value in unit.environment().items()]
    return " ".join([*settings, shlex.join([sys.executable, "-m", "etherdiff", *arguments])])
