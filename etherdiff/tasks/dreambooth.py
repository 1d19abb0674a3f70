"""The subject-driven task (DreamBooth, Ruiz et al. 2023; protocol of the ETHER paper, section 5.1)."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from etherdiff.adapters.methods import METHODS
from etherdiff.config import DreamBoothConfig
from etherdiff.families.diffusion import PAPER_SAMPLING, sample, slug
from etherdiff.families.sd1 import Base, StableDiffusion, encode_prompts, load_tokenizer, make_pipeline
from etherdiff.images.reading import Photos, read_image, read_photos, resize_and_crop, to_array
from etherdiff.images.writing import save_png
from etherdiff.runs.folder import RunFolder
from etherdiff.system.errors import Problems
from etherdiff.system.files import cache_dir, digest, remove_temporary
from etherdiff.system.terminal import track, warn
from etherdiff.tasks.planning import TrainPlan, absolute, check_common, check_subject, warn_of_long_texts
from etherdiff.tasks.subject_sets import find_subject_sets
from etherdiff.tasks.subjects import Subject, photo_of, warn_of_copies, warn_of_left_out
from etherdiff.tasks.task import DenoisingLoss, LiveScorer, Sampler, Shot, Trainee, Training
from etherdiff.train.batches import CLASS_DRAWS, ImageSource, Item, Moments, StepBatches, stored_moments
from etherdiff.train.loop import Batch
from etherdiff.train.randomness import Draw, uniform
from etherdiff.train.recorder import Watcher

PAPER_CLASS_IMAGES = 200
TINY_CLASS_IMAGES = 20  # drawing the paper's 200 would take longer than a few hundred steps

# --- Planning --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DreamBoothPlan(TrainPlan):
    """A run that can start."""

    config: DreamBoothConfig
    subject: Subject
    photos: Photos
    """The subject's images that can be read."""

    @property
    def subject_prompt(self) -> str:
        """Prompt of the subject's images."""
        return photo_of(f"{self.config.identifier} {self.config.class_noun}")

    @property
    def class_prompt(self) -> str:
        """Prompt of the class images."""
        return photo_of(str(self.config.class_noun))


def plan_dreambooth(config: DreamBoothConfig, resuming: bool = False) -> DreamBoothPlan:
    """Check the whole configuration against the machine, the base and the images. UserError with everything that is wrong."""
    problems = Problems()
    common = check_common(config, problems, f"{Path(config.subject).name}-{config.method}", resuming)
    subject, noun = check_subject(config, problems, common)
    photos = problems.then(subject, lambda found: read_photos(found.images, config.skip_bad))
    steps = config.class_sampling_steps
    problems.then(common.base, lambda found: problems.add(*found.steps_problems(steps, "class_sampling_steps")))
    base, options, resolution = problems.settle(common.base, common.options, common.resolution)
    found_subject, found_photos, class_noun = problems.settle(subject, photos, noun)
    resolved = config.model_copy(
        update=common.filled_in(config, options, resolution)
        | {
            "subject": absolute(config.subject),
            "learning_rate": config.learning_rate or METHODS[config.method].learning_rate,
            "class_noun": class_noun,
            "class_images": config.class_images or (TINY_CLASS_IMAGES if base.name == "tiny" else PAPER_CLASS_IMAGES),
        }
    )
    _warn_about_tokens(base, config.identifier)
    warn_of_left_out(found_subject)
    warn_of_copies(found_subject, found_photos)
    warn_of_long_texts(base, config.sample_prompts or (), "sample prompts")
    return DreamBoothPlan(resolved, base, options, common.output, resolution, found_subject, found_photos)


def _warn_about_tokens(base: Base, identifier: str) -> None:
    tokens = load_tokenizer(base).tokenize(identifier)
    if len(tokens) > 1:
        shown = json.dumps([token.removesuffix("</w>") for token in tokens], ensure_ascii=False)
        warn(f"the identifier {identifier!r} is {len(tokens)} tokens {shown}, each with a meaning already; sks is one")


# --- Data ------------------------------------------------------------------------------------------------------------


