"""The runs of a sweep: the commands that make them, what is noted of each in states/NAME.json, and how far each is."""

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
        return [COMMANDS[self.task], "--config", str(self.recipe), "--output", str(self.folder)]

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

    runs: tuple[SweepRun, ...]
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


# --- States ----------------------------------------------------------------------------------------------------------


def read_state(run: SweepRun) -> dict[str, Any]:
    """Empty where nothing is told."""
    try:
        content = json.loads(run.state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_state(run: SweepRun, content: dict[str, Any]) -> None:
    """Replace it whole."""
    run.state.parent.mkdir(parents=True, exist_ok=True)
    write_json(run.state, {"run": run.name, **content})


def expect_scores(run: SweepRun, content: dict[str, Any]) -> None:
    """The same, before a run is scored: a metrics.json that comes after this is what the run's options wrote."""
    options = {} if run.scoring is None else {"eval": run.scoring_record(), "scores_before": scores_hash(run)}
    write_state(run, {**content, **options})


def confirm_scores(run: SweepRun, content: dict[str, Any]) -> None:
    """The same, after it is scored: only this metrics.json is."""
    options = {} if run.scoring is None else {"eval": run.scoring_record(), "scores": scores_hash(run)}
    write_state(run, {**content, **options})


def scores_hash(run: SweepRun) -> str | None:
    """SHA-256 of the run's metrics.json, in hexadecimal; None where there is none."""
    try:
        return hashlib.sha256((run.eval / "metrics.json").read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


# --- Stages ----------------------------------------------------------------------------------------------------------


class Stage(IntEnum):
    """In this order."""

    ABSENT = 0
    BEGUN = 1
    """To be resumed."""
    MADE = 2
    """Its result is whole; its scores, with the file's options, are not there."""
    FINISHED = 3


def stage_of(run: SweepRun) -> Stage:
    """How far a run is. UserError where its folder holds a run of another configuration."""
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
    """Whether metrics.json is what scoring with the run's options wrote.

    The state tells: it has the options since before they were used, and the hash of the metrics.json that was there then,
    so that one which came since is theirs, whoever was killed before he could write that it came.
    """
    state, scores = read_state(run), scores_hash(run)
    if scores is None or not run.is_scored_with(state.get("eval")):
        return False
    return bool(scores == state["scores"] if "scores" in state else scores != state.get("scores_before", scores))
