"""What a task is: a kind of run, with what the main path and the evaluation ask of it; and its sample images."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from etherdiff.adapters.io import save_adapter
from etherdiff.adapters.methods import add_adapter, trainable_parameters
from etherdiff.config import RunConfig, TrainConfig
from etherdiff.control.pipeline import HintEncoder, added_hint
from etherdiff.families.diffusion import chunks, denoising_loss, loss_weighting, sample, sheet
from etherdiff.families.sd1 import StableDiffusion, encode_prompts
from etherdiff.images.writing import save_png
from etherdiff.runs.folder import RunFolder, manifest_of, write_manifest
from etherdiff.runs.run import Run
from etherdiff.system.terminal import warn
from etherdiff.tasks.image_sets import ImageSets
from etherdiff.tasks.planning import Plan, TrainPlan
from etherdiff.train.batches import StepBatches
from etherdiff.train.loop import Batch, ParameterGroup
from etherdiff.train.recorder import Watcher

SAMPLES_AT_ONCE = 4


@dataclass(frozen=True)
class Shot:
    """A sample image, drawn again and again."""

    text: int
    """Number of its prompt."""
    seed: int
    place: str
    """Its path in a step's folder."""
    control: NDArray[np.uint8] | None = None
    """What the hint encoder sees, (R, R, 3)."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What its PNG records next to prompt, seed, step and how it was drawn."""


class Sampler(ABC):
    """Draws every shot with the weights as they are; made before the text encoder goes and the adapter comes."""

    def __init__(
        self,
        config: TrainConfig,
        resolution: int,
        sampling: dict[str, Any],
        model: StableDiffusion,
        run: RunFolder,
        texts: Sequence[str],
        shots: Sequence[Sequence[Shot]],
    ) -> None:
        """sampling: sampler, steps and guidance scale. shots: in groups, whose members are drawn in the same batches."""
        self.config, self.resolution, self.sampling, self.model, self.run = config, resolution, sampling, model, run
        self.texts, self.shots = texts, [shot for group in shots for shot in group]
        self.batches = [batch for group in shots for batch in chunks(group, SAMPLES_AT_ONCE)]
        model.text_encoder.to(model.unet.device)
        self.text = encode_prompts(model.tokenizer, model.text_encoder, [*texts, ""]).float()
        self.hint_encoder: HintEncoder | None = None
        """What encodes controls, once it is there; the base's images are drawn without control."""
        self.base_images = self.draw()

    @abstractmethod
    def make_pipeline(self) -> Any:
        """Make what draws with the model as it is."""

    @abstractmethod
    def lay_out(self, images: Sequence[Image.Image], step: int) -> tuple[list[list[Image.Image]], list[str], list[str]]:
        """Arrange a step's images for a sheet: rows of images, labels of rows, labels of columns."""

    @torch.no_grad()
    def draw(self) -> list[Image.Image]:
        """Draw every shot."""
        unet, vae = self.model.unet, self.model.vae
        vae.to(unet.device, unet.dtype)
        pipeline, images = self.make_pipeline(), []
        for batch in self.batches:
            told: dict[str, Any] = {
                "prompt_embeds": self._embeddings([shot.text for shot in batch]),
                "negative_prompt_embeds": self._embeddings([-1] * len(batch)),
            }
            if self.hint_encoder is not None:
                controls = [shot.control for shot in batch if shot.control is not None]
                told["control_image"] = torch.stack([as_tensor(control) for control in controls])
            seeds, scale = [shot.seed for shot in batch], self.sampling["guidance_scale"]
            images += sample(pipeline, None, seeds, self.resolution, self.sampling["steps"], scale, **told)
        return images

    def draw_step(self, step: int) -> dict[str, float]:
        """Draw with the weights as they are now, save the images, and lay them out next to the base's."""
        images = self.draw()
        self.save(images, step, f"step-{step:06d}")
        save_png(sheet(*self.lay_out(images, step)), self.run.sample_sheet(step), self._settings(step) | self.sampling)
        return {}

    def save(self, images: Sequence[Image.Image], step: int, folder: str) -> None:
        """Save the images of a step into a folder of samples/."""
        for shot, image in zip(self.shots, images, strict=True):
            path = self.run.samples / folder / shot.place
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = {"prompt": self.texts[shot.text], "seed": shot.seed, **shot.facts, **self._settings(step), **self.sampling}
            save_png(image, path, facts)

    def _embeddings(self, numbers: list[int]) -> Tensor:
        """Of prompts by their numbers; the last is the empty one."""
        return self.text[numbers].to(self.model.unet.device, self.model.unet.dtype)

    def _settings(self, step: int) -> dict[str, Any]:
        return {"model": self.config.base, "method": self.config.method, "training_step": step}


