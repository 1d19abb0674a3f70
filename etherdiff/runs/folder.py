"""A run is a folder: what it was told, what it learned, and how it went."""

import hashlib
import json
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from etherdiff import __version__
from etherdiff.config import RunConfig
from etherdiff.system.errors import UserError
from etherdiff.system.files import file_hash, write_json, write_text
from etherdiff.system.text import program

SEAL = "# sha256 of what follows: "
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
    def refitted_adapter(self) -> Path:
        """Of a run that learned magnitudes: the adapter that they are on top of."""
        return self.path / "refitted_adapter"

    @property
    def adapters(self) -> list[Path]:
        """All that goes on the base's UNet, in this order."""
        return [folder for folder in (self.refitted_adapter, self.adapter) if folder.is_dir()]

    @property
    def control_encoder(self) -> Path:
        """The hint encoder of a controllable run."""
        return self.path / "control_encoder"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def sample_sheet(self, step: int) -> Path:
        return self.samples / f"step-{step:06d}.png"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def cost(self) -> Path:
        return self.path / "cost.json"

    @property
    def eval(self) -> Path:
        """What `etherdiff eval` draws and writes."""
        return self.path / "eval"

    @property
    def result(self) -> Path:
        """The scores."""
        return self.eval / "metrics.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"


def write_settings(run: RunFolder, task: str, config: RunConfig, facts: dict[str, Any]) -> None:
    """run.yaml: the resolved configuration, itself a recipe, and under `provenance` what else determined the result.

    facts win over what is found here. The first line is a hash of the rest, so that damage shows.
    """
    content = config.model_dump(mode="json", exclude={"overwrite", "dry_run"})
    found = {"task": task, "versions": installed_versions(), "threads": torch.get_num_threads()}
    content["provenance"] = found | facts
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_text(run.settings, f"{SEAL}{_text_hash(text)}\n{text}")


def installed_versions() -> dict[str, str]:
    """Versions of all that a result can depend on."""
    return {
        "etherdiff": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def is_sealed(path: Path) -> bool:
    """Whether a run.yaml is what was written, to the byte."""
    try:
        first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return False
    return first == SEAL + _text_hash(rest)


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_of(folder: Path) -> Path:
    """Where it is recorded what a result's files are: adapter.sha256.json beside adapter/."""
    return folder.with_name(f"{folder.name}.sha256.json")


def write_manifest(folder: Path) -> None:
    """Record what a result's files are, for `check_result`."""
    hashes = {path.name: file_hash(path) for path in sorted(folder.iterdir())}
    write_json(manifest_of(folder), hashes)


def check_result(run: RunFolder, folder: Path) -> None:
    """UserError where adapter/ or control_encoder/ is not what the run wrote, if the run recorded that."""
    manifest = manifest_of(folder)
    if not manifest.is_file():
        return
    try:
        recorded = dict(json.loads(manifest.read_text(encoding="utf-8")))
        damaged = [name for name in sorted(recorded) if not _holds(folder, name, recorded[name])]
    except (OSError, ValueError, TypeError) as error:
        damaged = [f"{manifest.name} ({error})"]
    if damaged:
        raise UserError(
            f"{folder} is truncated, damaged or changed since the run wrote it: {', '.join(damaged)}. "
            f"Write it again from the last checkpoint with: {program('resume', run.path)}"
        )


def _holds(folder: Path, name: str, expected: str) -> bool:
    """Whether a plain name in a folder has the content expected."""
    path = folder / name
    return path.parent == folder and path.is_file() and file_hash(path) == expected


def append_metrics(run: RunFolder, row: dict[str, Any]) -> None:
    """One line of metrics.jsonl; nothing in it depends on the clock."""
    with run.metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(run: RunFolder, damage: list[str] | None = None) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl by step; of several lines for one step, a later one adds to an earlier.

    What is no such line (a kill can tear the last one) is skipped, and counted in a sentence that `damage` is given.
    """
    if not run.metrics.is_file():
        return []
    rows: dict[int, dict[str, Any]] = {}
    lines = run.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    bad = 0
    for line in lines:
        try:
            row = json.loads(line)
            step = int(row["step"])
            rows[step] = rows.get(step, {}) | row | {"step": step}
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            bad += 1
    if bad and damage is not None:
        damage.append(f"{bad} of {len(lines)} lines of {run.metrics.name} cannot be read")
    return [rows[step] for step in sorted(rows)]


def restore_metrics(run: RunFolder, kept: Path | None, step: int) -> None:
    """Put metrics.jsonl back to `step`: from the checkpoint's copy, or by forgetting what a resumed run will log again."""
    if kept is not None and kept.is_file():
        write_text(run.metrics, kept.read_text(encoding="utf-8"))
        return
    rows = [row for row in read_metrics(run) if row["step"] <= step]
    write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in rows))
