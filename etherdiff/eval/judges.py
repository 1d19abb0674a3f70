"""Judges, which score the image sets of a run: one for subjects, one for controlled images, with their networks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etherdiff.config import ControlEvalOptions, EvalOptions, SubjectEvalOptions
from etherdiff.control.signals.signal import Signal
from etherdiff.eval.control_scores import (
    ControlledImage,
    ControlScoring,
    NotReadable,
    ReadBack,
    find_readback,
    score_controlled,
)
from etherdiff.eval.functional import fid_problem
from etherdiff.eval.metrics import CONTROL_METRICS, CONTROL_ROLES, METRICS, PROMPT_METRICS, SUBJECT_METRICS
from etherdiff.eval.networks import PRESETS, ROLES, Backbone, choose_preset, find_backbones
from etherdiff.eval.paper import paper_of_maps, paper_of_subject
from etherdiff.eval.scores import PromptImages, Scoring, score_images
from etherdiff.families.diffusion import chunks
from etherdiff.system.devices import device_problem, resolve_device
from etherdiff.system.errors import Problems, UserError
from etherdiff.tasks.control_sets import REAL, ControlImageSets
from etherdiff.tasks.image_sets import IMAGES, ImageSet, ImageSets
from etherdiff.tasks.subject_sets import BASE_IMAGES, SubjectImageSets


@dataclass(frozen=True)
class Networks:
    """The networks that read images."""

    backbones: Mapping[str, Backbone]
    """Role -> network."""
    readback: ReadBack | None = None
    """Reader of the control; None without control, or where there is none."""
    why_no_readback: str = ""


def asked_metrics(options: EvalOptions, signal: str | None = None) -> tuple[str, ...]:
    """Return the metrics to score by: those asked for, else all for the task. signal: name of the run's control signal."""
    if options.metrics is not None:
        return options.metrics
    return CONTROL_METRICS[signal] if signal else SUBJECT_METRICS


def option_problems(options: EvalOptions, signal: str | None = None) -> list[str]:
    """List what is wrong with names of metrics, presets and networks, and with the device.

    signal: name of the run's control signal; None where it has none, or it is not known yet.
    """
    is_controlled, found = isinstance(options, ControlEvalOptions), []
    if signal or not is_controlled:
        known = CONTROL_METRICS[signal] if signal else PROMPT_METRICS
        there = f"there are {', '.join(known)}"
        found += [
            f"metric {name!r}: {f'of {signal} ' if signal else ''}{there}"
            for name in options.metrics or ()
            if name not in known
        ]
        if options.metrics == ():
            found.append(f"metrics: none is asked for; {there}")
    if options.preset is not None and options.preset not in PRESETS:
        found.append(f"preset {options.preset!r}: there are {', '.join(PRESETS)}")
    roles = (*CONTROL_ROLES, "fid") if is_controlled else ROLES
    for text in options.backbone:
        role, _, name = text.partition("=")
        if role not in roles or not name:
            found.append(f"backbone {text!r}: write it as ROLE=NAME, with ROLE of {', '.join(roles)}")
    return [*found, *filter(None, [device_problem(options.device)])]


def find_networks(base: str, options: EvalOptions, signal: Signal | None = None) -> Networks:
    """Find the networks of the metrics. UserError with everything that is not available.

    Args:
        base: the run's base by name: the tiny one is scored by tiny networks.
        signal: the run's control signal; None where it has none.
    """
    problems, preset = Problems(), choose_preset(base, options.preset)
    roles = dict.fromkeys(METRICS[name].role for name in asked_metrics(options, signal.name if signal else None))
    named = {role: name for role, name in options.named_backbones.items() if role in ROLES}
    readback, why = None, ""
    backbones = problems.attempt(
        find_backbones, [role for role in roles if role not in CONTROL_ROLES], preset, named, options.device
    )
    if signal is not None and set(roles) & set(CONTROL_ROLES):
        try:
            device = resolve_device(options.device)
            readback = problems.attempt(find_readback, signal, options.named_backbones, preset, device).value
        except NotReadable as reason:
            why = str(reason)
    (found,) = problems.settle(backbones)
    return Networks(found, readback, why)


