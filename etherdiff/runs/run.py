"""A run folder, read once: the only reader of run.yaml."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from etherdiff.config import TASK_CONFIGS, RunConfig, S2IConfig, load_run_config, load_yaml
from etherdiff.runs.folder import RunFolder, check_result, manifest_of, read_metrics
from etherdiff.runs.result import Best, Cost, EvalResult, Record, Score, read_best, read_record, read_result
from etherdiff.system.errors import UserError
from etherdiff.system.text import program

REFITTED = "+magnitude"
"""Ending of the method of a run whose magnitudes were fitted again."""


class RecordedBase(Record):
    """The base that a run was made from."""

    name: str = ""
    path: str | None = None
    """Path of its files."""
    fingerprint: dict[str, str] = Field(default_factory=dict)
    """Part -> SHA-256 of its weights."""


class Provenance(Record):
    """Everything besides the configuration that determined a run's result, in the order of run.yaml."""

    task: Literal["dreambooth", "s2i", "perturb"]
    versions: dict[str, str] = Field(default_factory=dict)
    """Package -> version."""
    threads: int | None = None
    """Number of CPU threads."""
    processes: int | None = None
    device: str | None = None
    """cpu, cuda or mps."""
    base: RecordedBase = Field(default_factory=RecordedBase)
    images: str | None = None
    """Digest of the training images."""
    subject_prompt: str | None = None
    control: dict[str, Any] = Field(default_factory=dict)
    """The signal of a controllable run."""

    def content(self) -> dict[str, Any]:
        """Return what run.yaml holds."""
        return self.model_dump(exclude_unset=True)


@dataclass(frozen=True)
class Run:
    """A run folder whose run.yaml is valid; the other files are read on first use."""

    folder: RunFolder
    config: RunConfig
    provenance: Provenance
    name: str
    """Name of the folder; its path where several runs have one name."""
    subject_name: str = ""
    """Name of the subject or the dataset; its path where several of one name are read."""

    @classmethod
    def open(cls, path: Path, settings: Path | None = None) -> "Run":
        """Read a run folder, with `settings` in place of its run.yaml if given. UserError where it is none."""
        folder = RunFolder(path)
        file = settings or folder.settings
        if not file.is_file():
            raise UserError(f"{path} is not a run folder: it has no run.yaml")
        content = load_yaml(file)
        try:
            provenance = Provenance.model_validate(content.pop("provenance"))
        except (AttributeError, KeyError, TypeError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else repr(error)
            raise UserError(f"{folder.settings} is not what a run wrote ({reason}): start the run again") from error
        try:
            config = load_run_config(TASK_CONFIGS[provenance.task], content | {"output": str(path)})
        except UserError as error:
            version = provenance.versions.get("etherdiff", "another version")
            raise UserError(
                f"{folder.settings} cannot be used ({'; '.join(error.problems)}): it was made by etherdiff {version}; "
                "use that version, or start the run again"
            ) from error
        learned = _learned(config)
        return cls(folder, config, provenance, path.resolve().name, Path(learned).name or learned)

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def task(self) -> str:
        """dreambooth, s2i or perturb."""
        return self.provenance.task

    @property
    def is_controlled(self) -> bool:
        """Whether a control image says where things are."""
        return isinstance(self.config, S2IConfig)

    @property
    def subject_path(self) -> Path:
        """Path of the subject or the dataset, on the machine that the run was started on."""
        return Path(getattr(self.config, "data_root", None) or "", _learned(self.config))

    @property
    def method_label(self) -> str:
        """The method as tables name it: magnitudes that were fitted again are a method of their own."""
        is_refitted = isinstance(self.config, S2IConfig) and self.config.refit is not None
        return str(self.config.method) + (REFITTED if is_refitted else "")

    @property
    def adapters(self) -> list[Path]:
        """Folders of the adapters on the base's UNet, in this order."""
        return self.folder.adapters

    @property
    def results(self) -> list[Path]:
        """Folders that the run saves when it ends, whether they are there or not."""
        is_refitted = isinstance(self.config, S2IConfig) and self.config.refit is not None
        found = [self.folder.refitted_adapter] if is_refitted else []
        found += [self.folder.adapter] if self.config.method != "none" else []
        return found + ([self.folder.control_encoder] if self.is_controlled else [])

    def check_results(self) -> None:
        """Raise UserError where the run has not finished, or a result is damaged."""
        for result in self.results:
            if not result.is_dir():
                raise UserError(
                    f"{self.path} has no {result.name} yet: the run has not finished ({program('resume', self.path)})"
                )
            check_result(self.folder, result)

    @property
    def is_finished(self) -> bool:
        """Whether every result is there, as it was written, and trained to the last step."""
        try:
            self.check_results()
            recorded = all(manifest_of(result).is_file() for result in self.results)
            return recorded and (not self.config.steps or self.cost.steps == self.config.steps)
        except UserError:
            return False

    @cached_property
    def result(self) -> EvalResult | None:
        """eval/metrics.json; None where the run was not scored. UserError where it cannot be used."""
        return read_result(self.path) if self.folder.result.is_file() else None

    @property
    def scores(self) -> dict[str, Score]:
        """The run's own scores by name; none where it was not scored."""
        return self.result.scores if self.result else {}

    @property
    def best(self) -> Best | None:
        """best/best.json; None where there is none. UserError where it cannot be read."""
        return read_best(self.folder.best)

    @property
    def cost(self) -> Cost:
        """cost.json, without its damaged parts. UserError where it cannot be read."""
        return read_record(Cost, self.folder.cost)[0]

    @cached_property
    def curves(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl by step; the last of several lines for one step wins."""
        return read_metrics(self.folder)

    @property
    def diverged(self) -> bool:
        """Whether training ended because its loss or its weights became NaN or infinite.

        Version 0.1 recorded it as a line without a loss; a step that was only skipped also has a learning rate.
        """
        last = self.curves[-1] if self.curves else {}
        return last.get("diverged") is True or ("loss" in last and last["loss"] is None and "learning_rate" not in last)


def _learned(config: RunConfig) -> str:
    return str(config.dataset if isinstance(config, S2IConfig) else config.subject)  # type: ignore[union-attr]


def recorded_processes(path: Path) -> int:
    """Return how many processes began a run; 1 where that cannot be read."""
    try:
        return Run.open(path).provenance.processes or 1
    except UserError:
        return 1
