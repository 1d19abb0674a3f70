"""From images on the disk to metrics.json: every score with its interval, its identity, and what it leaves out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etherdiff.eval.backbones import find_backbones
from etherdiff.eval.fid import fid_problem
from etherdiff.eval.image_set import ImageSet, PromptImages, Scoring, read_images
from etherdiff.eval.metrics import METRICS, PROMPT_METRICS
from etherdiff.eval.network import Backbone
from etherdiff.eval.scorer import Scorer
from etherdiff.system.devices import device_problem
from etherdiff.system.errors import UserError

__all__ = ["PromptImages", "Scoring", "score_images"]


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
        held_out: images of the same thing that were not; scores against them get names of their own.
        generation: what else decides the images (sampler, steps, guidance), kept in every identity.
        loaded: backbones by role, for callers that score again and again; None: found as `scoring` says.

    Returns:
        scores: name -> mean, low, high (None where nothing can be drawn again), n (images), pairs, interval, identity.
        per_prompt: for each prompt its texts, seeds, number of images scored and scores (mean, n, pairs; None without).
        left_out: every image or prompt that is in no score, or not in all, by reason; empty lists where there are none.
        not_scored: metric -> why it has no score.

    Raises:
        UserError: everything that makes scoring pointless, in one message.
    """
    _refuse_what_cannot_be_scored(real, prompts, scoring, loaded)
    backbones = (
        loaded if loaded is not None else find_backbones(scoring.roles, scoring.preset, scoring.backbones, scoring.device)
    )
    images = read_images(real, held_out, prompts, scoring, backbones)
    scorer = Scorer(images, scoring, dict(generation or {}))
    for name in scoring.all_metrics:
        scorer.score(name)
    if not scorer.scores:
        raise UserError(["nothing can be scored", *_told(images), *(f"{k}: {why}" for k, why in scorer.not_scored.items())])
    return {
        "scores": scorer.scores,
        "per_prompt": scorer.per_prompt(),
        "left_out": images.left_out(scorer.long_prompts),
        "not_scored": scorer.not_scored,
        "images": {"real": len(real), "held_out": len(held_out), "generated": len(images.generated)},
    }


def _refuse_what_cannot_be_scored(
    real: Sequence[Path], prompts: Sequence[PromptImages], scoring: Scoring, loaded: Mapping[str, Backbone] | None
) -> None:
    problems = [
        f"metric {name!r}: there are {', '.join(PROMPT_METRICS)}" for name in scoring.metrics if name not in PROMPT_METRICS
    ]
    known = [METRICS[name] for name in scoring.metrics if name in METRICS]
    generated = sum(len(prompt.images) for prompt in prompts)
    if not scoring.metrics:
        problems.append(f"no metric is asked for: there are {', '.join(PROMPT_METRICS)}")
    if not generated:
        problems.append("there are no generated images to score")
    if not real and any(entry.compares in ("real x generated", "real x other real", "sets") for entry in known):
        problems.append("there are no real images to compare with")
    for prompt in prompts:
        if len(prompt.seeds) != len(prompt.images):
            problems.append(f"{prompt.prompt!r}: {len(prompt.images)} images but {len(prompt.seeds)} seeds")
    if any(entry.compares == "image x prompt" for entry in known) and scoring.clip_t_prompt == "without identifier":
        problems += [f"{prompt.prompt!r} has no form without identifier" for prompt in prompts if prompt.plain_prompt is None]
    if any(entry.compares == "sets" for entry in known) and len(real) != generated:
        problems.append(f"fid: {fid_problem(len(real), generated, 0)}")
    if loaded is not None:
        problems += [f"no backbone is loaded for {entry.role}" for entry in known if entry.role not in loaded]
    if problem := device_problem(scoring.device):
        problems.append(problem)
    if problems:
        raise UserError(list(dict.fromkeys(problems)))


def _told(images: ImageSet) -> list[str]:
    """What was left out, a sentence for each."""
    return [
        f"{reason}: {', '.join(str(value) for value in one.values())}"
        for reason, found in images.left_out([]).items()
        for one in found
    ]
