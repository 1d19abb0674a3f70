"""The runs of a sweep: their commands, their states (states/NAME.json) and their stages."""

import hashlib
import json
import shlex
import sys
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from etherdiff.config import SWEEP_OWN_KEYS, EvalOptions
from etherdiff.runs.folder import RunFolder, is_sealed
from etherdiff.runs.result import named_differences
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.system.files import write_json

COMMANDS = {"dreambooth": "train-dreambooth", "s2i": "train-s2i", "perturb": "perturb"}
"""Task -> the command that makes its run folders."""


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep: its place, its configuration and its scoring."""

    name: str
    """Its label and eight digits of its configuration's hash."""
    output: Path
    """The sweep's folder, absolute."""
    task: str
    config: dict[str, Any]
    """Resolved configuration as run.yaml records it, without `output`."""
    scoring: EvalOptions | None
    """Options of `etherdiff eval`; None: the run is not scored."""

    @property
    def folder(self) -> Path:
        return self.output / "runs" / self.name

    @property
    def eval(self) -> Path:
        """Folder that `etherdiff eval` writes."""
        return self.folder / "eval"

    @property
    def recipe(self) -> Path:
        """Recipe that its command reads."""
        return self.output / "recipes" / f"{self.name}.yaml"

    @property
    def state(self) -> Path:
        return self.output / "states" / f"{self.name}.json"

    @property
    def log(self) -> Path:
        return self.output / "logs" / f"{self.name}.log"

    @property
    def results(self) -> list[Path]:
        """Folders that its task saves when it ends."""
        folder = RunFolder(self.folder)
        found = [folder.control_encoder] if self.task == "s2i" else []
        found += [folder.adapter] if self.config["method"] != "none" else []
        return found + ([folder.refitted_adapter] if self.config.get("refit") else [])

    @property
    def steps(self) -> int:
        """Number of training steps; 0 where nothing is trained."""
        return int(self.config.get("steps", 0))

    def make_command(self) -> list[str]:
        """Return the arguments of etherdiff that make the run folder."""
        return [COMMANDS[self.task], "--config", str(self.recipe), "--output", str(self.folder)]

    def resume_command(self) -> list[str]:
        """Return the arguments of etherdiff that resume it."""
        return ["resume", str(self.folder)]

    def score_command(self) -> list[str]:
        """Return the arguments of etherdiff that score it; images made with other options are drawn again."""
        return ["eval", str(self.folder), *eval_arguments(self.scoring_record()), "--overwrite"]

    def scoring_record(self) -> dict[str, Any]:
        """Return the scoring options that are not defaults, as the state file records them."""
        found = {} if self.scoring is None else self.scoring.model_dump(mode="json", exclude_defaults=True)
        return found | ({"metrics": ",".join(found["metrics"])} if found.get("metrics") is not None else {})

    def is_scored_with(self, record: Any) -> bool:
        """Return whether a state file's record means these options."""
        try:
            return self.scoring is not None and type(self.scoring).model_validate(record) == self.scoring
        except ValidationError:
            return False


@dataclass(frozen=True)
class Unit:
    """A run and the runs on top of it, which are made in this order, in one place."""

    runs: tuple[SweepRun, ...]
    threads: int
    gpus: float

    @property
    def name(self) -> str:
        return self.runs[0].name

    def environment(self) -> dict[str, str]:
        """Return environment variables for its commands, so that they compute the same on any machine."""
        hidden = {} if self.gpus else {"CUDA_VISIBLE_DEVICES": ""}
        return {"OMP_NUM_THREADS": str(self.threads), **hidden}


def eval_arguments(options: dict[str, Any]) -> list[str]:
    """Return recorded options as arguments of `etherdiff eval`."""
    found = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [part for one in (value if isinstance(value, list) else [value]) for part in (f"--{flag}", str(one))]
    return found


def shell_command(unit: Unit, arguments: list[str]) -> str:
    """Return a command of a unit as one line for a shell."""
    settings = [f"{name}={shlex.quote(value) if value else ''}" for name, value in unit.environment().items()]
    return " ".join([*settings, shlex.join([sys.executable, "-m", "etherdiff", *arguments])])


# --- States ----------------------------------------------------------------------------------------------------------


def read_state(run: SweepRun) -> dict[str, Any]:
    """Read what the state file records; empty where there is none."""
    try:
        content = json.loads(run.state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_state(run: SweepRun, content: dict[str, Any]) -> None:
    """Replace the state file."""
    run.state.parent.mkdir(parents=True, exist_ok=True)
    write_json(run.state, {"run": run.name, **content})


def expect_scores(run: SweepRun, content: dict[str, Any]) -> None:
    """Write the state before scoring. A metrics.json that appears afterwards has the scores of the run's options."""
    options = {} if run.scoring is None else {"eval": run.scoring_record(), "scores_before": scores_hash(run)}
    write_state(run, {**content, **options})


def confirm_scores(run: SweepRun, content: dict[str, Any]) -> None:
    """Write the state after scoring: only this metrics.json has the scores of the run's options."""
    options = {} if run.scoring is None else {"eval": run.scoring_record(), "scores": scores_hash(run)}
    write_state(run, {**content, **options})


def scores_hash(run: SweepRun) -> str | None:
    """Return the SHA-256 of the run's metrics.json, in hexadecimal; None where there is none."""
    try:
        return hashlib.sha256((run.eval / "metrics.json").read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


# --- Stages ----------------------------------------------------------------------------------------------------------


class Stage(IntEnum):
    """How far a run is."""

    ABSENT = 0
    BEGUN = 1
    """Stopped; to be resumed."""
    MADE = 2
    """Trained, but not scored with the file's options."""
    FINISHED = 3


def stage_of(run: SweepRun) -> Stage:
    """Return how far a run is. UserError where its folder holds a run of another configuration."""
    folder = RunFolder(run.folder)
    if not folder.settings.is_file():
        return Stage.BEGUN if folder.checkpoints.is_dir() else Stage.ABSENT
    if not is_sealed(folder.settings):
        return Stage.BEGUN  # resuming mends it, or says why not
    made = Run.open(run.folder)
    there = made.config.model_dump(mode="json", exclude=set(SWEEP_OWN_KEYS))
    if there != run.config:
        found = "; ".join(named_differences(there, run.config)) or "other keys"
        raise UserError(f"{run.folder} holds a run of another configuration ({found}): move it away, or remove it")
    if not made.is_finished:
        return Stage.BEGUN
    return Stage.FINISHED if run.scoring is None or is_scored(run) else Stage.MADE


def is_scored(run: SweepRun) -> bool:
    """Return whether metrics.json was written with the run's scoring options.

    The state recorded the options before scoring began, with the hash of the metrics.json of that time. A metrics.json with
    another hash was written with these options, even if the sweep was killed before it could record that.
    """
    state, scores = read_state(run), scores_hash(run)
    if scores is None or not run.is_scored_with(state.get("eval")):
        return False
    return bool(scores == state["scores"] if "scores" in state else scores != state.get("scores_before", scores))
