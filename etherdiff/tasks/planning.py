"""Check, before anything expensive, what runs of every task need: base, adapter, resolution, machine, output."""

import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from etherdiff.adapters.methods import TARGETS, MethodOptions, add_adapter, resolve_options
from etherdiff.config import RunConfig, SubjectConfig, TrainConfig
from etherdiff.families.bases import Parts, find_base
from etherdiff.families.sd1 import Base, cut_off, load_tokenizer
from etherdiff.system.devices import device_problem, resolve_device
from etherdiff.system.errors import Answer, Problems, UserError
from etherdiff.system.files import cache_dir, data_root, why_not_writable
from etherdiff.system.locks import LOCK
from etherdiff.system.terminal import is_main_process, warn
from etherdiff.system.text import program
from etherdiff.tasks.subjects import Subject, find_subject, photo_of

SAMPLE_COUNT = TrainConfig.model_fields["sample_count"].default


@dataclass(frozen=True)
class Plan:
    """A run that can start."""

    config: RunConfig
    """With every default filled in."""
    base: Base
    options: MethodOptions
    output: Path


@dataclass(frozen=True)
class TrainPlan(Plan):
    """A training run that can start."""

    config: TrainConfig
    resolution: int
    """Side of the images in pixels."""


@dataclass(frozen=True)
class Common:
    """What was found for a run of any task. An answer is empty where something is wrong."""

    base: Answer[Base]
    options: Answer[MethodOptions]
    adapted: Answer[nn.Module]
    """The UNet without weights, with the adapter in it; empty with the method `none`, too."""
    resolution: Answer[int]
    output: Path
    data_root: Path | None

    def filled_in(self, config: RunConfig, options: MethodOptions, resolution: int) -> dict[str, Any]:
        """Return what the configuration says with defaults filled in. Paths are absolute, to be found from any folder."""
        found = {
            "output": self.output.absolute(),
            "base": absolute(config.base),
            "data_root": self.data_root.absolute() if self.data_root else None,
            "blocks": options.blocks,
            "rank": options.rank,
            "resolution": resolution,
        }
        return {name: value for name, value in found.items() if name in type(config).model_fields}


def warn_of_long_texts(base: Base, texts: Iterable[str], what: str) -> None:
    """Warn of texts whose end the text encoder does not read. what: they are, in the plural."""
    tokenizer = load_tokenizer(base)
    long = [text for text in dict.fromkeys(texts) if len(text.encode()) > tokenizer.model_max_length - 2]  # a token has a byte
    if lost := [end for text in long if (end := cut_off(tokenizer, text))]:
        warn(f"the text encoder does not read the end of {len(lost)} {what}, for instance {lost[0]!r}: shorten them")


def check_common(config: RunConfig, problems: Problems, name: str, resuming: bool = False) -> Common:
    """Look for everything that runs of any task need, and note what is wrong.

    name: the run folder's where the configuration gives none. resuming: its folder is there, and may be.
    """
    training = config if isinstance(config, TrainConfig) else None
    root = data_root(getattr(config, "data_root", None))
    parts: Parts = "configs" if training and training.dry_run else "weights"
    base = problems.attempt(find_base, config.base, config.prediction_type, parts)
    options = problems.attempt(check_options, config)
    resolution = problems.then(base, lambda found: check_resolution(found, getattr(config, "resolution", None)))
    adapted: Answer[nn.Module] = Answer(None, there=False)
    if base.value and options.value and config.method != "none":
        adapted = problems.attempt(try_adapter, base.value, config.method, options.value)
    if training:
        problems.add(*machine_problems(training))
    if training and not resuming and training.sample_every is None:
        given = {
            "sample_prompts": getattr(config, "sample_prompts", None),
            "sample_count": training.sample_count != SAMPLE_COUNT,
        }
        problems.add(*(f"{key}: does nothing without sample_every: say how often to sample" for key in given if given[key]))
        if training.warmup_steps >= training.steps:
            warn(
                f"warmup_steps: the learning rate rises over {training.warmup_steps} steps, and the run has {training.steps}: "
                "no step is trained after the warm-up"
            )
    if why := why_not_writable(cache_dir()):
        problems.add(f"the cache {why}; set ETHERDIFF_CACHE to a folder that can be written")
    output = config.output or Path("runs") / name
    if not resuming:
        problems.check(output_problems, output, config.overwrite)
    return Common(base, options, adapted, resolution, output, root)


