"""`etherdiff generate`: pictures from a run, or from a base with adapters, and the sheet that shows them together."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from etherdiff.adapters.io import load_adapters
from etherdiff.families.bases import Base, Parts, find_base, load_base, make_pipeline
from etherdiff.families.sampling import PAPER_SAMPLING, chunks, sample, save_images, sheet
from etherdiff.runs.run import Run
from etherdiff.system.devices import device_problem, resolve_device
from etherdiff.system.errors import UserError
from etherdiff.system.terminal import say, track

MAX_COLUMNS = 8


@dataclass(frozen=True)
class GenerateOptions:
    """What to draw and how; sizes in pixels, `scale` multiplies the adapters' updates."""

    prompts: list[str]
    output: Path
    num: int = 4
    batch_size: int = 4
    seed: int = 0
    steps: int = 25
    guidance_scale: float = 7.5
    negative_prompt: str = ""
    resolution: int | None = None
    scale: float = 1.0
    device: str = "auto"
    offload: bool = False

    def problems(self) -> list[str]:
        """Everything wrong with the options, one sentence each."""
        found = [f"{name}: must be at least 1, not {value}" for name, value in self._counts().items() if value < 1]
        if self.seed < 0:
            found.append(f"seed: must be at least 0, not {self.seed}")
        if not self.prompts:
            found.append("prompt: give --prompt TEXT or --prompts FILE")
        wrong_device = device_problem(self.device)
        if wrong_device:
            found.append(wrong_device)
        if self.offload and not torch.cuda.is_available():
            found.append("offload: there is no GPU to offload from")
        return found

    def _counts(self) -> dict[str, int]:
        counts = {"num": self.num, "batch_size": self.batch_size, "steps": self.steps}
        return counts if self.resolution is None else counts | {"resolution": self.resolution}


@dataclass(frozen=True)
class Source:
    """What draws: a base, the adapters on it, and of a controllable run the hint encoder's folder."""

    base: Base
    adapters: list[Path]
    hint_encoder: Path | None = None


def run_source(run: Path, parts: Parts = "weights") -> Source:
    """The base and the result of a run folder; `parts` of the base are fetched, if it comes from the hub."""
    opened = Run.open(run)
    opened.check_results()
    base = find_base(opened.config.base, opened.config.prediction_type, parts)
    return Source(base, opened.adapters, opened.folder.control_encoder if opened.is_controlled else None)


def generate(source: Source, options: GenerateOptions) -> Path:
    """Draw every prompt at seeds seed, seed + 1, …; returns the contact sheet's path, beside the images' folders."""
    resolution = options.resolution or source.base.resolution
    problems = options.problems()
    if resolution % source.base.resolution_step:
        problems.append(f"resolution: must be a multiple of {source.base.resolution_step}, not {resolution}")
    if problems:
        raise UserError(problems)
    pipeline = adapted_pipeline(source, options)
    seeds = range(options.seed, options.seed + options.num)
    wanted = [(prompt, part) for prompt in options.prompts for part in chunks(seeds, options.batch_size)]
    pictures: dict[tuple[str, int], Image.Image] = {}
    for prompt, part in track(wanted, "generating"):
        images = sample(
            pipeline,
            prompt,
            part,
            resolution,
            options.steps,
            options.guidance_scale,
            negative_prompt=options.negative_prompt,
        )
        pictures |= {(prompt, seed): image for seed, image in zip(part, images, strict=True)}
    save_images(pictures, options.output, image_settings(source, options))
    return save_sheet(pictures, options)


def adapted_pipeline(source: Source, options: GenerateOptions) -> StableDiffusionPipeline:
    """The base's pipeline with the adapters in its UNet, where it will compute."""
    model = load_base(source.base)
    load_adapters(model.unet, [(folder, options.scale) for folder in source.adapters])
    pipeline = make_pipeline(model)
    if options.offload:
        pipeline.enable_model_cpu_offload()
        return pipeline
    return pipeline.to(resolve_device(options.device))


def image_settings(source: Source, options: GenerateOptions) -> dict[str, object]:
    """What each PNG says of how it was made, beside its prompt and seed."""
    return {
        "model": source.base.name,
        "adapters": [str(folder) for folder in source.adapters],
        "adapter_scale": options.scale,
        "steps": options.steps,
        "sampler": PAPER_SAMPLING["sampler"],
        "guidance_scale": options.guidance_scale,
        "negative_prompt": options.negative_prompt,
    }


def save_sheet(pictures: dict[tuple[str, int], Image.Image], options: GenerateOptions) -> Path:
    """A row per prompt (and, of many seeds, the first few)."""
    shown = range(options.seed, options.seed + min(options.num, MAX_COLUMNS))
    rows = [[pictures[prompt, seed] for seed in shown] for prompt in options.prompts]
    path = options.output / "sheet.png"
    sheet(rows, options.prompts, [f"seed {seed}" for seed in shown]).save(path)
    say(f"{len(pictures)} images in {options.output}; all together: {path}")
    return path


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; empty lines and lines that start with # are left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts: {path} cannot be read ({error})") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return list(dict.fromkeys(prompts))