def prepare_data(plan: DreamBoothPlan, model: StableDiffusion, hashes: dict[str, str], accelerator: Accelerator) -> StepBatches:
    """Compute what the loop will read; `hashes` is the base's fingerprint."""
    config, device = plan.config, accelerator.device
    if accelerator.is_main_process:
        remove_temporary(cache_dir())
    class_images = make_class_images(plan, model, hashes, accelerator) if config.prior_preservation else []
    with accelerator.main_process_first():  # the others find it in the cache
        model.vae.to(device)
        moments = image_moments(plan.photos, config, plan.resolution, model, hashes, "the subject's images")
        square = config.model_copy(update={"crop": "center"})  # class images are square: there is one crop
        drawn = read_photos(class_images) if class_images else None
        of_class = image_moments(drawn, square, plan.resolution, model, hashes, "class images") if drawn else None
    model.text_encoder.to(device)
    text = encode_prompts(model.tokenizer, model.text_encoder, [plan.subject_prompt, plan.class_prompt, ""]).float().cpu()
    timesteps = int(model.noise_scheduler.config.num_train_timesteps)
    return make_batches(config, moments, of_class, text, float(model.vae.config.scaling_factor), timesteps)


def make_batches(
    config: DreamBoothConfig, moments: Moments, of_class: Moments | None, text: Tensor, scaling_factor: float, timesteps: int
) -> StepBatches:
    """Batches of the subject's images and, weighted, of its class's (DreamBooth, eq. 2).

    text: (3, tokens, width), the embeddings of the subject's, the class's and the empty prompt.
    """
    subject_text, class_text, empty_text = text

    def tell_subject(items: Sequence[Item]) -> Batch:
        return {"text": torch.stack([empty_text if item.dropped else subject_text for item in items])}

    def tell_class(items: Sequence[Item]) -> Batch:
        return {"text": torch.stack([class_text] * len(items))}

    subject = ImageSource(moments, tell_subject, weight=1.0)
    sources = [subject]
    if of_class is not None:
        sources.append(ImageSource(of_class, tell_class, CLASS_DRAWS, config.prior_weight))
    return StepBatches(config, sources, subject, scaling_factor, timesteps)


def make_class_images(
    plan: DreamBoothPlan, model: StableDiffusion, hashes: dict[str, str], accelerator: Accelerator
) -> list[Path]:
    """Draw the class images that are missing, each process its share, and return all files."""
    config, count = plan.config, plan.config.class_images or 0
    settings = {
        "prompt": plan.class_prompt,
        "base": hashes,
        "seed": config.seed,
        "steps": config.class_sampling_steps,
        "resolution": plan.resolution,
    }
    folder = cache_dir() / "class_images" / digest(settings)  # never shared with another prompt, base or setting
    paths = [folder / f"{index:05d}.png" for index in range(count)]
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    missing = [index for index in mine if not _is_whole(paths[index])]
    if missing:
        pipeline = make_pipeline(model).to(accelerator.device)
        folder.mkdir(parents=True, exist_ok=True)
        for index in track(missing, f"images of {plan.class_prompt!r}"):
            seed = class_seed(config.seed, index)
            # one at a time: an image's last bit can depend on its neighbours in a batch
            (image,) = sample(pipeline, plan.class_prompt, [seed], plan.resolution, config.class_sampling_steps)
            save_png(image, paths[index], {"index": index, **settings})
    accelerator.wait_for_everyone()
    return paths


def class_seed(seed: int, index: int) -> int:
    """Return the seed of one class image: its own, whatever process makes it and however many there are."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _is_whole(path: Path) -> bool:
    try:
        read_image(path)
    except (ValueError, OSError):
        return False
    return True


def image_moments(
    photos: Photos, config: DreamBoothConfig, resolution: int, model: StableDiffusion, hashes: dict[str, str], what: str
) -> Moments:
    """Return the photos' latent moments."""
    key = {
        "vae": hashes.get("vae") or hashes["single_file"],
        "images": photos.digest,
        "resolution": resolution,
        "random_crops": [config.crops_per_image, config.seed] if config.crop == "random" else None,
        "flip": config.flip,
    }

    def read(index: int) -> NDArray[np.float32]:
        windows = crop_windows(read_image(photos.paths[index]), index, config, resolution)
        return np.stack([to_array(window) for window in windows])

    return stored_moments(model.vae, len(photos.paths), read, key, f"encoding {what}", 1 + config.flip)


