"""The best step of a run: a few images drawn and scored every `eval_every` steps, and the adapter of the best of them.

Best is the highest √(DINO · CLIP-T), the geometric mean. DINO alone is highest where a run copies its photos, CLIP-T alone
where it has learned nothing. A product weighs a change of 1% in either equally, though CLIP-T has a smaller scale. DINO
compares with the held-out images if there are any, since the training photos reward copying.

The set is small (4 of the 25 prompts, one image each): enough for a curve, too small for a table (see `etherdiff eval`).
"""

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import nn

from etherdiff.adapters.io import save_adapter
from etherdiff.config import DreamBoothConfig
from etherdiff.eval.networks import PRESETS, Backbone, choose_preset, find_backbones
from etherdiff.eval.scores import PromptImages, Scoring, score_images
from etherdiff.families.diffusion import PAPER_SAMPLING, sample, slug
from etherdiff.families.sd1 import StableDiffusion, encode_prompts, make_pipeline
from etherdiff.images.writing import save_png
from etherdiff.runs.folder import RunFolder, read_metrics
from etherdiff.runs.result import Best, read_best
from etherdiff.system.errors import UserError
from etherdiff.system.files import staged_folder, write_json
from etherdiff.system.hub import find_cached
from etherdiff.system.terminal import say
from etherdiff.tasks.dreambooth import DreamBoothPlan, MakeScorer
from etherdiff.tasks.subjects import EvalPrompt, make_prompts, prompts_for

METRICS = ("dino", "clip_t")
ROLES = ("dino", "clip")
EVERY = 7
"""Distance of the prompts in the list of 25: the 1st, 8th, 15th and 22nd, which differ in place, company and look."""
SEED = 0


def find_networks(config: DreamBoothConfig) -> dict[str, Backbone] | None:
    """Find the networks that score while training; None if scoring is off, or is `auto` and a network would be downloaded.

    Raises:
        UserError: switched on, but a network cannot be had.
    """
    preset = choose_preset(config.base)
    if config.eval_scores == "off" or (config.eval_scores == "auto" and not _at_hand(preset)):
        return None
    return find_backbones(ROLES, preset, device=config.device)


def find_scorer(config: DreamBoothConfig) -> MakeScorer | None:
    """Return a function that makes a run's scorer; None if nothing is scored. UserError as `find_networks`."""
    networks = find_networks(config)
    if networks is None:
        return None
    return lambda plan, model, base: StepScorer(plan, model, networks, base)


def _at_hand(preset: str) -> bool:
    """Say whether the preset's networks are on this machine."""
    specs = [PRESETS[preset][role] for role in ROLES]
    if preset != "tiny":
        return all(_in_hub_cache(spec) for spec in specs)
    try:
        find_backbones(ROLES, preset, device="cpu")
    except UserError:
        return False
    return True


def _in_hub_cache(repo: str) -> bool:
    folder = find_cached(repo)
    if folder is None:
        return False
    weights = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return bool(weights) and (folder / "preprocessor_config.json").is_file()