def check_subject(config: SubjectConfig, problems: Problems, common: Common) -> tuple[Answer[Subject], Answer[str]]:
    """Look for the subject and its class noun, and check that the text encoder reads the whole of their prompt."""
    subject = problems.attempt(find_subject, config.subject, common.data_root)
    noun = Answer(config.class_noun) if config.class_noun else problems.then(subject, lambda found: _known_noun(config, found))
    prompt = photo_of(f"{config.identifier} {noun.value}")
    problems.then(common.base, lambda base: problems.check(_prompt_problems, base, prompt))
    return subject, noun


def _known_noun(config: SubjectConfig, subject: Subject) -> str:
    if subject.class_noun is None:
        raise UserError(f"class_noun: say what {config.subject} shows, for instance --class-noun dog")
    return subject.class_noun


def _prompt_problems(base: Base, prompt: str) -> list[str]:
    tokenizer = load_tokenizer(base)
    tokens = len(tokenizer(prompt).input_ids)
    if tokens <= tokenizer.model_max_length:
        return []
    return [
        f"identifier, class_noun: their prompt is {tokens} tokens long, and the text encoder reads "
        f"{tokenizer.model_max_length}: shorten them"
    ]


def check_resolution(base: Base, resolution: int | None) -> int:
    """Return the resolution, by default the base's. UserError where the base cannot draw at it."""
    found = resolution or base.resolution
    if wrong := base.resolution_problems(found):
        raise UserError(wrong)
    return found


def check_options(config: RunConfig) -> MethodOptions:
    """Return the adapter's options with defaults filled in. ValueError where the method does not have one that is given."""
    options = method_options(config)
    if config.method != "none":
        return resolve_options(config.method, options)
    given = [name for name in ("blocks", "rank", "dropout") if getattr(config, name)]
    if given:
        raise ValueError(f"method none trains the control encoder alone: it does not have {' or '.join(given)}")
    return options


def method_options(config: RunConfig) -> MethodOptions:
    """Return the adapter's options as the configuration gives them."""
    rest = (config.rank, config.dropout) if isinstance(config, TrainConfig) else ()
    return MethodOptions(TARGETS[config.targets], config.blocks, *rest)


def try_adapter(base: Base, method: str, options: MethodOptions) -> nn.Module:
    """Put the adapter into a UNet without weights: what does not fit is found before anything is loaded."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(base.config("unet"))
    return add_adapter(unet, method, options)


def absolute(name: str) -> str:
    """Return a path that exists as an absolute one; any other name as it is."""
    path = Path(name)
    return str(path.absolute()) if path.exists() and name != "tiny" else name


def machine_problems(config: TrainConfig) -> list[str]:
    """Return what this machine lacks for the configuration."""
    wrong_device = device_problem(config.device)
    found = [wrong_device] if wrong_device else []
    on_cpu = resolve_device(config.device) == "cpu"
    if config.mixed_precision == "fp16" and on_cpu:
        found.append("mixed_precision: fp16 training needs a GPU; try bf16")
    if config.optimizer == "adamw8bit" and not _installed("bitsandbytes"):
        found.append("optimizer: adamw8bit needs bitsandbytes; pip install 'etherdiff[8bit]'")
    elif config.optimizer == "adamw8bit" and on_cpu:
        found.append("optimizer: adamw8bit needs a GPU; try adamw")
    if config.tracker == "wandb" and not _installed("wandb"):
        found.append("tracker: wandb is not installed; pip install 'etherdiff[wandb]'")
    return found


def output_problems(output: Path, overwrite: bool) -> list[str]:
    """Return why a run folder cannot be created there."""
    if not is_main_process():  # the first process may have created it already
        return []
    if output.exists() and not output.is_dir():
        return [f"output: {output} is a file"]
    parent = next(path for path in [output, *output.absolute().parents] if path.exists())
    if not parent.is_dir():
        return [f"output: {parent} is a file"]
    if not os.access(parent, os.W_OK | os.X_OK):
        return [f"output: {parent} is read-only; choose another folder"]
    if why := why_not_writable(output):
        return [f"output: {why}; choose another folder"]
    if output.is_dir() and any(path.name != LOCK for path in output.iterdir()):
        if not (output / "run.yaml").is_file():
            return [f"output: {output} holds something that is not a run; choose another folder"]
        if not overwrite:
            return [f"output: {output} holds a run; resume it ({program('resume', output)}) or pass --overwrite"]
    return []


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
