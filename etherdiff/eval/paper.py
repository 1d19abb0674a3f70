"""What the paper reports (ETHER, arXiv 2405.20271, Stable Diffusion 1.5), and why a score may not be comparable with it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etherdiff.config import PerturbConfig, TrainConfig
from etherdiff.eval.metrics import METRICS
from etherdiff.families.diffusion import PAPER_SAMPLING
from etherdiff.runs.result import differences
from etherdiff.runs.run import Run
from etherdiff.tasks.control_sets import MAX_MAPS, ControlImageSets
from etherdiff.tasks.subject_sets import SubjectImageSets

PAPER_SUBJECTS: dict[str, dict[str, float]] = {
    "real images": {"dino": 0.703, "clip_i": 0.864, "lpips_to_real": 0.695},
    "full": {"dino": 0.644, "clip_i": 0.793, "clip_t": 0.236, "lpips_to_real": 0.709},
    "lora": {"dino": 0.660, "clip_i": 0.796, "clip_t": 0.231, "lpips_to_real": 0.714},
    "oft": {"dino": 0.652, "clip_i": 0.794, "clip_t": 0.241, "lpips_to_real": 0.725},
    "naive": {"dino": 0.648, "clip_i": 0.793, "clip_t": 0.245, "lpips_to_real": 0.730},
    "ether": {"dino": 0.567, "clip_i": 0.746, "clip_t": 0.256, "lpips_to_real": 0.766},
    "ether+": {"dino": 0.666, "clip_i": 0.800, "clip_t": 0.240, "lpips_to_real": 0.729},
    "ether+one-sided": {"dino": 0.618, "clip_i": 0.777},
}
"""Method, or the row of real images -> score: means over 30 subjects, 25 prompts each, 4 images per prompt."""

PAPER_S2I: dict[str, dict[str, float]] = {
    "none": {"miou": 0.082, "accuracy": 0.380, "fid": 41.2},
    "oft": {"miou": 0.245, "accuracy": 0.628, "fid": 31.1},
    "oft+magnitude": {"miou": 0.246, "accuracy": 0.633, "fid": 30.8},
    "naive": {"miou": 0.243, "accuracy": 0.629, "fid": 29.9},
    "ether": {"miou": 0.246, "accuracy": 0.633, "fid": 32.0},
    "ether+": {"miou": 0.273, "accuracy": 0.681, "fid": 31.0},
}
"""Method (`none`: the hint encoder alone) -> score on 2000 validation maps of ADE20K; shares where the paper has percent."""

PAPER_S2I_SCOPE = "2000 validation maps of ADE20K, Stable Diffusion 1.5; which UperNet judged them is not told"
SD1_TEXT_WIDTH = 768
"""Width of Stable Diffusion 1's text embeddings, which identifies it."""
PAPER_PROMPTS, PAPER_SEEDS = 25, 4
PAPER_SCOPE = "30 subjects, 25 prompts each, 4 images per prompt, Stable Diffusion 1.5"

_CLIP: dict[str, Any] = {
    "name": "openai/clip-vit-large-patch14",
    "feature": "projected embeddings",
    "preprocessing": {"edge": 224, "size": None, "crop": [224, 224], "resample": "bicubic"},
}
_BACKBONES: dict[str, dict[str, Any]] = {
    "dino": {
        "name": "facebook/dino-vits16",
        "feature": "CLS token of the last hidden state",
        "preprocessing": {"edge": None, "size": [224, 224], "crop": None},
    },
    "clip_i": _CLIP,
    "clip_t": _CLIP,
    "lpips_to_real": {
        "name": "lpips:alex",
        "preprocessing": {"edge": None, "size": [512, 512], "crop": None, "resample": "bilinear"},
    },
    "fid": {"name": "inception"},
}
"""Networks of the scripts behind the paper's numbers; only these keys are compared."""
_REAL_IMAGES = {entry.baseline: name for name, entry in METRICS.items() if entry.baseline}
"""Score of real images among themselves -> the score whose baseline it is."""


def paper_value(score: str, method: str) -> float | None:
    """Return the paper's number for a score and a method, whatever the setting; baselines have the row of real images."""
    if score in _REAL_IMAGES:
        return PAPER_SUBJECTS["real images"].get(_REAL_IMAGES[score])
    rows = PAPER_S2I if score in ("fid", "miou", "accuracy") else PAPER_SUBJECTS
    return rows.get(method, {}).get(score)


