"""Scores of image files: each with its interval, its identity, and the images that it leaves out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from etherdiff import __version__
from etherdiff.eval.features import BLACK, Distances, Features, compute_features, is_usable
from etherdiff.eval.functional import cosine_pairs, cosine_rows, fid, fid_problem, upper_pairs
from etherdiff.eval.intervals import DRAWS, LEVEL, MIN_PROMPTS, Interval, bootstrap_mean, bootstrap_pairs, jackknife
from etherdiff.eval.metrics import HELD_OUT, METRICS, PROMPT_METRICS, SUBJECT_METRICS, Metric
from etherdiff.eval.networks import Backbone, ImageTextBackbone, find_backbones, versions_of
from etherdiff.system.devices import device_problem
from etherdiff.system.errors import UserError
from etherdiff.system.files import digest

PromptForm = Literal["with identifier", "without identifier"]
REAL, HELD_OUT_IMAGES, GENERATED = "real", "held out", "generated"
FID_BLOCKS = 20


@dataclass(frozen=True)
class PromptImages:
    """The images that were generated for one prompt."""

    prompt: str
    """Prompt with identifier: "a sks dog in the jungle"."""
    images: tuple[Path, ...]
    seeds: tuple[int, ...]
    """One per image."""
    plain_prompt: str | None = None
    """Prompt without identifier: "a dog in the jungle"."""
    wanted: int | None = None
    """Expected number of images; None: as many as there are."""

    def text(self, form: PromptForm) -> str:
        """Return the prompt in one of its forms."""
        return self.prompt if form == "with identifier" else self.plain_prompt or ""


@dataclass(frozen=True)
class Scoring:
    """How to score."""

    metrics: tuple[str, ...] = SUBJECT_METRICS
    """Names of metrics; baselines and scores against held-out images are added."""
    preset: str = "paper"
    backbones: Mapping[str, str] = field(default_factory=dict)
    """Role -> backbone instead of the preset's (see `find_backbones`)."""
    clip_t_prompt: PromptForm = "with identifier"
    device: str = "auto"
    batch_size: int = 32
    """Number of images decoded and encoded together."""
    workers: int | None = None
    """Number of decoding processes; None: chosen by the number of images and cores."""
    seed: int = 0
    """Seed of the intervals' resampling."""
    draws: int = DRAWS
    """Number of times the intervals resample."""

    @property
    def all_metrics(self) -> list[str]:
        """Metrics that are asked for, and their baselines over real images."""
        baselines = [METRICS[name].baseline for name in self.metrics if name in METRICS]
        return list(dict.fromkeys([*self.metrics, *(name for name in baselines if name)]))

    @property
    def roles(self) -> list[str]:
        """Roles of the backbones that the metrics use."""
        return list(dict.fromkeys(METRICS[name].role for name in self.metrics))


def score_images(
    real: Sequence[Path],
    held_out: Sequence[Path],
    prompts: Sequence[PromptImages],
    scoring: Scoring,
    generation: Mapping[str, Any] | None = None,
    loaded: Mapping[str, Backbone] | None = None,
) -> dict[str, Any]:
    """Score generated images against real ones; JSON-able, the content of metrics.json.

    Args:
        real: the images that were trained on.
        held_out: images of the subject that were not; scores against them have names of their own.
        generation: further settings of the images (sampler, steps, guidance), kept in every identity.
        loaded: backbones by role, for callers that score repeatedly; None: found by `scoring`.

    Returns:
        scores: name -> mean, low, high (None where nothing can be resampled), n (images), pairs, interval, identity.
        per_prompt: for each prompt its texts, seeds, number of images scored and scores (mean, n, pairs; None without).
        left_out: every image or prompt that is in no score, or not in all, by reason; empty lists where there are none.
        not_scored: metric -> why it has no score.

    Raises:
        UserError: everything that prevents scoring, in one message.
    """
    _refuse_what_cannot_be_scored(real, prompts, scoring, loaded)
    if loaded is None:
        loaded = find_backbones(scoring.roles, scoring.preset, scoring.backbones, scoring.device)
    images = encode(real, held_out, prompts, scoring, loaded)
    scorer = Scorer(images, scoring, dict(generation or {}))
    for name in scoring.all_metrics:
        scorer.score(name)
    left_out = images.left_out(scorer.long_prompts)
    if not scorer.scores:
        reasons = [
            f"{reason}: {', '.join(str(value) for value in one.values())}"
            for reason, found in left_out.items()
            for one in found
            if reason != "long_prompts"
        ]
        raise UserError(["nothing can be scored", *reasons, *(f"{name}: {why}" for name, why in scorer.not_scored.items())])
    return {
        "scores": scorer.scores,
        "per_prompt": scorer.per_prompt(),
        "left_out": left_out,
        "not_scored": scorer.not_scored,
        "images": {"real": len(real), "held_out": len(held_out), "generated": len(images.generated)},
    }