def crop_windows(image: Image.Image, index: int, config: DreamBoothConfig, resolution: int) -> list[Image.Image]:
    """Return the image's crops (each followed by its mirror image, when flipping is on), all resolution x resolution."""
    windows = []
    for crop in range(config.crops_per_image):
        u, v = (uniform(config.seed, Draw.CROP_POSITION, 2 * crop + axis, index) for axis in range(2))
        windows.append(resize_and_crop(image, resolution, config.crop, (u, v)))
        if config.flip:
            windows.append(windows[-1].transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    return windows


# --- The task --------------------------------------------------------------------------------------------------------

MakeScorer = Callable[[DreamBoothPlan, StableDiffusion, dict[str, Any]], LiveScorer]
"""Makes what scores along the way, before the text encoder goes and the adapter comes."""
FindScorer = Callable[[DreamBoothConfig], MakeScorer | None]
"""Finds the networks to score by; None where nothing is to score. UserError where they are wanted and cannot be had."""


class DreamBooth(Training[DreamBoothPlan]):
    """Fine-tune on a subject's images."""

    name = "dreambooth"
    command = "train-dreambooth"
    config_class = DreamBoothConfig
    encodes_text = False
    image_sets = staticmethod(find_subject_sets)

    def __init__(self, config: DreamBoothConfig, resuming: bool = False, find_scorer: FindScorer | None = None) -> None:
        plan = plan_dreambooth(config, resuming)
        self.make_scorer = find_scorer(plan.config) if find_scorer and plan.config.eval_scores != "off" else None
        self.scorer: LiveScorer | None = None
        # on or off: as it stays when the run is resumed
        settled = plan.config.model_copy(update={"eval_scores": "on" if self.make_scorer else "off"})
        super().__init__(replace(plan, config=settled))

    @property
    def data_digest(self) -> str:
        return self.plan.photos.digest

    @property
    def data_name(self) -> str:
        return self.plan.config.subject

    def describe_data(self) -> str:
        plan = self.plan
        count = f", {plan.config.class_images} class images {plan.class_prompt!r}" if plan.config.prior_preservation else ""
        return f"{len(plan.photos.paths)} images of {plan.subject_prompt!r} at {plan.resolution} px{count}"

    def images_per_pass(self) -> int:
        return self.plan.config.batch_size * (2 if self.plan.config.prior_preservation else 1)

    def dry_lines(self) -> list[str]:
        if not self.plan.config.prior_preservation:
            return []
        return [f"class images          {self.plan.config.class_images}, generated before training unless they are cached"]

    def facts(self) -> dict[str, Any]:
        return {"subject_prompt": self.plan.subject_prompt, "class_prompt": self.plan.class_prompt}

    def prepare(self, model: StableDiffusion, hashes: dict[str, str], accelerator: Accelerator) -> StepBatches:
        return prepare_data(self.plan, model, hashes, accelerator)

    def make_sampler(self, model: StableDiffusion, run: RunFolder) -> Sampler:
        return SubjectSampler(self.plan, model, run)

    def watch(self, model: StableDiffusion, run: RunFolder, base: dict[str, Any], accelerator: Accelerator) -> list[Watcher]:
        samples = super().watch(model, run, base, accelerator)
        if self.make_scorer is None or not accelerator.is_main_process:
            return samples
        model.unet.to(accelerator.device)
        self.scorer = self.make_scorer(self.plan, model, base)
        return [Watcher("scores", self.plan.config.eval_every, self.scorer.score_step), *samples]

    def build(self, model: StableDiffusion) -> Trainee:
        adapted = self.adapt(model)
        if self.scorer is not None:
            self.scorer.adapted = adapted
        return Trainee(DenoisingLoss(model.unet, model.noise_scheduler, self.plan.config), adapted)

    def conclude(self) -> None:
        """Say which step is best."""
        if self.scorer is not None:
            self.scorer.conclude()


class SubjectSampler(Sampler):
    """Every prompt at every seed; the base's images are saved, too."""

    def __init__(self, plan: DreamBoothPlan, model: StableDiffusion, run: RunFolder) -> None:
        self.prompts = list(plan.config.sample_prompts or [plan.subject_prompt])
        self.seeds = range(plan.config.sample_count)
        shots = [
            [Shot(number, seed, f"{number:03d}-{slug(prompt)}/{seed}.png") for seed in self.seeds]
            for number, prompt in enumerate(self.prompts)
        ]
        super().__init__(plan.config, plan.resolution, PAPER_SAMPLING, model, run, self.prompts, shots)
        self.save(self.base_images, 0, "base")

    def make_pipeline(self) -> Any:
        return make_pipeline(self.model)

    def lay_out(self, images: Sequence[Image.Image], step: int) -> tuple[list[list[Image.Image]], list[str], list[str]]:
        """Two rows per prompt, the base's and the step's; a column per seed."""
        rows, labels, count = [], [], len(self.seeds)
        for number, prompt in enumerate(self.prompts):
            for name, source in (("base", self.base_images), (f"step {step}", images)):
                rows.append(list(source[number * count : (number + 1) * count]))
                labels.append(f"{name}: {prompt}")
        return rows, labels, [f"seed {seed}" for seed in self.seeds]
