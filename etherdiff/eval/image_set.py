"""The images of one scoring and what is known of them: whose they are, their features, what is wrong with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from etherdiff.eval.features import BLACK, Distances, Features, compute_features
from etherdiff.eval.intervals import DRAWS
from etherdiff.eval.metrics import METRICS, SUBJECT_METRICS
from etherdiff.eval.network import Backbone

PromptForm = Literal["with identifier", "without identifier"]
REAL, HELD_OUT_IMAGES, GENERATED = "real", "held out", "generated"


@dataclass(frozen=True)
class PromptImages:
    """The images that were generated for one prompt."""

    prompt: str
    """As it was drawn from, identifier included: "a sks dog in the jungle"."""
    images: tuple[Path, ...]
    seeds: tuple[int, ...]
    """One per image."""
    plain_prompt: str | None = None
    """The same without the identifier: "a dog in the jungle"."""
    wanted: int | None = None
    """How many images there should be; None: as many as there are."""

    def text(self, form: PromptForm) -> str:
        """The prompt in one of its forms."""
        return self.prompt if form == "with identifier" else self.plain_prompt or ""


@dataclass(frozen=True)
class Scoring:
    """How to score."""

    metrics: tuple[str, ...] = SUBJECT_METRICS
    """Of `METRICS`; baselines and scores against held-out images come along by themselves."""
    preset: str = "paper"
    backbones: Mapping[str, str] = field(default_factory=dict)
    """Role -> another backbone than the preset's: see `find_backbones`."""
    clip_t_prompt: PromptForm = "with identifier"
    device: str = "auto"
    batch_size: int = 32
    """Images decoded and encoded together."""
    workers: int | None = None
    """Decoding processes; None: by the number of images and cores."""
    seed: int = 0
    """Of the intervals' resampling."""
    draws: int = DRAWS

    @property
    def all_metrics(self) -> list[str]:
        """The metrics asked for, and the baselines of their row of real images."""
        baselines = [METRICS[name].baseline for name in self.metrics if name in METRICS]
        return list(dict.fromkeys([*self.metrics, *(name for name in baselines if name)]))

    @property
    def roles(self) -> list[str]:
        """The backbones that the metrics read."""
        return list(dict.fromkeys(METRICS[name].role for name in self.metrics))


@dataclass
class ImageSet:
    """Everything known of the images; indices count real, held-out and generated images in this order."""

    paths: list[Path]
    real: range
    held_out: range
    prompts: Sequence[PromptImages]
    groups: list[range]
    """Per prompt, its images; empty for a prompt without any."""
    features: Features
    distances: Distances | None
    backbones: Mapping[str, Backbone]

    @property
    def generated(self) -> range:
        return range(self.held_out.stop, len(self.paths))

    @property
    def reference(self) -> range:
        return range(self.held_out.stop)

    def usable(self, role: str, indices: Sequence[int]) -> list[int]:
        if role == "lpips":
            bad = {*self.features.faults, *self.features.unusable.get(role, [])}
            return [index for index in indices if index not in bad]
        return [index for index in indices if index in self.features.vectors.get(role, {})]

    def vectors(self, role: str, indices: Sequence[int]) -> Tensor:
        return torch.stack([self.features.vectors[role][index] for index in indices])

    def lpips(self, number: int, rows: Sequence[int], columns: Sequence[int] | None) -> Tensor:
        """Distances of group `number` (0: the reference images) to reference images, or (None) among its own `rows`."""
        assert self.distances is not None
        group = self.distances.groups[number]
        table = self.distances.among[number] if columns is None else self.distances.to_reference[number]
        places = [index - group.start for index in rows]
        return table[places][:, places if columns is None else [index - self.reference.start for index in columns]]

    def group_number(self, prompt: int) -> int:
        """Where a prompt's images are in `distances`, which has no empty groups and the reference images first."""
        return 1 + sum(bool(group) for group in self.groups[:prompt])

    def left_out(self, long_prompts: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        faults = self.features.faults
        by_role = self.features.unusable.items()
        return {
            BLACK: [self.describe(index) for index in sorted(faults) if faults[index] == BLACK],
            "unreadable": [self.describe(i) | {"why": faults[i]} for i in sorted(faults) if faults[i] != BLACK],
            "bad_features": [self.describe(i) | {"backbone": role} for role, indices in by_role for i in sorted(indices)],
            "missing": [
                {"prompt": prompt.prompt, "wanted": prompt.wanted, "found": len(prompt.images)}
                for prompt in self.prompts
                if prompt.wanted is not None and prompt.wanted != len(prompt.images)
            ],
            "long_prompts": list(long_prompts),
        }

    def describe(self, index: int) -> dict[str, Any]:
        """An image in words that hold on any machine."""
        if index in self.generated:
            number = next(number for number, group in enumerate(self.groups) if index in group)
            seed = self.prompts[number].seeds[index - self.groups[number].start]
            return {"kind": GENERATED, "prompt": self.prompts[number].prompt, "seed": seed}
        return {"kind": REAL if index in self.real else HELD_OUT_IMAGES, "name": self.paths[index].name}


def read_images(
    real: Sequence[Path],
    held_out: Sequence[Path],
    prompts: Sequence[PromptImages],
    scoring: Scoring,
    backbones: Mapping[str, Backbone],
) -> ImageSet:
    generated = [path for prompt in prompts for path in prompt.images]
    reals, helds = range(len(real)), range(len(real), len(real) + len(held_out))
    groups, start = [], helds.stop
    for prompt in prompts:
        groups.append(range(start, start + len(prompt.images)))
        start = groups[-1].stop
    entries = [METRICS[name] for name in scoring.all_metrics]
    of_generated = frozenset(entry.role for entry in entries if entry.compares != "real x other real")
    of_real = frozenset(entry.role for entry in entries if entry.compares not in ("image x prompt", "images of one prompt"))
    of_held_out = frozenset(entry.role for entry in entries if entry.compares == "real x generated")
    features, distances = compute_features(
        [*real, *held_out, *generated],
        {role: backbones[role] for role in scoring.roles},
        [of_real] * len(reals) + [of_held_out] * len(helds) + [of_generated] * len(generated),
        reference=range(helds.stop),
        groups=[group for group in groups if group],
        batch_size=scoring.batch_size,
        workers=scoring.workers,
    )
    return ImageSet([*real, *held_out, *generated], reals, helds, prompts, groups, features, distances, backbones)