def _refuse_what_cannot_be_scored(
    real: Sequence[Path], prompts: Sequence[PromptImages], scoring: Scoring, loaded: Mapping[str, Backbone] | None
) -> None:
    there = ", ".join(PROMPT_METRICS)
    problems = [f"metric {name!r}: there are {there}" for name in scoring.metrics if name not in PROMPT_METRICS]
    known = [METRICS[name] for name in scoring.metrics if name in METRICS]
    generated = sum(len(prompt.images) for prompt in prompts)
    if not scoring.metrics:
        problems.append(f"no metric is asked for: there are {there}")
    if not generated:
        problems.append("there are no generated images to score")
    if not real and any(metric.compares in ("real x generated", "real x other real", "sets") for metric in known):
        problems.append("there are no real images to compare with")
    for prompt in prompts:
        if len(prompt.seeds) != len(prompt.images):
            problems.append(f"{prompt.prompt!r}: {len(prompt.images)} images but {len(prompt.seeds)} seeds")
    if any(metric.compares == "image x prompt" for metric in known) and scoring.clip_t_prompt == "without identifier":
        problems += [f"{prompt.prompt!r} has no form without identifier" for prompt in prompts if prompt.plain_prompt is None]
    if any(metric.compares == "sets" for metric in known) and len(real) != generated:
        problems.append(f"fid: {fid_problem(len(real), generated, 0)}")
    if loaded is not None:
        problems += [f"no backbone is loaded for {metric.role}" for metric in known if metric.role not in loaded]
    if problem := device_problem(scoring.device):
        problems.append(problem)
    if problems:
        raise UserError(list(dict.fromkeys(problems)))


# --- Images and their features ---------------------------------------------------------------------------------------


@dataclass
class EncodedImages:
    """The images of one scoring and their features; indices count real, held-out and generated images in this order."""

    paths: list[Path]
    real: range
    held_out: range
    prompts: Sequence[PromptImages]
    groups: list[range]
    """Indices of each prompt's images; empty for a prompt without images."""
    features: Features
    distances: Distances | None
    """LPIPS distances, if they are asked for."""
    backbones: Mapping[str, Backbone]

    @property
    def generated(self) -> range:
        return range(self.held_out.stop, len(self.paths))

    def usable(self, role: str, indices: Sequence[int]) -> list[int]:
        """Return the images that have features for the role."""
        if role == "lpips":
            bad = {*self.features.faults, *self.features.unusable.get(role, [])}
            return [index for index in indices if index not in bad]
        return [index for index in indices if index in self.features.vectors.get(role, {})]

    def vectors(self, role: str, indices: Sequence[int]) -> Tensor:
        """Return the role's features of images, (N, D)."""
        return torch.stack([self.features.vectors[role][index] for index in indices])

    def pairs(self, role: str, group: range, rows: Sequence[int], columns: Sequence[int] | None) -> Tensor:
        """Return the values of pairs: images `rows` of a group and reference images, or (None) among `rows`.

        Cosines of features, or distances where the role is lpips: float64 (rows, columns).
        """
        if role != "lpips":
            return cosine_pairs(self.vectors(role, rows), self.vectors(role, rows if columns is None else columns))
        if self.distances is None:
            raise RuntimeError("LPIPS distances were not computed")
        number, places = self.distances.groups.index(group), [index - group.start for index in rows]
        if columns is None:
            return self.distances.among[number][places][:, places]
        return self.distances.to_reference[number][places][:, list(columns)]

    def left_out(self, long_prompts: Sequence[dict[str, Any]] = ()) -> dict[str, list[dict[str, Any]]]:
        """Return every image or prompt that is missing from a score, by reason."""
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
        """Return a description of an image without its path."""
        if index in self.generated:
            number = next(number for number, group in enumerate(self.groups) if index in group)
            seed = self.prompts[number].seeds[index - self.groups[number].start]
            return {"kind": GENERATED, "prompt": self.prompts[number].prompt, "seed": seed}
        return {"kind": REAL if index in self.real else HELD_OUT_IMAGES, "name": self.paths[index].name}


