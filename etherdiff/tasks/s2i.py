"""The controllable task: a control image says where things are (ETHER paper, section 5.2)."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from peft import get_peft_model
from PIL import Image
from torch import Tensor

from etherdiff.adapters.io import load_adapter, merge_adapter
from etherdiff.adapters.methods import METHODS, magnitude_config
from etherdiff.config import S2IConfig
from etherdiff.control.datasets import ControlDataset, Pair
from etherdiff.control.pipeline import HintEncoder
from etherdiff.families.diffusion import S2I_SAMPLING
from etherdiff.families.sd1 import StableDiffusion, encode_prompts
from etherdiff.images.reading import to_array
from etherdiff.runs.folder import RunFolder
from etherdiff.runs.model import load_hint_encoder, make_s2i_pipeline, open_control_run, run_dataset
from etherdiff.system.devices import DTYPES
from etherdiff.system.errors import Problems, UserError
from etherdiff.system.files import cache_dir, copy_folder, remove_temporary, unchanged_file_hash
from etherdiff.system.terminal import track
from etherdiff.tasks.control_sets import find_control_sets, square
from etherdiff.tasks.planning import TrainPlan, absolute, check_common, warn_of_long_texts
from etherdiff.tasks.task import DenoisingLoss, Sampler, Shot, Trainee, Training, save_result
from etherdiff.train.batches import ImageSource, Item, Moments, StepBatches, images_at_once, stored_moments
from etherdiff.train.loop import Batch, ParameterGroup

MAX_ENCODER_RATE = 1e-4
"""The control encoder's learning rate at most, and with the method `none` (ETHER paper, appendix C)."""
VALIDATION_PAIRS = 8
READERS = 4  # threads that read control files

# --- Planning --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class S2IPlan(TrainPlan):
    """A run that can start."""

    config: S2IConfig
    dataset: ControlDataset
    refit: RunFolder | None = None
    """The run whose magnitudes are learned."""

    @cached_property
    def watched(self) -> tuple[Pair, ...]:
        """The pairs that the validation loss and the samples are of: not trained on, where there are such."""
        return (self.dataset.evaluation or self.dataset.training)[:VALIDATION_PAIRS]

    def control(self, pair: Pair) -> NDArray[np.uint8]:
        """Return what the hint encoder sees of a pair, (R, R, 3)."""
        return self.dataset.signal.picture(pair.control, self.resolution)


def plan_s2i(config: S2IConfig, resuming: bool = False) -> S2IPlan:
    """Check the whole configuration against the machine, the base and the data. UserError with everything that is wrong."""
    problems = Problems()
    refit = None
    if config.refit is not None:
        config, refit = problems.attempt(take_over, config, config.refit).value or (config, None)
    suffix = "-refit" if config.refit else ""
    common = check_common(config, problems, f"{Path(config.dataset).name}-{config.method}{suffix}", resuming)
    dataset = problems.then(
        common.resolution, lambda resolution: run_dataset(config, common.data_root, resolution, read_files=True)
    )
    settled = problems.settle(common.base, common.options, common.resolution, dataset)
    base, options, resolution, found_dataset = settled
    method_rate = MAX_ENCODER_RATE if config.method == "none" else METHODS[config.method].s2i_learning_rate
    rate = config.learning_rate or method_rate
    resolved = config.model_copy(
        update=common.filled_in(config, options, resolution)
        | {
            "dataset": absolute(config.dataset),
            "captions": config.captions.absolute() if config.captions else None,
            "palette": config.palette and absolute(config.palette),
            "refit": refit.path.absolute() if refit else None,
            "signal": found_dataset.signal.name,
            "learning_rate": rate,
            "encoder_learning_rate": config.encoder_learning_rate or min(rate, MAX_ENCODER_RATE),
        }
    )
    warn_of_long_texts(base, (pair.text for pair in found_dataset.training), "captions")
    return S2IPlan(resolved, base, options, common.output, resolution, found_dataset, refit)


def take_over(config: S2IConfig, refit: Path) -> tuple[S2IConfig, RunFolder]:
    """Return the configuration with what it takes over from the run to re-fit, and that run. UserError where it cannot be."""
    opened, other = open_control_run(refit)
    run = opened.folder
    if not run.adapter.is_dir() or run.refitted_adapter.is_dir() or other.method == "full":
        raise UserError(f"refit: {run.path} has no adapter of layers whose magnitudes could be learned")
    taken = ("base", "prediction_type", "method", "targets", "blocks", "rank", "encoder_init")
    return config.model_copy(update={name: getattr(other, name) for name in taken}), run