class Judge(ABC):
    """Scores image sets."""

    def is_scored(self, images: ImageSet) -> bool:
        """Say whether a set is scored; else it is only compared with."""
        return True

    @abstractmethod
    def score(self, images: ImageSet, folder: Path, generation: dict[str, Any]) -> dict[str, Any]:
        """Score a set, JSON-able. folder: the eval folder; generation: part of every score's identity."""

    @abstractmethod
    def result(self, scored: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Compose metrics.json from the scores of each set."""


class SubjectJudge(Judge):
    """Compares images of prompts with a subject's photos, with each other, and with their prompts."""

    def __init__(self, sets: SubjectImageSets, options: SubjectEvalOptions, networks: Networks) -> None:
        self.sets, self.subject, self.networks = sets, sets.subject, networks
        form: Any = "without identifier" if options.plain_clip_t else "with identifier"
        self.scoring = Scoring(asked_metrics(options), clip_t_prompt=form, device=options.device)

    def score(self, images: ImageSet, folder: Path, generation: dict[str, Any]) -> dict[str, Any]:
        prompts = []
        for prompt, pictures in zip(self.sets.prompts, chunks(images.pictures, len(self.sets.seeds)), strict=True):
            there = [picture for picture in pictures if (folder / picture.place).is_file()]
            paths, seeds = tuple(folder / picture.place for picture in there), tuple(picture.seed for picture in there)
            prompts.append(PromptImages(prompt.text, paths, seeds, prompt.plain, wanted=len(pictures)))
        real, held_out = self.subject.images, self.subject.held_out
        return score_images(real, held_out, prompts, self.scoring, generation, loaded=self.networks.backbones)

    def result(self, scored: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        own = scored[IMAGES]
        paper = paper_of_subject(self.sets, own["scores"])
        return {**own, "base": scored.get(BASE_IMAGES), "run": self.sets.facts, "paper": paper}


class ControlJudge(Judge):
    """Compares each image with its control, and the set of images with the real ones."""

    def __init__(self, sets: ControlImageSets, options: ControlEvalOptions, networks: Networks) -> None:
        self.sets, self.options = sets, options
        self.scoring = ControlScoring(
            asked_metrics(options, sets.dataset.signal.name),
            sets.dataset.signal,
            sets.resolution,
            networks.readback,
            networks.backbones,
            networks.why_no_readback,
        )

    def is_scored(self, images: ImageSet) -> bool:
        return images.name != REAL or self.options.real

    def score(self, images: ImageSet, folder: Path, generation: dict[str, Any]) -> dict[str, Any]:
        is_real, title = images.name == REAL, f"scoring {images.title}"
        real = [] if is_real else [folder / picture.place for picture in self.sets[REAL].pictures]
        return score_controlled(controlled_images(images, folder), real, self.scoring, None if is_real else generation, title)

    def result(self, scored: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        count = len(self.sets.pairs)
        return {
            **scored[IMAGES],
            "images": {"generated": count, "real": count, "held_out": 0},
            "beside": {name: found for name, found in scored.items() if name != IMAGES},
            "run": self.sets.facts,
            "paper": paper_of_maps(self.sets, scored[IMAGES]["scores"]),
        }


def controlled_images(images: ImageSet, folder: Path) -> Sequence[ControlledImage]:
    """Return a set's images with the pairs that they are scored against; files may be missing."""
    return [ControlledImage(one.pair, one.seed, folder / one.place) for one in images.pictures if one.pair is not None]


def find_judge(sets: ImageSets, options: EvalOptions, networks: Networks) -> Judge:
    """Return the judge of the sets."""
    if isinstance(sets, ControlImageSets) and isinstance(options, ControlEvalOptions):
        return ControlJudge(sets, options, networks)
    if isinstance(sets, SubjectImageSets) and isinstance(options, SubjectEvalOptions):
        return SubjectJudge(sets, options, networks)
    raise TypeError(f"{type(options).__name__} are no options for {type(sets).__name__}")


def refuse_too_few(sets: SubjectImageSets, options: EvalOptions) -> None:
    """Raise UserError if FID is asked for and the number of photos is not that of images."""
    real, drawn = len(sets.subject.images), len(sets[IMAGES].pictures)
    if "fid" in asked_metrics(options) and real != drawn:
        raise UserError(f"fid: {fid_problem(real, drawn, 0)}")