def differs_from_paper(score: str, identity: dict[str, Any]) -> list[str]:
    """List how the computation of a score differs from the paper's; empty if it is the same.

    Compared are the network, its features and the preprocessing. For CLIP-T also the form of the prompts: the scripts use
    `instance_prompt`, which includes the identifier. Subjects and prompts are not: show `PAPER_SCOPE` with the number.
    """
    expected = _BACKBONES.get(_REAL_IMAGES.get(score, score))
    if expected is None:
        return [f"the paper has no score {score}"]
    found = _only(identity["backbone"], expected)
    reasons = [f"backbone {name}" for name in differences(found, expected)]
    if score == "clip_t" and identity["prompts"]["form"] != "with identifier":
        reasons.append("prompts without identifier")
    return reasons


def paper_of_subject(sets: SubjectImageSets, scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return the paper's numbers for a run's method, each with the reasons why it is not comparable with ours."""
    options, apart = sets.options, []
    if isinstance(sets.config, PerturbConfig):
        apart.append("the transformation is random, not trained")
    if sets.base.config("unet").get("cross_attention_dim") != SD1_TEXT_WIDTH:
        apart.append("the base is not Stable Diffusion 1.5")
    if options.prompts is not None or options.num != PAPER_SEEDS:
        apart.append(f"not {PAPER_SEEDS} images of each of DreamBooth's {PAPER_PROMPTS} prompts")
    if options.steps != PAPER_SAMPLING["steps"]:
        apart.append(f"{options.steps} denoising steps")
    values = _values(scores, sets.config.method)
    found = {
        name: {"value": value, "differs": apart + differs_from_paper(name, scores[name]["identity"])}
        for name, value in values.items()
    }
    return {"method": sets.config.method, "scope": PAPER_SCOPE, "scores": found}


def paper_of_maps(sets: ControlImageSets, scores: Iterable[str]) -> dict[str, Any]:
    """Return the paper's numbers for a controllable run's method, and why they are not comparable with ours."""
    method, apart = sets.run.method_label, [f"the paper's: {PAPER_S2I_SCOPE}"]
    if sets.dataset.name != "ade20k" or len(sets.pairs) != MAX_MAPS:
        apart.append(f"{len(sets.pairs)} maps of {sets.dataset.name}")
    found = {name: {"value": value, "differs": apart} for name, value in _values(scores, method).items()}
    return {"method": method, "scope": PAPER_S2I_SCOPE, "scores": found}


def _values(scores: Iterable[str], method: str) -> dict[str, float]:
    return {name: value for name in scores if (value := paper_value(name, method)) is not None}


def _only(found: Any, expected: Any) -> Any:
    """Return the part of `found` whose keys `expected` has."""
    if not isinstance(expected, dict) or not isinstance(found, dict):
        return found
    return {key: _only(found.get(key), value) for key, value in expected.items()}


# --- Several runs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaperValue:
    """A number of the paper."""

    value: float
    """Share of 1, not percent."""
    differs: tuple[str, ...]
    """Differences between our measurement and the paper's; empty if there are none."""


def paper_of(runs: Sequence[Run], score: str) -> PaperValue | None:
    """Return the paper's number for the one method of trained runs; None if there is no such number."""
    methods = {run.method_label for run in runs if isinstance(run.config, TrainConfig)}
    value = paper_value(score, *methods) if len(methods) == 1 else None
    if value is None:
        return None
    return PaperValue(value, tuple(dict.fromkeys(reason for run in runs for reason in _differs(run, score))))


def paper_of_real_images(runs: Sequence[Run], score: str) -> PaperValue | None:
    """Return the paper's number for the row of real images."""
    baseline = METRICS[score].baseline if score in METRICS else None
    value = None if baseline is None else paper_value(baseline, "")
    if baseline is None or value is None:
        return None
    return PaperValue(value, tuple(dict.fromkeys(reason for run in runs for reason in _differs(run, baseline))))


def paper_scope(task: str) -> str:
    """Return what the paper's numbers were measured on."""
    return PAPER_S2I_SCOPE if task == "s2i" else PAPER_SCOPE


def _differs(run: Run, score: str) -> list[str]:
    """Return the differences that `etherdiff eval` recorded, or that it recorded nothing."""
    recorded = run.result.paper.scores.get(score) if run.result else None
    return recorded.differs if recorded else ["not compared with the paper by etherdiff eval"]
