"""The controllable task."""

from typing import Any

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import nn

from etherdiff.adapters.io import load_adapter, merge_adapter
from etherdiff.adapters.methods import magnitude_config, trainable_parameters
from etherdiff.config import S2IConfig
from etherdiff.control.pipeline import HintEncoder
from etherdiff.families.loss import loss_weighting
from etherdiff.families.sd1 import StableDiffusion
from etherdiff.runs.control import load_hint_encoder
from etherdiff.runs.folder import RunFolder
from etherdiff.system.files import copy_folder
from etherdiff.system.terminal import warn
from etherdiff.tasks.s2i_data import S2IData, S2ITask
from etherdiff.tasks.s2i_plan import S2IPlan, plan_s2i
from etherdiff.tasks.s2i_prepare import pairs_digest, prepare_pairs
from etherdiff.tasks.s2i_samples import ControlSampler
from etherdiff.tasks.task import Job, Watchers, adapt, save_adapter_result, save_result
from etherdiff.train.loop import ParameterGroup


class S2IJob(Job[S2IPlan]):
    """Fine-tune on images and their control signals."""

    task = "s2i"

    def __init__(self, config: S2IConfig, resuming: bool) -> None:
        self.plan = plan_s2i(config, resuming)
        self.sampler: ControlSampler | None = None
        self.adapted: nn.Module | None = None
        self.hint_encoder: HintEncoder | None = None

    def digest(self) -> str:
        return pairs_digest(self.plan)

    def said_of_data(self) -> str:
        return self.plan.config.dataset

    def describe_size(self) -> str:
        plan = self.plan
        return (
            f"{len(plan.dataset.training):,} pairs of {plan.dataset.name} at {plan.resolution} px, {plan.dataset.signal.name}"
        )

    def dry_lines(self) -> list[str]:
        with torch.device("meta"):
            encoder = make_hint_encoder(self.plan)
        return [f"control encoder       {sum(p.numel() for p in encoder.parameters()):,} parameters more"]

    def facts(self) -> dict[str, Any]:
        return {
            "pairs": {"training": len(self.plan.dataset.training), "evaluation": len(self.plan.dataset.evaluation)},
            "control": self.plan.dataset.signal.settings(),
        }

    def prepare(self, model: StableDiffusion, hashes: dict[str, str], accelerator: Accelerator) -> S2IData:
        return prepare_pairs(self.plan, model, hashes, accelerator)

    def watch(self, model: StableDiffusion, run: RunFolder, base: dict[str, Any], accelerator: Accelerator) -> Watchers:
        """What draws sample images; draws the base's at once."""
        if self.plan.config.sample_every is None or not accelerator.is_main_process:
            return Watchers()
        model.unet.to(accelerator.device)
        try:
            self.sampler = ControlSampler(self.plan, model, run)
        except Exception as error:  # whatever a pipeline, a font or the disk raises
            warn(f"the base's sample images failed ({type(error).__name__}: {error}): training goes on without samples")
            return Watchers()
        return Watchers(self.sampler.draw_step)

    def free_unused(self, model: StableDiffusion, watchers: Watchers) -> None:
        """From here on the UNet and the text encoder run (and the decoder, where images are drawn)."""
        if watchers == Watchers():
            model.vae = None

    def build(self, model: StableDiffusion) -> S2ITask:
        config, refit = self.plan.config, self.plan.refit
        if refit is None:
            self.adapted, self.hint_encoder = adapt(model, self.plan), make_hint_encoder(self.plan)
        else:
            unet = merge_adapter(load_adapter(model.unet, refit.adapter))
            self.adapted = get_peft_model(unet, magnitude_config(self.plan.options.targets))
            self.hint_encoder = load_hint_encoder(refit)
        if self.sampler is not None:
            self.sampler.hint_encoder = self.hint_encoder
        weighting = loss_weighting(config.min_snr_gamma, config.debiased_estimation)
        return S2ITask(model.unet, self.hint_encoder, model.noise_scheduler, weighting)

    def groups(self) -> list[ParameterGroup]:
        rate = self.plan.config.encoder_learning_rate
        assert self.hint_encoder is not None
        assert rate is not None
        return [ParameterGroup(self.hint_encoder, rate)]

    def describe(self, accelerator: Accelerator) -> list[str]:
        plan, config = self.plan, self.plan.config
        assert self.adapted is not None
        assert self.hint_encoder is not None
        adapter = sum(p.numel() for p in trainable_parameters(self.adapted).values())
        encoder = sum(p.numel() for p in self.hint_encoder.parameters() if p.requires_grad)
        size = config.batch_size * config.gradient_accumulation * accelerator.num_processes
        again = ", with magnitudes learned on top," if plan.refit else ""
        rates = f"learning rate {config.learning_rate:g}, control encoder's {config.encoder_learning_rate:g}"
        return [
            f"{config.method}{again} on {plan.base.name}: {adapter:,} trainable parameters ({config.targets}), and "
            f"{encoder:,} of the control encoder",
            self.describe_size(),
            f"{config.steps} steps of {size}, {rates}; the text encoder is not trained",
        ]

    def save(self, run: RunFolder, base: dict[str, Any]) -> None:
        """adapter/ and, last, control_encoder/: where that is, the result is whole."""
        assert self.adapted is not None
        assert self.hint_encoder is not None
        encoder, refit = self.hint_encoder, self.plan.refit
        if refit is not None:
            save_result(run.refitted_adapter, lambda: copy_folder(refit.adapter, run.refitted_adapter))
        if self.plan.config.method != "none":
            save_adapter_result(self.adapted, run, base)
        save_result(run.control_encoder, lambda: encoder.save_pretrained(run.control_encoder))


def make_hint_encoder(plan: S2IPlan) -> HintEncoder:
    """An untrained control encoder for the base, drawn from the run's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.config.seed)
        width = int(plan.base.config("unet")["block_out_channels"][0])
        return HintEncoder(width, plan.base.latent_scale, plan.config.encoder_init)