def encode(
    real: Sequence[Path],
    held_out: Sequence[Path],
    prompts: Sequence[PromptImages],
    scoring: Scoring,
    backbones: Mapping[str, Backbone],
) -> EncodedImages:
    """Read all images and compute the features that the metrics need."""
    generated = [path for prompt in prompts for path in prompt.images]
    reals, helds = range(len(real)), range(len(real), len(real) + len(held_out))
    groups, start = [], helds.stop
    for prompt in prompts:
        groups.append(range(start, start + len(prompt.images)))
        start = groups[-1].stop
    metrics = [METRICS[name] for name in scoring.all_metrics]
    of_generated = frozenset(m.role for m in metrics if m.compares != "real x other real")
    of_real = frozenset(m.role for m in metrics if m.compares not in ("image x prompt", "images of one prompt"))
    of_held_out = frozenset(m.role for m in metrics if m.compares == "real x generated")
    features, distances = compute_features(
        [*real, *held_out, *generated],
        {role: backbones[role] for role in scoring.roles},
        [of_real] * len(reals) + [of_held_out] * len(helds) + [of_generated] * len(generated),
        reference=range(helds.stop),
        groups=[group for group in groups if group],
        batch_size=scoring.batch_size,
        workers=scoring.workers,
    )
    return EncodedImages([*real, *held_out, *generated], reals, helds, prompts, groups, features, distances, backbones)


# --- One metric after another ----------------------------------------------------------------------------------------


