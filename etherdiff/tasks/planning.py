"""Before anything expensive: find everything a run needs, and say all that is wrong with it at once."""

import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import nn

from etherdiff.adapters.methods import METHODS, TARGETS, MethodOptions, add_adapter, resolve_options
from etherdiff.config import DreamBoothConfig, SubjectConfig, TrainConfig
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import Base, load_tokenizer
from etherdiff.images.reading import UnreadableImage, read_images
from etherdiff.system.devices import device_problem, resolve_device
from etherdiff.system.errors import UserError
from etherdiff.system.locks import LOCK
from etherdiff.system.paths import data_root
from etherdiff.system.terminal import is_main_process, warn
from etherdiff.tasks.subjects import Subject, find_subject

T = TypeVar("T")
PAPER_CLASS_IMAGES = 200
TINY_CLASS_IMAGES = 20  # drawing the paper's 200 would take longer than a few hundred steps


@dataclass(frozen=True)
class DreamBoothPlan:
    """A run that can start: `config` has every default filled in."""

    config: DreamBoothConfig
    base: Base
    options: MethodOptions
    images: list[Image.Image]
    subject_prompt: str
    class_prompt: str
    output: Path
    resolution: int


class Problems:
    """Collects what is wrong, so that the user reads it all in one message."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def attempt(self, action: Callable[[], T]) -> T | None:
        """The action's result; None, and its problems noted, where the user gave something wrong."""
        try:
            return action()
        except UserError as error:
            self.found += error.problems
        except (ValueError, OSError) as error:
            self.found.append(str(error))
        return None

    def raise_if_any(self) -> None:
        if self.found:
            raise UserError(self.found)


def plan_dreambooth(config: DreamBoothConfig, resuming: bool = False) -> DreamBoothPlan:
    """Check the whole configuration against the machine, the base and the images. Raises one UserError with everything."""
    problems = Problems()
    root = data_root(config.data_root)
    base = problems.attempt(lambda: find_base(config.base, config.prediction_type, "configs" if config.dry_run else "weights"))
    subject = problems.attempt(lambda: find_subject(config.subject, root))
    images = None
    if subject is not None:
        images = problems.attempt(lambda: read_images(subject.images, config.skip_bad, _say_skipped))
    class_noun = problems.attempt(lambda: class_noun_of(config, subject))
    options = problems.attempt(lambda: resolve_options(config.method, method_options(config)))
    resolution = config.resolution or (base.resolution if base else 0)
    if base is not None:
        problems.found += base.resolution_problems(resolution)
    if base is not None and options is not None:
        problems.attempt(lambda: try_adapter(base, config.method, options))
    problems.found += machine_problems(config)
    output = config.output or Path("runs") / f"{Path(config.subject).name}-{config.method}"
    if not resuming:
        problems.found += problems.attempt(lambda: output_problems(output, config.overwrite)) or []
    subject_prompt, class_prompt = f"a photo of {config.identifier} {class_noun}", f"a photo of {class_noun}"
    if base is not None:
        problems.found += problems.attempt(lambda: prompt_problems(base, subject_prompt)) or []
    problems.raise_if_any()
    assert base is not None
    assert options is not None
    assert images is not None
    resolved = config.model_copy(
        update={
            # absolute, so that the run can be resumed from any folder
            "output": output.absolute(),
            "base": absolute(config.base),
            "subject": absolute(config.subject),
            "data_root": root.absolute() if root else None,
            "learning_rate": config.learning_rate or METHODS[config.method].learning_rate,
            "blocks": options.blocks,
            "rank": options.rank,
            "resolution": resolution,
            "class_noun": class_noun,
            "class_images": config.class_images or (TINY_CLASS_IMAGES if base.name == "tiny" else PAPER_CLASS_IMAGES),
        }
    )
    _warn_about_tokens(base, config.identifier)
    return DreamBoothPlan(
        config=resolved,
        base=base,
        options=options,
        images=images,
        subject_prompt=subject_prompt,
        class_prompt=class_prompt,
        output=output,
        resolution=resolution,
    )


def class_noun_of(config: SubjectConfig, subject: Subject | None) -> str | None:
    """What the subject is, as told or as DreamBooth has it. UserError where a subject was found and nothing says."""
    class_noun = config.class_noun or (subject.class_noun if subject else None)
    if subject is not None and class_noun is None:
        raise UserError(f"class_noun: say what {config.subject} shows, for instance --class-noun dog")
    return class_noun


def absolute(name: str) -> str:
    """A path that exists, absolute; any other name as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() and name != "tiny" else name


def method_options(config: TrainConfig) -> MethodOptions:
    """The adapter's options as the configuration gives them."""
    return MethodOptions(TARGETS[config.targets], config.blocks, config.rank, config.dropout)


def machine_problems(config: TrainConfig) -> list[str]:
    """What this machine lacks for the configuration."""
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
    """Why a run folder cannot be created there."""
    if not is_main_process():  # the first process may have created it already
        return []
    if output.exists() and not output.is_dir():
        return [f"output: {output} is a file"]
    parent = next(path for path in [output, *output.absolute().parents] if path.exists())
    if not parent.is_dir():
        return [f"output: {parent} is a file"]
    if not os.access(parent, os.W_OK | os.X_OK):
        return [f"output: {parent} is read-only; choose another folder"]
    if output.is_dir() and any(path.name != LOCK for path in output.iterdir()):
        if not (output / "run.yaml").is_file():
            return [f"output: {output} holds something that is not a run; choose another folder"]
        if not overwrite:
            return [f"output: {output} holds a run; resume it (etherdiff resume {output}) or pass --overwrite"]
    return []


def prompt_problems(base: Base, prompt: str) -> list[str]:
    """Why the text encoder would not read the whole prompt."""
    tokenizer = load_tokenizer(base)
    tokens = len(tokenizer(prompt).input_ids)
    if tokens <= tokenizer.model_max_length:
        return []
    return [
        f"identifier, class_noun: their prompt is {tokens} tokens long, and the text encoder reads "
        f"{tokenizer.model_max_length}: shorten them"
    ]


def try_adapter(base: Base, method: str, options: MethodOptions) -> nn.Module:
    """Put the adapter into a UNet without weights: what does not fit is found before anything is loaded."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(base.config("unet"))
    return add_adapter(unet, method, options)


def _say_skipped(bad: UnreadableImage) -> None:
    warn(f"left out: {bad}")


def _warn_about_tokens(base: Base, identifier: str) -> None:
    tokens = load_tokenizer(base).tokenize(identifier)
    if len(tokens) > 1:
        shown = json.dumps([token.removesuffix("</w>") for token in tokens], ensure_ascii=False)
        warn(f"the identifier {identifier!r} is {len(tokens)} tokens {shown}, each with a meaning already; sks is one")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