# --- Data ------------------------------------------------------------------------------------------------------------


def prepare_pairs(plan: S2IPlan, model: StableDiffusion, hashes: dict[str, str], accelerator: Accelerator) -> StepBatches:
    """Compute what the loop will read; `hashes` is the base's fingerprint. The text encoder stays in use."""
    config, training, device = plan.config, plan.dataset.training, accelerator.device
    if accelerator.is_main_process:
        remove_temporary(cache_dir())
    with accelerator.main_process_first():  # the others find it in the cache
        model.vae.to(device)
        moments = pair_moments(plan, training, 1 + config.flip, model, hashes, "encoding the training images")
        of_watched = pair_moments(plan, plan.watched, 1, model, hashes, "encoding validation images")
    model.text_encoder.to(device, DTYPES[config.mixed_precision])

    def encode(prompts: list[str]) -> Tensor:
        return encode_prompts(model.tokenizer, model.text_encoder, prompts)

    return StepBatches(
        config,
        [ImageSource(moments, tell_pairs([pair.text for pair in training], lambda item: plan.control(training[item]), encode))],
        ImageSource(
            of_watched, tell_pairs([p.text for p in plan.watched], lambda item: plan.control(plan.watched[item]), encode)
        ),
        float(model.vae.config.scaling_factor),
        int(model.noise_scheduler.config.num_train_timesteps),
    )


def tell_pairs(
    texts: Sequence[str], control: Callable[[int], NDArray[np.uint8]], encode: Callable[[list[str]], Tensor]
) -> Callable[[Sequence[Item]], Batch]:
    """Return what gives samples their text and control, mirrored where their images are.

    texts and control: of an image by its number; a control is (R, R, 3). encode: prompts to embeddings (B, tokens, width);
    called for each batch, since thousands would fill the memory.
    """
    readers = ThreadPoolExecutor(READERS)

    def tell(items: Sequence[Item]) -> Batch:
        text = encode(["" if item.dropped else texts[item.image] for item in items])
        found = readers.map(control, [item.image for item in items])
        mirrored = [image[:, ::-1] if item.flip else image for image, item in zip(found, items, strict=True)]
        return {"text": text, "control": torch.from_numpy(np.stack(mirrored)).permute(0, 3, 1, 2).float() / 255}

    return tell


def pair_moments(
    plan: S2IPlan, pairs: Sequence[Pair], flips: int, model: StableDiffusion, hashes: dict[str, str], note: str
) -> Moments:
    """Return the latent moments of the pairs' images."""
    key = {
        "vae": hashes.get("vae") or hashes["single_file"],
        "images": images_digest(pairs),
        "resolution": plan.resolution,
        "flips": flips,
    }

    def read(item: int) -> NDArray[np.float32]:
        pixels = to_array(square(pairs[item], plan.resolution))
        return np.stack([pixels, pixels[..., ::-1]][:flips])

    at_once = min(images_at_once(plan.resolution), len(pairs))
    return stored_moments(model.vae, len(pairs), read, key, note, flips, at_once)


def images_digest(pairs: Sequence[Pair]) -> str:
    """Return a digest of the pairs' images, by the content of their files."""
    total = hashlib.sha256()
    for pair in track(pairs, "reading images") if len(pairs) > VALIDATION_PAIRS else pairs:
        total.update(unchanged_file_hash(pair.image).encode())
    return total.hexdigest()


def pairs_digest(dataset: ControlDataset) -> str:
    """Return a digest of all that is trained on: images, control files, captions, and how control is read."""
    total = hashlib.sha256(repr(sorted(dataset.signal.settings().items())).encode())
    for pair in dataset.training:
        total.update(repr((unchanged_file_hash(pair.image), unchanged_file_hash(pair.control), pair.text)).encode())
    return total.hexdigest()


# --- The task --------------------------------------------------------------------------------------------------------


