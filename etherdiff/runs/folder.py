"""The files of a run folder: its settings, its results and its metrics."""

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
    """The paths of a run folder."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "run.yaml"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def refitted_adapter(self) -> Path:
        """Adapter below the re-fitted magnitudes, of a run that learned magnitudes."""
        return self.path / "refitted_adapter"

    @property
    def adapters(self) -> list[Path]:
        """Folders of the adapters on the base's UNet, in this order."""
        return [folder for folder in (self.refitted_adapter, self.adapter) if folder.is_dir()]

    @property
    def control_encoder(self) -> Path:
        """Folder of the hint encoder of a controllable run."""
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
        """Folder that `etherdiff eval` writes."""
        return self.path / "eval"

    @property
    def result(self) -> Path:
        """File of the scores."""
        return self.eval / "metrics.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"


def write_settings(run: RunFolder, task: str, config: RunConfig, facts: dict[str, Any]) -> None:
    """Write run.yaml: the resolved configuration, which is a recipe, and under `provenance` what else determined the result.

    facts replace what is found here. The first line is a hash of the rest, which reveals damage.
    """
    content = config.model_dump(mode="json", exclude={"overwrite", "dry_run"})
    found = {"task": task, "versions": installed_versions(), "threads": torch.get_num_threads()}
    content["provenance"] = found | facts
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_text(run.settings, f"{SEAL}{_text_hash(text)}\n{text}")


def installed_versions() -> dict[str, str]:
    """Return the versions of all packages that a result can depend on."""
    return {
        "etherdiff": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def is_sealed(path: Path) -> bool:
    """Return whether a run.yaml is byte for byte what the run wrote."""
    try:
        first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return False
    return first == SEAL + _text_hash(rest)


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_of(folder: Path) -> Path:
    """Return the file that records the hashes of a result's files: adapter.sha256.json next to adapter/."""
    return folder.with_name(f"{folder.name}.sha256.json")


def write_manifest(folder: Path) -> None:
    """Record the hashes of a result's files, for `check_result`."""
    hashes = {path.name: file_hash(path) for path in sorted(folder.iterdir())}
    write_json(manifest_of(folder), hashes)


def check_result(run: RunFolder, folder: Path) -> None:
    """Raise UserError where adapter/ or control_encoder/ is not what the run wrote, if that was recorded."""
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
    """Return whether the file of a plain name in a folder has the expected hash."""
    path = folder / name
    return path.parent == folder and path.is_file() and file_hash(path) == expected


def append_metrics(run: RunFolder, row: dict[str, Any]) -> None:
    """Append one line to metrics.jsonl; nothing in it depends on the clock."""
    with run.metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(run: RunFolder, damage: list[str] | None = None) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl by step; of several lines for one step, a later one adds to an earlier.

    Unreadable lines (a kill can tear the last one) are skipped; `damage` gets a sentence with their number.
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
    """Put metrics.jsonl back to `step`: from the checkpoint's copy, or without what a resumed run logs again."""
    if kept is not None and kept.is_file():
        write_text(run.metrics, kept.read_text(encoding="utf-8"))
        return
    rows = [row for row in read_metrics(run) if row["step"] <= step]
    write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in rows))