def as_tensor(control: NDArray[np.uint8]) -> Tensor:
    """Return a control image (R, R, 3) as the pipeline takes it: (3, R, R) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(control)).permute(2, 0, 1).float() / 255


P = TypeVar("P", bound=Plan)
Q = TypeVar("Q", bound=TrainPlan)


class Task(ABC, Generic[P]):
    """A kind of run. Making one plans a run: everything is checked, and one UserError has all that is wrong."""

    name: ClassVar[str]
    """Its name in run.yaml."""
    command: ClassVar[str]
    """The command that makes its run folders."""
    config_class: ClassVar[type[RunConfig]]
    plan: P

    @staticmethod
    @abstractmethod
    def image_sets(run: Run, options: Any) -> ImageSets:
        """Find what a run is judged by, given options of evaluation; no model is loaded. UserError with all that is wrong."""


class DenoisingLoss(nn.Module):
    """The loss of a batch: of the UNet alone, or seeing the hint of its control images (ETHER paper, 5.2)."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        noise_scheduler: DDPMScheduler,
        config: TrainConfig,
        encoder: HintEncoder | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.hint_encoder, self.noise_scheduler = unet, encoder, noise_scheduler
        self.weighting = loss_weighting(config.min_snr_gamma, config.debiased_estimation)

    def forward(self, batch: Batch) -> Tensor:
        """Return a scalar: the mean, or the sum by `weights`.

        batch: latents, noise (B, C, h, w), timesteps (B,), text (B, tokens, width); control (B, 3, R, R), weights (B,).
        """
        hint = None if self.hint_encoder is None else self.hint_encoder(batch["control"])
        with added_hint(self.unet, hint):
            losses = denoising_loss(
                self.unet,
                self.noise_scheduler,
                batch["latents"],
                batch["text"],
                batch["noise"],
                batch["timesteps"],
                self.weighting,
            )
        return (losses * batch["weights"]).sum() if "weights" in batch else losses.mean()


@dataclass(frozen=True)
class Trainee:
    """A model that is ready to be trained: its adapter is in place, and everything else is frozen."""

    loss: DenoisingLoss
    adapted: nn.Module
    """What saves the adapter."""
    groups: Sequence[ParameterGroup] = ()
    """The parts with a learning rate of their own: a control encoder."""


class LiveScorer(Protocol):
    """What scores along the way."""

    adapted: nn.Module
    """What saves the adapter, once it is in place."""

    def score_step(self, step: int) -> dict[str, float]:
        """Return the scores of the present weights."""

    def conclude(self) -> None:
        """Say which step was best, at the run's end."""


