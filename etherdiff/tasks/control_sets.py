"""The images that a controllable run is judged by: an image of each evaluation pair, by its control.

eval/images/NNN-name/SEED.png               of each pair's prompt and its own control
eval/shuffled_images/NNN-name/SEED.png      of another pair's control; scored against its own, they show that control works
eval/uncontrolled_images/NNN-name/SEED.png  with the hint switched off
eval/real_images/NNN-name/SEED.png          the dataset's image, brought to the same square
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from etherdiff.config import ControlEvalOptions, S2IConfig
from etherdiff.control.datasets import ControlDataset, Pair
from etherdiff.families.bases import find_base
from etherdiff.families.diffusion import S2I_SAMPLING, chunks, sample, slug
from etherdiff.images.reading import UnreadableImage, read_image, resize_and_crop
from etherdiff.runs.model import load_control_run, open_control_run, run_dataset
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.system.files import digest, file_hash
from etherdiff.tasks.image_sets import IMAGES, Draw, ImageSet, ImageSets, Picture

SHUFFLED, UNCONTROLLED, REAL = "shuffled_images", "uncontrolled_images", "real_images"
TITLES = {IMAGES: "the run", SHUFFLED: "another's control", UNCONTROLLED: "no control", REAL: "real images"}
CONTROLS = {
    IMAGES: "the pair's own",
    SHUFFLED: "that of the pair half the set further on",
    UNCONTROLLED: "switched off",
}
"""Set of images -> which control it is drawn with; part of what its scores mean."""
MAX_MAPS = 2000
"""As many as the paper scores."""


class ControlImageSets(ImageSets):
    """An image of each evaluation pair, by its control; where it is asked for, by another pair's, and without control.

    The last set is the pairs' own images, brought to the same square.
    """

    def __init__(self, run: Run, options: ControlEvalOptions, dataset: ControlDataset, pairs: Sequence[Pair]) -> None:
        config = run.config
        assert isinstance(config, S2IConfig)
        self.run, self.config, self.options, self.dataset, self.pairs = run, config, options, dataset, pairs
        self.resolution = int(config.resolution or 0)
        self.seeds = {"first": options.seed, "n": len(pairs)}
        folders = [*run.folder.adapters, run.folder.control_encoder]
        files = [path for folder in folders for path in sorted(folder.glob("*")) if path.suffix in (".json", ".safetensors")]
        self.weights_sha256 = digest({f"{path.parent.name}/{path.name}": file_hash(path) for path in files})
        wanted = {IMAGES: True, SHUFFLED: options.shuffle_maps, UNCONTROLLED: options.without_control}
        self.sets = (*(self._set(name) for name, is_wanted in wanted.items() if is_wanted), self._real_set())
        self.facts = {
            "name": run.path.resolve().name,
            "task": "s2i",
            "dataset": dataset.name,
            "signal": dataset.signal.name,
            "method": config.method,
            "base_model": config.base,
            "base_fingerprint": run.provenance.base.fingerprint,
            "checkpoint": "last",
            "step": config.steps,
            "weights_sha256": self.weights_sha256,
        }

    def _pictures(self, name: str) -> list[Picture]:
        """One of each pair, drawn with the control that the set has for it."""
        shift = len(self.pairs) // 2 if name == SHUFFLED else 0
        found = []
        for number, pair in enumerate(self.pairs):
            seed, control = self.options.seed + number, self.pairs[(number + shift) % len(self.pairs)].control
            place = Path(name) / f"{number:03d}-{slug(pair.name)}" / f"{seed}.png"
            found.append(Picture(pair.text, seed, place, pair, control))
        return found

    def _set(self, name: str) -> ImageSet:
        pictures = self._pictures(name)
        generation = {
            "sampler": S2I_SAMPLING["sampler"],
            "steps": self.options.steps,
            "guidance_scale": self.options.guidance_scale,
            **({"guide_control": True} if self.options.guide_control else {}),  # so that earlier scores keep their identity
            "resolution": self.resolution,
        }
        settings = {
            "run": self.weights_sha256,
            "base": self.run.provenance.base.fingerprint,
            "prompts": digest([pair.text for pair in self.pairs]),
            "controls": digest(_hashes(picture.control for picture in pictures if picture.control)),
            "signal": digest(self.dataset.signal.settings()),
            "control": CONTROLS[name],
            "seeds": self.seeds,
            **generation,
        }
        return ImageSet(
            name,
            TITLES[name],
            chunks(pictures, self.options.batch_size),
            settings,
            {**generation, "control": CONTROLS[name]},
            {"model": self.config.base, "run_sha256": self.weights_sha256, **generation, "control": CONTROLS[name]},
            control_scale=0.0 if name == UNCONTROLLED else 1.0,
        )

    def _real_set(self) -> ImageSet:
        images = digest(_hashes(pair.image for pair in self.pairs))
        settings = {"images": images, "seeds": self.seeds, "resolution": self.resolution}
        pictures = self._pictures(REAL)
        pairs = {picture.place: pair for picture, pair in zip(pictures, self.pairs, strict=True)}
        return ImageSet(REAL, TITLES[REAL], [pictures], settings, read=lambda picture: self._read(pairs[picture.place]))

    def _read(self, pair: Pair) -> Image.Image:
        try:
            return square(pair, self.resolution)
        except UnreadableImage as error:
            raise UserError(str(error)) from error

    def load(self, device: str) -> Draw:
        pipeline, *_ = load_control_run(self.run.path, device)
        signal = self.dataset.signal

        def draw(images: ImageSet, batch: Sequence[Picture]) -> list[Image.Image]:
            controls = [Image.fromarray(signal.picture(p.control, self.resolution)) for p in batch if p.control]
            return sample(
                pipeline,
                [picture.text for picture in batch],
                [picture.seed for picture in batch],
                self.resolution,
                self.options.steps,
                self.options.guidance_scale,
                control_image=controls,
                control_scale=images.control_scale,
                guide_control=self.options.guide_control,
            )

        return draw


def find_control_sets(run: Run, options: ControlEvalOptions) -> ControlImageSets:
    """Find what a controllable run is judged by. UserError with everything that is wrong."""
    run, config = open_control_run(run.path)
    dataset = run_dataset(config, config.data_root, int(config.resolution or 0))
    base = find_base(config.base, config.prediction_type, "configs")
    if wrong := base.steps_problems(options.steps):
        raise UserError(wrong)
    pairs = choose_pairs(dataset, options)
    if wrong := [f"{pair.control}: {found}" for pair in pairs for found in dataset.signal.problems(pair.control)]:
        raise UserError(wrong[:20])
    return ControlImageSets(run, options, dataset, pairs)


def choose_pairs(dataset: ControlDataset, options: ControlEvalOptions) -> tuple[Pair, ...]:
    """Return the pairs to judge by. UserError where there are none, too few, or what is to be shuffled cannot be."""
    there = len(dataset.evaluation)
    if not there:
        raise UserError(f"{dataset.name} has no pairs to evaluate with: every one of them is trained on")
    if options.num_maps is not None and options.num_maps > there:
        raise UserError(f"num_maps: {dataset.name} has {there} pairs to evaluate with, not {options.num_maps}")
    pairs = dataset.evaluation[: options.num_maps or MAX_MAPS]
    if options.shuffle_maps and len(pairs) < 2:
        raise UserError("shuffle_maps: one map cannot be exchanged for another")
    if options.seed + len(pairs) > 2**63:
        raise UserError(f"seed: with {len(pairs)} images it is at most {2**63 - len(pairs)}, since each has the next seed")
    return tuple(pairs)


def square(pair: Pair, resolution: int) -> Image.Image:
    """Return a pair's image as it is trained on. UnreadableImage where it cannot be read."""
    return resize_and_crop(read_image(pair.image), resolution, "center")


def _hashes(paths: Iterable[Path]) -> list[str]:
    return [file_hash(path) for path in paths]
