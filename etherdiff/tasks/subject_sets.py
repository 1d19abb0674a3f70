"""The images that a run is judged by that learned a subject: some of each prompt.

eval/images/NNN-prompt/SEED.png        the run's
eval/base_images/NNN-prompt/SEED.png   the base's, of the same prompts without the identifier
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from etherdiff.config import DreamBoothConfig, SubjectConfig, SubjectEvalOptions
from etherdiff.families.bases import find_base
from etherdiff.families.diffusion import PAPER_SAMPLING, chunks, sample, slug
from etherdiff.families.sd1 import Base, load_base, make_pipeline
from etherdiff.images.reading import read_photos
from etherdiff.runs.model import refuse_other_base
from etherdiff.runs.run import Run
from etherdiff.system.errors import Problems, UserError
from etherdiff.system.terminal import warn
from etherdiff.tasks.image_sets import IMAGES, Draw, ImageSet, ImageSets, Picture, Trained, find_trained
from etherdiff.tasks.subjects import Subject, find_subject, make_prompts, prompts_for, read_prompts, warn_of_copies

BASE_IMAGES = "base_images"
"""Folder of the base's images, drawn from the same prompts without the identifier."""


class SubjectImageSets(ImageSets):
    """The images of a subject: some of each prompt, by the run and by its base."""

    config: SubjectConfig

    def __init__(
        self, run: Run, options: SubjectEvalOptions, base: Base, subject: Subject, trained: Trained, texts: Sequence[str]
    ) -> None:
        assert isinstance(run.config, SubjectConfig)
        self.run, self.config, self.options, self.base = run, run.config, options, base
        self.subject, self.trained = subject, trained
        self.prompts = make_prompts(texts, self.config.identifier, str(self.config.class_noun))
        self.seeds = range(options.seed, options.seed + options.num)
        self.sets = (*([self._set(BASE_IMAGES)] if options.base else []), self._set(IMAGES))
        self.facts = {
            "name": run.path.resolve().name,
            "subject": subject.name,
            "class_noun": self.config.class_noun,
            "identifier": self.config.identifier,
            "method": self.config.method,
            "base_model": self.config.base,
            "base_fingerprint": run.provenance.base.fingerprint,
            "checkpoint": trained.name,
            "step": trained.step,
            "adapter_sha256": trained.sha256,
        }

    def _set(self, name: str) -> ImageSet:
        is_base = name == BASE_IMAGES
        sha256 = None if is_base else self.trained.sha256
        generation = {
            "sampler": PAPER_SAMPLING["sampler"],
            "steps": self.options.steps,
            "guidance_scale": PAPER_SAMPLING["guidance_scale"],
            "resolution": self.base.resolution,
        }
        settings = {
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "seeds": list(self.seeds),
            **generation,
            "adapter": sha256,
            "base": self.run.provenance.base.fingerprint,
        }
        drawn_from = "prompts without identifier" if is_base else "prompts with identifier"
        return ImageSet(
            name,
            "the base" if is_base else "the run",
            self._batches(name, is_base),
            settings,
            {**generation, "drawn_from": drawn_from},
            {**generation, "model": self.config.base, "adapter_sha256": sha256},
            adapted=not is_base,
        )

    def _batches(self, name: str, plain: bool) -> list[list[Picture]]:
        """Of each prompt its seeds, `batch_size` at a time."""
        found = []
        for number, prompt in enumerate(self.prompts):
            text = prompt.plain if plain else prompt.text
            folder = Path(name) / f"{number:03d}-{slug(text)}"
            for seeds in chunks(self.seeds, self.options.batch_size):
                found.append([Picture(text, seed, folder / f"{seed}.png") for seed in seeds])
        return found

    def load(self, device: str) -> Draw:
        base = find_base(self.config.base, self.config.prediction_type)
        refuse_other_base(self.run, base)
        model = load_base(base)
        pipeline = make_pipeline(model).to(device)
        is_on = False

        def draw(images: ImageSet, batch: Sequence[Picture]) -> list[Image.Image]:
            nonlocal is_on
            if images.adapted and not is_on:
                self.trained.put_on(model.unet)
                model.unet.to(device)
                is_on = True
            seeds, scale = [picture.seed for picture in batch], images.generation["guidance_scale"]
            return sample(pipeline, batch[0].text, seeds, self.base.resolution, self.options.steps, scale)

        return draw


def find_subject_sets(run: Run, options: SubjectEvalOptions) -> SubjectImageSets:
    """Find what a run is judged by that learned a subject, or was perturbed. UserError with everything that is wrong."""
    config, problems = run.config, Problems()
    assert isinstance(config, SubjectConfig)
    trained = problems.attempt(find_trained, run, options.checkpoint)
    base = problems.attempt(find_base, config.base, config.prediction_type, "configs")
    subject = problems.attempt(find_subject, config.subject, config.data_root)
    problems.then(subject, lambda found: refuse_other_images(run, config, found))
    problems.then(base, lambda found: problems.add(*found.steps_problems(options.steps)))
    texts = problems.attempt(find_texts, config, options)
    found_base, found_subject, found_trained, found_texts = problems.settle(base, subject, trained, texts)
    sets = SubjectImageSets(run, options, found_base, found_subject, found_trained, found_texts)
    if unmarked := [prompt.text for prompt in sets.prompts if prompt.text == prompt.plain]:
        warn(f"{len(unmarked)} prompts do not hold the identifier {config.identifier!r}, for instance {unmarked[0]!r}")
    return sets


def refuse_other_images(run: Run, config: SubjectConfig, subject: Subject) -> None:
    """UserError where the subject's images are not those that the run was trained on, if it recorded that."""
    recorded = run.provenance.images
    if recorded is None or not isinstance(config, DreamBoothConfig):
        return
    photos = read_photos(subject.images, config.skip_bad)
    if photos.digest != recorded:
        raise UserError(f"{run.path} was trained on other images than {config.subject} holds now: put them back")
    warn_of_copies(subject, photos)


def find_texts(config: SubjectConfig, options: SubjectEvalOptions) -> Sequence[str]:
    """The prompts, with the identifier or its place."""
    if options.prompts is None:
        return prompts_for(str(config.class_noun), tiny=config.base == "tiny")
    texts = read_prompts(options.prompts)
    if not texts:
        raise UserError(f"prompts: {options.prompts} holds none; write one per line, with {config.identifier!r} in it")
    return texts