class Training(Task[Q]):
    """A training run, in the order in which the main path asks."""

    config_class: ClassVar[type[TrainConfig]]
    encodes_text: ClassVar[bool]
    """Whether the text encoder is needed in training."""
    method_note: str = ""
    """What else is said of the method."""

    def __init__(self, plan: Q) -> None:
        self.plan = plan
        self.sampler: Sampler | None = None

    @property
    @abstractmethod
    def data_digest(self) -> str:
        """Digest of what is trained on, which must be the same when the run is resumed."""

    @property
    @abstractmethod
    def data_name(self) -> str:
        """What is trained on, as the user named it."""

    @abstractmethod
    def describe_data(self) -> str:
        """Say how many images of which size are trained on."""

    def images_per_pass(self) -> int:
        """Return the number of images in one forward pass of a process."""
        return self.plan.config.batch_size

    def dry_lines(self) -> list[str]:
        """Return what a dry run says of this task next to the UNet's size, a line each."""
        return []

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what else run.yaml records."""

    @abstractmethod
    def prepare(self, model: StableDiffusion, hashes: dict[str, str], accelerator: Accelerator) -> StepBatches:
        """Compute all that the loop will read, or find it in the cache; `hashes` is the base's fingerprint."""

    @abstractmethod
    def make_sampler(self, model: StableDiffusion, run: RunFolder) -> Sampler:
        """Make what draws sample images; it draws the base's at once."""

    def watch(self, model: StableDiffusion, run: RunFolder, base: dict[str, Any], accelerator: Accelerator) -> list[Watcher]:
        """Return what draws and scores along the way. Called in every process, before the adapter comes."""
        every = self.plan.config.sample_every
        if every is None or not accelerator.is_main_process:
            return []
        model.unet.to(accelerator.device)
        try:
            self.sampler = self.make_sampler(model, run)
        except Exception as error:  # whatever a pipeline, a font or the disk raises
            warn(f"the base's sample images failed ({type(error).__name__}: {error}): training goes on without samples")
            return []
        is_missing = lambda step: not run.sample_sheet(step).exists()  # noqa: E731
        return [Watcher("sample images", every, self.sampler.draw_step, is_missing)]

    def free_unused(self, model: StableDiffusion, watchers: Sequence[Watcher]) -> None:
        """Drop the parts of the model that nothing needs from here on; the decoder is needed where images are drawn."""
        if not self.encodes_text:
            model.text_encoder = None
        if not watchers:
            model.vae = None

    @abstractmethod
    def build(self, model: StableDiffusion) -> Trainee:
        """Put the adapter in place and freeze everything else."""

    def adapt(self, model: StableDiffusion) -> nn.Module:
        """Put the method's adapter into the UNet, in place; with `none`, freeze it. Return what saves the adapter."""
        config = self.plan.config
        if config.method == "none":
            return model.unet.requires_grad_(False)
        return add_adapter(model.unet, config.method, self.plan.options, config.seed)

    def describe(self, trainee: Trainee, accelerator: Accelerator) -> list[str]:
        """Say what is about to be trained, a line each."""
        config, encoder = self.plan.config, trainee.loss.hint_encoder
        adapter = sum(p.numel() for p in trainable_parameters(trainee.adapted).values())
        of_encoder = ""
        if encoder is not None:
            of_encoder = f", and {sum(p.numel() for p in encoder.parameters() if p.requires_grad):,} of the control encoder"
        rates = f"learning rate {config.learning_rate:g}" + "".join(
            f", control encoder's {group.learning_rate:g}" for group in trainee.groups
        )
        size = config.batch_size * config.gradient_accumulation * accelerator.num_processes
        return [
            f"{config.method}{self.method_note} on {self.plan.base.name}: {adapter:,} trainable parameters "
            f"({config.targets}){of_encoder}",
            self.describe_data(),
            f"{config.steps} steps of {size}, {rates}; the text encoder is not trained",
        ]

    def save(self, trainee: Trainee, run: RunFolder, base: dict[str, Any]) -> None:
        """Write the result; `base` is recorded in it."""
        if self.plan.config.method != "none":
            save_result(run.adapter, lambda: save_adapter(trainee.adapted, run.adapter, base))

    def conclude(self) -> None:
        """Say what is to be said when the run is complete."""
        return


def save_result(folder: Path, write: Callable[[], None]) -> None:
    """Write a result's folder, then what its files are: a kill in between leaves a result that nothing is recorded of."""
    manifest_of(folder).unlink(missing_ok=True)
    write()
    write_manifest(folder)