class Scorer:
    """The scores of `EncodedImages`: means over pairs, intervals, identities."""

    def __init__(self, images: EncodedImages, scoring: Scoring, generation: dict[str, Any]) -> None:
        self.images, self.scoring, self.generation = images, scoring, generation
        self.scores: dict[str, dict[str, Any]] = {}
        self.not_scored: dict[str, str] = {}
        self.long_prompts: list[dict[str, Any]] = []
        self._by_prompt: dict[str, list[dict[str, Any] | None]] = {}
        self._texts: dict[int, Tensor] | None = None

    def score(self, name: str) -> None:
        """Compute the metric's score, and that against held-out images where it has one."""
        metric = METRICS[name]
        if metric.compares == "sets":
            self._score_sets(metric)
        elif metric.compares == "real x other real":
            self._score_real(metric)
        else:
            self._score_prompts(name, metric, self.images.real, "training images")
            if metric.compares == "real x generated" and self.images.held_out:
                self._score_prompts(name + HELD_OUT, metric, self.images.held_out, "held-out images")

    def per_prompt(self) -> list[dict[str, Any]]:
        """Return the scores of each prompt."""
        return [
            {
                "prompt": prompt.prompt,
                "plain_prompt": prompt.plain_prompt,
                "seeds": list(prompt.seeds),
                "n": sum(index not in self.images.features.faults for index in self.images.groups[number]),
                "scores": {name: found[number] for name, found in self._by_prompt.items()},
            }
            for number, prompt in enumerate(self.images.prompts)
        ]

    def _score_prompts(self, name: str, metric: Metric, reference: range, kind: str) -> None:
        """Compute a mean over pairs, prompt by prompt, with an interval over prompts or images."""
        total, tables, found = metric.make(), [], list[dict[str, Any] | None]()
        columns = self.images.usable(metric.role, reference)
        for number in range(len(self.images.prompts)):
            table = self._pairs_of_prompt(metric, number, columns)
            if table is None:
                found.append(None)
                continue
            tables.append(table)
            found.append({"mean": float(total(table)), "n": len(table), "pairs": _count_pairs(metric, table)})
        if not tables:
            self.not_scored[name] = self._why_not(metric, columns)
            return
        self._by_prompt[name] = found
        self.scores[name] = {
            "mean": float(total.compute()),
            **self._interval(metric, tables),
            "n": sum(len(table) for table in tables),
            "pairs": sum(_count_pairs(metric, table) for table in tables),
            "identity": self._identity(metric, reference if metric.compares == "real x generated" else None, kind),
        }

    def _pairs_of_prompt(self, metric: Metric, prompt: int, columns: Sequence[int]) -> Tensor | None:
        """Return the values of a prompt's pairs, a row for each usable image; None if there is no pair."""
        images = self.images
        rows = images.usable(metric.role, images.groups[prompt])
        if metric.compares == "real x generated":
            return images.pairs(metric.role, images.groups[prompt], rows, columns) if rows and columns else None
        if metric.compares == "images of one prompt":
            return images.pairs(metric.role, images.groups[prompt], rows, None) if len(rows) > 1 else None
        texts = self._text_features()
        if not rows or prompt not in texts:
            return None
        return cosine_rows(images.vectors(metric.role, rows), texts[prompt].expand(len(rows), -1))[:, None]

    def _score_real(self, metric: Metric) -> None:
        kept = self.images.usable(metric.role, self.images.real)
        if len(kept) < 2:
            self.not_scored[metric.name] = f"{len(kept)} usable real image(s): two are needed"
            return
        # for LPIPS, the reference images are the first group
        table = self.images.pairs(metric.role, range(self.images.held_out.stop), kept, None)
        low_high = bootstrap_pairs([table.numpy()], self.scoring.seed, self.scoring.draws)
        self.scores[metric.name] = {
            "mean": float(metric.make()(table)),
            **self._described(low_high, "real images"),
            "n": len(kept),
            "pairs": _count_pairs(metric, table),
            "identity": {
                "definition": metric.definition,
                "backbone": self.images.backbones[metric.role].identity.as_dict(),
                "reference": self._reference(self.images.real, "training images"),
                "versions": scoring_versions(),
            },
        }

    def _score_sets(self, metric: Metric) -> None:
        """Score sets. Real image i belongs to generated image i: if one is left out, so is the other."""
        images = self.images
        both = [
            (real, generated)
            for real, generated in zip(images.real, images.generated, strict=True)
            if images.usable(metric.role, [real, generated]) == [real, generated]
        ]
        width = images.vectors(metric.role, both[0]).shape[1] if both else 0
        problem = fid_problem(len(both), len(both), width) if both else "no usable image"
        if problem:
            self.not_scored[metric.name] = problem
            return
        real, generated = (images.vectors(metric.role, side).double() for side in zip(*both, strict=True))
        total = metric.make(width)
        total.update(real, True)
        total.update(generated, False)
        mean = float(total.compute())
        blocks = torch.arange(len(real)) % FID_BLOCKS
        low_high = jackknife(lambda block: fid(real[blocks != block], generated[blocks != block]), FID_BLOCKS, mean)
        self.scores[metric.name] = {
            "mean": mean,
            **self._described(low_high, "blocks of images left out in turn"),
            "n": len(both),
            "pairs": None,
            "identity": self._identity(metric, images.real, "real images") | {"features": width},
        }

    def _text_features(self) -> dict[int, Tensor]:
        """Return prompt number -> (D,) of the prompts that the text encoder reads completely; note the others."""
        if self._texts is None:
            backbone = self.images.backbones["clip"]
            if not isinstance(backbone, ImageTextBackbone):
                raise RuntimeError(f"{backbone.identity.name} reads no texts")
            texts = [prompt.text(self.scoring.clip_t_prompt) for prompt in self.images.prompts]
            beyond = backbone.too_long(texts)
            self.long_prompts = [
                {"prompt": text, "tokens_too_many": count} for text, count in zip(texts, beyond, strict=True) if count
            ]
            kept = [number for number, count in enumerate(beyond) if not count]
            features = list(backbone.encode_text([texts[number] for number in kept])) if kept else []
            self._texts = dict(zip(kept, features, strict=True))
            if bad := [texts[number] for number, vector in self._texts.items() if not is_usable(vector)]:
                raise UserError(f"{backbone.identity.name} gives no usable features for the prompts {', '.join(bad)}")
        return self._texts

    def _interval(self, metric: Metric, tables: Sequence[Tensor]) -> dict[str, Any]:
        seed, draws = self.scoring.seed, self.scoring.draws
        among = metric.compares == "images of one prompt"
        if len(tables) >= MIN_PROMPTS:
            values = [upper_pairs(table) if among else table.flatten() for table in tables]
            found = bootstrap_mean([float(v.sum()) for v in values], [len(v) for v in values], seed, draws)
            return self._described(found, "prompts")
        if among:
            return self._described(bootstrap_pairs([table.numpy() for table in tables], seed, draws), "images")
        rows = torch.cat([table.sum(1) for table in tables])
        counts = torch.cat([torch.full((len(table),), table.shape[1]) for table in tables])
        return self._described(bootstrap_mean(rows.numpy(), counts.numpy(), seed, draws), "images")

    def _described(self, interval: Interval | None, unit: str) -> dict[str, Any]:
        return interval_fields(interval, unit, self.scoring.seed, self.scoring.draws)

    def _identity(self, metric: Metric, reference: range | None, kind: str) -> dict[str, Any]:
        prompts = self.images.prompts
        form: PromptForm = self.scoring.clip_t_prompt if metric.compares == "image x prompt" else "with identifier"
        seeds = [list(prompt.seeds) for prompt in prompts]
        return {
            "definition": metric.definition,
            "backbone": self.images.backbones[metric.role].identity.as_dict(),
            "reference": self._reference(reference, kind) if reference is not None else None,
            "prompts": {"n": len(prompts), "form": form, "sha256": digest([prompt.text(form) for prompt in prompts])},
            "seeds": seeds[0] if all(one == seeds[0] for one in seeds) else seeds,
            "generation": self.generation,
            "versions": scoring_versions(),
        }

    def _reference(self, indices: range, kind: str) -> dict[str, Any]:
        hashes = sorted(self.images.features.shas[index] or "" for index in indices)
        return {"images": kind, "n": len(indices), "sha256": digest(hashes)}

    def _why_not(self, metric: Metric, columns: Sequence[int]) -> str:
        if metric.compares == "real x generated" and not columns:
            return "no usable image to compare with"
        if not self.images.usable(metric.role, self.images.generated):
            return "no usable generated image"
        if metric.compares == "images of one prompt":
            return "no prompt has two usable images"
        return "every prompt is longer than the text encoder reads"


def _count_pairs(metric: Metric, table: Tensor) -> int:
    """Return the number of pairs that a metric takes from a table."""
    return int(metric.units(table)[0, 1])


def interval_fields(interval: Interval | None, unit: str, seed: int, draws: int) -> dict[str, Any]:
    """Return a score's low, high and interval; without an interval low and high are None."""
    low, high = interval or (None, None)
    return {"low": low, "high": high, "interval": {"level": LEVEL, "over": unit, "draws": draws, "seed": seed}}


def scoring_versions() -> dict[str, str]:
    """Return the versions that every score's identity names."""
    return {"etherdiff": __version__, **versions_of("torchmetrics", "numpy")}
