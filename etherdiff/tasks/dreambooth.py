"""The subject-driven task."""

from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from torch import nn

from etherdiff.adapters.methods import trainable_parameters
from etherdiff.config import DreamBoothConfig
from etherdiff.families.loss import loss_weighting
from etherdiff.families.sd1 import StableDiffusion
from etherdiff.runs.folder import RunFolder
from etherdiff.system.terminal import warn
from etherdiff.tasks.dreambooth_data import DreamBoothData, DreamBoothTask
from etherdiff.tasks.planning import DreamBoothPlan, plan_dreambooth
from etherdiff.tasks.prepare import pixels_digest, prepare_data
from etherdiff.tasks.samples import Sampler
from etherdiff.tasks.task import Job, Watchers, adapt, save_adapter_result


class DreamBoothJob(Job[DreamBoothPlan]):
    """Fine-tune on a subject's images."""

    task = "dreambooth"

    def __init__(self, config: DreamBoothConfig, resuming: bool) -> None:
        self.plan = plan_dreambooth(config, resuming)
        self.scorer: Any = None
        self.adapted: nn.Module | None = None
        self.backbones: Any = None
        if self.plan.config.eval_scores != "off":
            from etherdiff.eval.best import find_networks  # imports what only scoring needs

            self.backbones = find_networks(self.plan.config)
            # on or off: as it stays when the run is resumed
            settled = self.plan.config.model_copy(update={"eval_scores": "on" if self.backbones else "off"})
            self.plan = replace(self.plan, config=settled)

    def digest(self) -> str:
        return pixels_digest(self.plan.images)

    def said_of_data(self) -> str:
        return self.plan.config.subject

    def describe_size(self) -> str:
        return f"{len(self.plan.images)} images at {self.plan.resolution} px"

    def images_per_pass(self) -> int:
        return self.plan.config.batch_size * (2 if self.plan.config.prior_preservation else 1)

    def dry_lines(self) -> list[str]:
        if not self.plan.config.prior_preservation:
            return []
        return [f"class images          {self.plan.config.class_images}, generated before training unless they are cached"]

    def facts(self) -> dict[str, Any]:
        return {"subject_prompt": self.plan.subject_prompt, "class_prompt": self.plan.class_prompt}

    def prepare(self, model: StableDiffusion, hashes: dict[str, str], accelerator: Accelerator) -> DreamBoothData:
        return prepare_data(self.plan, model, hashes, accelerator)

    def watch(self, model: StableDiffusion, run: RunFolder, base: dict[str, Any], accelerator: Accelerator) -> Watchers:
        if not accelerator.is_main_process:
            return Watchers()
        model.unet.to(accelerator.device)
        sampler = self._make_sampler(model, run)
        if self.backbones is not None:
            from etherdiff.eval.best import StepScorer

            self.scorer = StepScorer(self.plan, model, self.backbones, base)
        return Watchers(sampler.draw_step if sampler else None, self.scorer.score_step if self.scorer else None)

    def _make_sampler(self, model: StableDiffusion, run: RunFolder) -> Sampler | None:
        """What draws sample images; draws the base's at once."""
        config = self.plan.config
        if config.sample_every is None:
            return None
        prompts = list(config.sample_prompts or [self.plan.subject_prompt])
        try:
            return Sampler(config, prompts, self.plan.resolution, model, run)
        except Exception as error:  # whatever a pipeline, a font or the disk raises
            warn(f"the base's sample images failed ({type(error).__name__}: {error}): training goes on without samples")
            return None

    def free_unused(self, model: StableDiffusion, watchers: Watchers) -> None:
        """From here on only the UNet runs (and the decoder, where images are drawn)."""
        model.text_encoder = None
        if watchers == Watchers():
            model.vae = None

    def build(self, model: StableDiffusion) -> DreamBoothTask:
        self.adapted = adapt(model, self.plan)
        if self.scorer is not None:
            self.scorer.adapted = self.adapted
        config = self.plan.config
        weighting = loss_weighting(config.min_snr_gamma, config.debiased_estimation)
        return DreamBoothTask(model.unet, model.noise_scheduler, weighting)

    def describe(self, accelerator: Accelerator) -> list[str]:
        plan, config = self.plan, self.plan.config
        assert self.adapted is not None
        count = sum(p.numel() for p in trainable_parameters(self.adapted).values())
        class_part = f", {config.class_images} class images {plan.class_prompt!r}" if config.prior_preservation else ""
        size = config.batch_size * config.gradient_accumulation * accelerator.num_processes
        return [
            f"{config.method} on {plan.base.name}: {count:,} trainable parameters ({config.targets})",
            f"{len(plan.images)} images of {plan.subject_prompt!r} at {plan.resolution} px{class_part}",
            f"{config.steps} steps of {size}, learning rate {config.learning_rate:g}; the text encoder is not trained",
        ]

    def save(self, run: RunFolder, base: dict[str, Any]) -> None:
        assert self.adapted is not None
        save_adapter_result(self.adapted, run, base)

    def conclude(self, run: RunFolder) -> None:
        """Say which step is best."""
        if self.scorer is not None:
            from etherdiff.eval.best import say_best

            say_best(run)
