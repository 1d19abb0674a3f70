"""What the main path asks of a task, in the order in which it asks."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from accelerate import Accelerator
from torch import nn

from etherdiff.adapters.io import save_adapter
from etherdiff.adapters.methods import MethodOptions, add_adapter
from etherdiff.config import TrainConfig
from etherdiff.families.sd1 import Base, StableDiffusion
from etherdiff.runs.folder import RunFolder, manifest_of, write_manifest
from etherdiff.train.batches import StepBatches
from etherdiff.train.loop import ParameterGroup


class Plan(Protocol):
    """A run that can start."""

    @property
    def config(self) -> TrainConfig:
        """With every default filled in."""

    @property
    def base(self) -> Base: ...

    @property
    def options(self) -> MethodOptions: ...

    @property
    def output(self) -> Path: ...

    @property
    def resolution(self) -> int: ...


P = TypeVar("P", bound=Plan)


@dataclass(frozen=True)
class Watchers:
    """Extras beside the loop, in the first process and where they are wanted."""

    draw_samples: Callable[[int], None] | None = None
    score_step: Callable[[int], dict[str, float]] | None = None


class Job(ABC, Generic[P]):
    """One run of a task. Making one checks everything, and raises one UserError with all that is wrong."""

    task: ClassVar[str]
    """Its name in run.yaml."""
    plan: P

    @abstractmethod
    def digest(self) -> str:
        """A name for what is trained on, which must be the same when the run is resumed."""

    @abstractmethod
    def said_of_data(self) -> str:
        """What is trained on, as the user named it, for messages."""

    @abstractmethod
    def describe_size(self) -> str:
        """How many images of which size are trained on."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What else run.yaml records."""

    @abstractmethod
    def prepare(self, model: StableDiffusion, hashes: dict[str, str], accelerator: Accelerator) -> StepBatches:
        """All that the loop will read, from the cache where it is there; `hashes` is the base's fingerprint."""

    @abstractmethod
    def watch(self, model: StableDiffusion, run: RunFolder, base: dict[str, Any], accelerator: Accelerator) -> Watchers:
        """What draws and scores along the way. Called in every process, before the adapter comes."""

    @abstractmethod
    def free_unused(self, model: StableDiffusion, watchers: Watchers) -> None:
        """Drop the parts of the model that nothing needs from here on."""

    @abstractmethod
    def build(self, model: StableDiffusion) -> nn.Module:
        """The module to train, its adapter in place and everything else frozen."""

    def images_per_pass(self) -> int:
        """Images in one forward pass of a process."""
        return self.plan.config.batch_size

    def dry_lines(self) -> list[str]:
        """What a dry run says of this task beside the UNet's size, a line each."""
        return []

    @abstractmethod
    def describe(self, accelerator: Accelerator) -> list[str]:
        """What is about to be trained, a line each; after `build`."""

    def groups(self) -> list[ParameterGroup]:
        """The parts with learning rates of their own."""
        return []

    @abstractmethod
    def save(self, run: RunFolder, base: dict[str, Any]) -> None:
        """Write the result; `base` is recorded beside it."""

    def conclude(self, run: RunFolder) -> None:
        """Say what is to be said when the run is complete."""
        return


def adapt(model: StableDiffusion, plan: Plan) -> nn.Module:
    """Put the method's adapter into the UNet, in place; with `none`, freeze it. Returns what saves the adapter."""
    if plan.config.method == "none":
        return model.unet.requires_grad_(False)
    return add_adapter(model.unet, plan.config.method, plan.options, plan.config.seed)


def save_result(folder: Path, write: Callable[[], None]) -> None:
    """Write a result's folder, then what its files are: a kill in between leaves a result that nothing is recorded of."""
    manifest_of(folder).unlink(missing_ok=True)
    write()
    write_manifest(folder)


def save_adapter_result(adapted: nn.Module, run: RunFolder, base: dict[str, Any]) -> None:
    """The adapter, into RUN/adapter."""
    save_result(run.adapter, lambda: save_adapter(adapted, run.adapter, base))
