"""A run is a folder: what it was told, what it learned, and how it went."""

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from etherdiff import __version__
from etherdiff.config import DreamBoothConfig, TrainConfig, load_run_config
from etherdiff.errors import UserError

TASKS = {"dreambooth": DreamBoothConfig}
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run; see the README for what each holds."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "run.yaml"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def cost(self) -> Path:
        return self.path / "cost.json"


def write_settings(run: RunFolder, task: str, config: TrainConfig, facts: dict[str, Any]) -> None:
    """run.yaml: the resolved configuration, itself a recipe, and under `provenance` what else determined the result."""
    versions = {"etherdiff": __version__, "python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in PACKAGES}
    content = config.model_dump(mode="json", exclude={"overwrite", "dry_run"})
    content["provenance"] = {"task": task, "versions": versions, "threads": torch.get_num_threads(), **facts}
    run.settings.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_settings(path: Path) -> tuple[RunFolder, TrainConfig, dict[str, Any]]:
    """The folder, its configuration and its provenance. UserError where it is no run."""
    run = RunFolder(path)
    if not run.settings.is_file():
        raise UserError(f"{path} is not a run folder: it has no run.yaml")
    try:
        content = yaml.safe_load(run.settings.read_text(encoding="utf-8"))
        provenance = content.pop("provenance")
        config_class = TASKS[provenance["task"]]
    except (OSError, ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{run.settings} is not what a run wrote ({error!r})") from error
    return run, load_run_config(config_class, content | {"output": str(path)}), provenance


def append_metrics(run: RunFolder, row: dict[str, Any]) -> None:
    """One line of metrics.jsonl; nothing in it depends on the clock."""
    with run.metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """All whole lines of metrics.jsonl."""
    if not run.metrics.exists():
        return []
    rows = []
    for line in run.metrics.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # a kill can tear the last line
            break
    return rows


def truncate_metrics(run: RunFolder, step: int) -> None:
    """Forget what was logged after `step`, which a resumed run will log again."""
    rows: Iterable[dict[str, Any]] = [row for row in read_metrics(run) if row["step"] <= step]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