class S2I(Training[S2IPlan]):
    """Fine-tune on images and their control signals."""

    name = "s2i"
    command = "train-s2i"
    config_class = S2IConfig
    encodes_text = True
    image_sets = staticmethod(find_control_sets)

    def __init__(self, config: S2IConfig, resuming: bool = False) -> None:
        super().__init__(plan_s2i(config, resuming))
        self.method_note = ", with magnitudes learned on top," if self.plan.refit else ""

    @cached_property
    def data_digest(self) -> str:
        return pairs_digest(self.plan.dataset)

    @property
    def data_name(self) -> str:
        return self.plan.config.dataset

    def describe_data(self) -> str:
        dataset = self.plan.dataset
        return f"{len(dataset.training):,} pairs of {dataset.name} at {self.plan.resolution} px, {dataset.signal.name}"

    def dry_lines(self) -> list[str]:
        with torch.device("meta"):
            encoder = make_hint_encoder(self.plan)
        return [f"control encoder       {sum(p.numel() for p in encoder.parameters()):,} parameters more"]

    def facts(self) -> dict[str, Any]:
        dataset = self.plan.dataset
        return {
            "pairs": {"training": len(dataset.training), "evaluation": len(dataset.evaluation)},
            "control": dataset.signal.settings(),
        }

    def prepare(self, model: StableDiffusion, hashes: dict[str, str], accelerator: Accelerator) -> StepBatches:
        return prepare_pairs(self.plan, model, hashes, accelerator)

    def make_sampler(self, model: StableDiffusion, run: RunFolder) -> Sampler:
        return ControlSampler(self.plan, model, run)

    def build(self, model: StableDiffusion) -> Trainee:
        config, refit = self.plan.config, self.plan.refit
        if refit is None:
            adapted, encoder = self.adapt(model), make_hint_encoder(self.plan)
        else:
            unet = merge_adapter(load_adapter(model.unet, refit.adapter))
            adapted = get_peft_model(unet, magnitude_config(self.plan.options.targets))
            encoder = load_hint_encoder(refit)
        if self.sampler is not None:
            self.sampler.hint_encoder = encoder
        loss = DenoisingLoss(model.unet, model.noise_scheduler, config, encoder)
        return Trainee(loss, adapted, [ParameterGroup(encoder, float(config.encoder_learning_rate or 0))])

    def save(self, trainee: Trainee, run: RunFolder, base: dict[str, Any]) -> None:
        """adapter/ and, last, control_encoder/: where that is, the result is whole."""
        refit, encoder = self.plan.refit, trainee.loss.hint_encoder
        if refit is not None:
            save_result(run.refitted_adapter, lambda: copy_folder(refit.adapter, run.refitted_adapter))
        super().save(trainee, run, base)
        if encoder is not None:
            save_result(run.control_encoder, lambda: encoder.save_pretrained(run.control_encoder))


def make_hint_encoder(plan: S2IPlan) -> HintEncoder:
    """Return an untrained control encoder for the base, drawn from the run's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.config.seed)
        width = int(plan.base.config("unet")["block_out_channels"][0])
        return HintEncoder(width, plan.base.latent_scale, plan.config.encoder_init)


class ControlSampler(Sampler):
    """The first validation pairs, number i with seed i: control, base, the step's and the real image side by side."""

    def __init__(self, plan: S2IPlan, model: StableDiffusion, run: RunFolder) -> None:
        self.plan, self.pairs = plan, plan.watched[: plan.config.sample_count]
        shots = [
            Shot(number, number, f"{number:03d}.png", plan.control(pair), {"control": pair.name})
            for number, pair in enumerate(self.pairs)
        ]
        texts = [pair.text for pair in self.pairs]
        super().__init__(plan.config, plan.resolution, S2I_SAMPLING, model, run, texts, [shots])

    def make_pipeline(self) -> Any:
        pipeline = make_s2i_pipeline(self.model, self.hint_encoder)
        pipeline.text_encoder = None  # texts are encoded; its precision, not the UNet's, would be given to them
        return pipeline

    def lay_out(self, images: Sequence[Image.Image], step: int) -> tuple[list[list[Image.Image]], list[str], list[str]]:
        controls = [Image.fromarray(shot.control) for shot in self.shots if shot.control is not None]
        real = [square(pair, self.resolution) for pair in self.pairs]
        rows = [list(row) for row in zip(controls, self.base_images, images, real, strict=True)]
        return rows, list(self.texts), ["control", "base, without control", f"step {step}", "real image"]