class StepScorer:
    """Draws and scores the UNet, and keeps best/. Created before the text encoder is freed and the adapter is added."""

    def __init__(
        self, plan: DreamBoothPlan, model: StableDiffusion, backbones: dict[str, Backbone], base: Mapping[str, Any]
    ) -> None:
        """base: name and fingerprint to record with an adapter."""
        config = plan.config
        self.run, self.model, self.backbones, self.base = RunFolder(plan.output), model, backbones, dict(base)
        self.resolution = plan.base.resolution
        self.subject = plan.subject
        self.prompts = curve_prompts(config)
        # one by one: the batch decides the last bits, and a resumed run finds some features in the cache
        self.scoring = Scoring(metrics=METRICS, device=config.device, batch_size=1, workers=0)
        model.text_encoder.to(model.unet.device)
        texts = [prompt.text for prompt in self.prompts]
        embeddings = encode_prompts(model.tokenizer, model.text_encoder, [*texts, ""])
        self.text, self.empty = embeddings[:-1], embeddings[-1:]
        self.adapted: nn.Module = model.unet
        """Module that saves the adapter; the UNet until the adapter is added."""

    @property
    def dino(self) -> str:
        """Name of the score of likeness."""
        return "dino_held_out" if self.subject.held_out else "dino"

    def score_step(self, step: int) -> dict[str, float]:
        """Score the present weights, rounded, and keep them in best/ if no earlier step was as good."""
        images = self._draw(step)
        with torch.autocast(self.model.unet.device.type, enabled=False):
            found = score_images(self.subject.images, self.subject.held_out, images, self.scoring, loaded=self.backbones)
        if missing := [name for name in (self.dino, "clip_t") if name not in found["scores"]]:
            raise UserError([f"no {name}: {found['not_scored'].get(name)}" for name in missing])
        scores = {"dino": round(found["scores"][self.dino]["mean"], 6), "clip_t": round(found["scores"]["clip_t"]["mean"], 6)}
        self._keep_if_best(step, scores)
        return scores

    def conclude(self) -> None:
        """Say which step is best, at the end of a run."""
        say_best(self.run)

    @torch.no_grad()
    def _draw(self, step: int) -> list[PromptImages]:
        unet, vae = self.model.unet, self.model.vae
        vae.to(unet.device, unet.dtype)
        pipeline = make_pipeline(self.model)
        folder, found = self.run.eval / "steps" / f"step-{step:06d}", []
        for number, prompt in enumerate(self.prompts):
            embeddings: dict[str, Any] = {
                "prompt_embeds": self.text[number][None].to(unet.device, unet.dtype),
                "negative_prompt_embeds": self.empty.to(unet.device, unet.dtype),
            }
            (image,) = sample(pipeline, None, [SEED], self.resolution, **embeddings)
            path = folder / f"{number:03d}-{slug(prompt.text)}" / f"{SEED}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(image, path, {"prompt": prompt.text, "seed": SEED, "training_step": step, **PAPER_SAMPLING})
            found.append(PromptImages(prompt.text, (path,), (SEED,), prompt.plain))
        return found

    def _keep_if_best(self, step: int, scores: Mapping[str, float]) -> None:
        score, before = round(combined(scores), 6), find_best(self.run)
        if before is not None and before.score >= score:
            return
        reference = "held-out images" if self.subject.held_out else "training images"
        best = {"step": step, "score": score, **scores, "reference": reference, "why": "the highest so far"}
        with staged_folder(self.run.best) as staged:
            save_adapter(self.adapted, staged, self.base)
            write_json(staged / "best.json", best)


def curve_prompts(config: DreamBoothConfig) -> tuple[EvalPrompt, ...]:
    """Return the few prompts that are drawn while training."""
    texts = prompts_for(str(config.class_noun), tiny=config.base == "tiny")
    return make_prompts(texts[::EVERY], config.identifier, str(config.class_noun))


def combined(scores: Mapping[str, float]) -> float:
    """Return √(DINO · CLIP-T); 0 where either is not positive."""
    return sqrt(max(scores["dino"], 0.0) * max(scores["clip_t"], 0.0))


def find_best(run: RunFolder) -> Best | None:
    """Return the best step so far; None where there is none, or best/ is damaged."""
    try:
        return read_best(run.best)
    except UserError:
        return None


def say_best(run: RunFolder) -> None:
    """At the end of a run, say which step is best and why, and write it to best.json."""
    best, curve = find_best(run), learning_curve(run)
    if best is None or None in (best.dino, best.clip_t) or not curve:
        return
    last = curve[-1]
    why = (
        f"step {best.step} is the best of {len(curve)} evaluations: √(DINO · CLIP-T) = {best.score:.4f} "
        f"(DINO {best.dino:.4f} to the {best.reference}, CLIP-T {best.clip_t:.4f})"
    )
    if last["step"] != best.step:
        why += f"; the last, step {last['step']}, has {combined(last):.4f}"
    write_json(run.best / "best.json", best.model_dump(exclude_unset=True) | {"why": why})
    say(f"{run.best}: {why}")


def learning_curve(run: RunFolder) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl that have scores."""
    return [row for row in read_metrics(run) if row.get("dino") is not None and row.get("clip_t") is not None]
