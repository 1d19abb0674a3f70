"""One metric after another over the same images: means over pairs, intervals, identities."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from etherdiff import __version__
from etherdiff.eval.features import is_usable
from etherdiff.eval.fid import Fid, fid_problem, frechet_distance, moments
from etherdiff.eval.image_set import ImageSet, PromptForm, Scoring
from etherdiff.eval.intervals import LEVEL, MIN_PROMPTS, Interval, bootstrap_mean, bootstrap_pairs, jackknife
from etherdiff.eval.metrics import HELD_OUT, METRICS, MetricEntry
from etherdiff.eval.network import ImageTextBackbone, versions_of
from etherdiff.eval.pairs import cosine_pairs, cosine_rows, upper_pairs
from etherdiff.system.errors import UserError
from etherdiff.system.files import digest

FID_BLOCKS = 20


class Scorer:
    """The scores of one `ImageSet`."""

    def __init__(self, images: ImageSet, scoring: Scoring, generation: dict[str, Any]) -> None:
        self.images, self.scoring, self.generation = images, scoring, generation
        self.scores: dict[str, dict[str, Any]] = {}
        self.not_scored: dict[str, str] = {}
        self.long_prompts: list[dict[str, Any]] = []
        self._by_prompt: dict[str, list[dict[str, Any] | None]] = {}
        self._texts: dict[int, Tensor] | None = None

    def score(self, name: str) -> None:
        """The metric's score, and that against held-out images where it has one."""
        entry = METRICS[name]
        if entry.compares == "sets":
            self._score_sets(name, entry)
        elif entry.compares == "real x other real":
            self._score_real(name, entry)
        else:
            self._score_prompts(name, entry, self.images.real, "training images")
            if entry.compares == "real x generated" and self.images.held_out:
                self._score_prompts(name + HELD_OUT, entry, self.images.held_out, "held-out images")

    def per_prompt(self) -> list[dict[str, Any]]:
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

    def _score_prompts(self, name: str, entry: MetricEntry, reference: range, kind: str) -> None:
        """A mean over pairs, prompt by prompt, with an interval over prompts or images."""
        total, tables, found = entry.make(), [], []
        columns = self.images.usable(entry.role, reference)
        for number in range(len(self.images.prompts)):
            inputs, table = self._pairs(entry, number, columns)
            found.append(_mean(entry, inputs, table))
            if found[-1] is not None:
                total.update(*inputs)
                tables.append(table)
        if not tables:
            self.not_scored[name] = self._why_not(entry, columns)
            return
        self._by_prompt[name] = found
        self.scores[name] = {
            "mean": float(total.compute()),
            **self._interval(entry, tables),
            "n": sum(len(table) for table in tables),
            "pairs": total.pairs.item(),
            "identity": self._identity(entry, reference if entry.compares == "real x generated" else None, kind),
        }

    def _pairs(self, entry: MetricEntry, prompt: int, columns: Sequence[int]) -> tuple[tuple[Tensor, ...], Tensor]:
        """What the metric is updated with for a prompt, and the pairs' values with a row for each of its usable images."""
        images = self.images
        rows = images.usable(entry.role, images.groups[prompt])
        nothing = torch.zeros(0, 0, dtype=torch.float64)
        if not rows or (entry.compares == "real x generated" and not columns):
            return (), nothing
        if entry.role == "lpips":
            among = entry.compares == "images of one prompt"
            table = images.lpips(images.group_number(prompt), rows, None if among else columns)
            return (table,), table
        features = images.vectors(entry.role, rows)
        if entry.compares == "real x generated":
            real = images.vectors(entry.role, columns)
            return (real, features), cosine_pairs(features, real)
        texts = self._text_features()
        if prompt not in texts:
            return (), nothing
        repeated = texts[prompt].expand(len(rows), -1)
        return (features, repeated), cosine_rows(features, repeated)[:, None]

    def _score_real(self, name: str, entry: MetricEntry) -> None:
        kept = self.images.usable(entry.role, self.images.real)
        if len(kept) < 2:
            self.not_scored[name] = f"{len(kept)} usable real image(s): two are needed"
            return
        if entry.role == "lpips":
            values = self.images.lpips(0, kept, None)
        else:
            features = self.images.vectors(entry.role, kept)
            values = cosine_pairs(features, features)
        metric = entry.make()
        metric.update(values)
        low_high = bootstrap_pairs([values.numpy()], self.scoring.seed, self.scoring.draws)
        self.scores[name] = {
            "mean": float(metric.compute()),
            **self._described(low_high, "real images"),
            "n": len(kept),
            "pairs": metric.pairs.item(),
            "identity": {
                "definition": entry.definition,
                "backbone": self.images.backbones[entry.role].identity.as_dict(),
                "reference": self._reference(self.images.real, "training images"),
                "versions": _versions(),
            },
        }

    def _score_sets(self, name: str, entry: MetricEntry) -> None:
        """Real image i belongs to generated image i: where one is left out, so is the other."""
        images = self.images
        both = [
            (real, generated)
            for real, generated in zip(images.real, images.generated, strict=True)
            if images.usable(entry.role, [real, generated]) == [real, generated]
        ]
        width = images.vectors(entry.role, both[0]).shape[1] if both else 0
        problem = fid_problem(len(both), len(both), width) if both else "no usable image"
        if problem:
            self.not_scored[name] = problem
            return
        real, generated = (images.vectors(entry.role, side).double() for side in zip(*both, strict=True))
        metric = Fid(width)
        metric.update(real, real=True)
        metric.update(generated, real=False)
        mean = float(metric.compute())
        low_high = jackknife(lambda block: _fid_without(real, generated, block), FID_BLOCKS, mean)
        self.scores[name] = {
            "mean": mean,
            **self._described(low_high, "blocks of images left out in turn"),
            "n": len(both),
            "pairs": None,
            "identity": self._identity(entry, images.real, "real images") | {"features": width},
        }

    def _text_features(self) -> dict[int, Tensor]:
        """Prompt number -> (D,), for the prompts that the text encoder reads to their end; the others are noted."""
        if self._texts is None:
            backbone = self.images.backbones["clip"]
            assert isinstance(backbone, ImageTextBackbone)
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

    def _interval(self, entry: MetricEntry, tables: Sequence[Tensor]) -> dict[str, Any]:
        seed, draws = self.scoring.seed, self.scoring.draws
        among = entry.compares == "images of one prompt"
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

    def _identity(self, entry: MetricEntry, reference: range | None, kind: str) -> dict[str, Any]:
        prompts = self.images.prompts
        form: PromptForm = self.scoring.clip_t_prompt if entry.compares == "image x prompt" else "with identifier"
        seeds = [list(prompt.seeds) for prompt in prompts]
        return {
            "definition": entry.definition,
            "backbone": self.images.backbones[entry.role].identity.as_dict(),
            "reference": self._reference(reference, kind) if reference is not None else None,
            "prompts": {"n": len(prompts), "form": form, "sha256": digest([prompt.text(form) for prompt in prompts])},
            "seeds": seeds[0] if all(one == seeds[0] for one in seeds) else seeds,
            "generation": self.generation,
            "versions": _versions(),
        }

    def _reference(self, indices: range, kind: str) -> dict[str, Any]:
        hashes = sorted(self.images.features.shas[index] or "" for index in indices)
        return {"images": kind, "n": len(indices), "sha256": digest(hashes)}

    def _why_not(self, entry: MetricEntry, columns: Sequence[int]) -> str:
        if entry.compares == "real x generated" and not columns:
            return "no usable image to compare with"
        if not self.images.usable(entry.role, self.images.generated):
            return "no usable generated image"
        if entry.compares == "images of one prompt":
            return "no prompt has two usable images"
        return "every prompt is longer than the text encoder reads"


def _mean(entry: MetricEntry, inputs: tuple[Tensor, ...], table: Tensor) -> dict[str, Any] | None:
    """One prompt's score; None where it has no pair."""
    if not len(table) or (entry.compares == "images of one prompt" and len(table) < 2):
        return None
    metric = entry.make()
    metric.update(*inputs)
    return {"mean": float(metric.compute()), "n": len(table), "pairs": metric.pairs.item()}


def _fid_without(real: Tensor, generated: Tensor, block: int) -> float:
    kept = torch.arange(len(real)) % FID_BLOCKS != block
    sides = [side[kept] for side in (real, generated)]
    (mean, covariance), (other_mean, other_covariance) = (moments(s.sum(0), s.T @ s, len(s)) for s in sides)
    return float(frechet_distance(mean, covariance, other_mean, other_covariance))


def interval_fields(interval: Interval | None, unit: str, seed: int, draws: int) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {"low": low, "high": high, "interval": {"level": LEVEL, "over": unit, "draws": draws, "seed": seed}}


def _versions() -> dict[str, str]:
    return {"etherdiff": __version__, **versions_of("torchmetrics", "numpy")}
