"""`etherdiff generate --run RUN --control …`: pictures that follow control images."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from etherdiff.adapters.io import load_adapters
from etherdiff.control.pipeline import StableDiffusionS2IPipeline
from etherdiff.control.signals import recorded_signal
from etherdiff.families.bases import load_base
from etherdiff.families.sampling import S2I_SAMPLING, chunks, sheet, slug
from etherdiff.images.png import save_png
from etherdiff.runs.control import load_hint_encoder, make_s2i_pipeline, open_control_run
from etherdiff.system.devices import resolve_device
from etherdiff.system.errors import UserError
from etherdiff.system.terminal import say, track
from etherdiff.use.generate import GenerateOptions, run_source

MAX_COLUMNS = 6
NOT_CONTROL = {".jsonl", ".txt", ".md", ".csv"}


@dataclass(frozen=True)
class ControlUse:
    """How much a control decides; both as `StableDiffusionS2IPipeline` takes them."""

    control_scale: float = 1.0
    guide_control: bool = False


AS_TRAINED = ControlUse()


def generate_controlled(run: Path, controls: Path, options: GenerateOptions, use: ControlUse = AS_TRAINED) -> Path:
    """Draw every prompt under every control file at seeds seed, seed + 1, …; returns the contact sheet's path.

    controls: a control file of the run's signal, or a folder of them. UserError with everything that is wrong, before
    anything is loaded.
    """
    opened, config = open_control_run(run)
    assert config.resolution is not None  # the plan filled it in
    signal, files = recorded_signal(opened.provenance.control), control_files(controls)
    resolution = options.resolution or config.resolution
    problems = options.problems() + [f"{path}: {problem}" for path in files for problem in signal.problems(path)]
    source = run_source(run)
    if resolution % source.base.resolution_step:
        problems.append(f"resolution: must be a multiple of {source.base.resolution_step}, not {resolution}")
    if problems:
        raise UserError(problems)
    model = load_base(source.base)
    load_adapters(model.unet, [(adapter, options.scale) for adapter in source.adapters])
    pipeline = make_s2i_pipeline(model, load_hint_encoder(opened.folder))
    if options.offload:
        pipeline.enable_model_cpu_offload()
    else:
        pipeline.to(resolve_device(options.device))
    rows, labels = [], []
    for file, prompt in track([(file, prompt) for file in files for prompt in options.prompts], "generating"):
        control = Image.fromarray(signal.picture(file, resolution))
        pictures = _draw(pipeline, control, prompt, resolution, options, use)
        facts = {"model": source.base.name, "run": str(run), "control": file.name, **asdict(use)}
        place = options.output / f"{file.stem}-{slug(prompt)}"
        place.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures):
            save_png(picture, place / f"{options.seed + number}.png", {"prompt": prompt, **_settings(options, number), **facts})
        rows.append([control, *pictures[:MAX_COLUMNS]])
        labels.append(prompt)
    path = options.output / "sheet.png"
    sheet(rows, labels, ["control", *(f"seed {options.seed + number}" for number in range(len(rows[0]) - 1))]).save(path)
    say(f"{len(rows) * options.num} images in {options.output}; all together: {path}")
    return path


def control_files(path: Path) -> list[Path]:
    """The file, or all files of the folder. UserError where there is none."""
    if path.is_file():
        return [path]
    found = [file for file in sorted(path.glob("*")) if file.is_file() and file.suffix.lower() not in NOT_CONTROL]
    if not found:
        raise UserError(f"control: {path} is neither a control file nor a folder of them")
    return found


def _draw(
    pipeline: StableDiffusionS2IPipeline,
    control: Image.Image,
    prompt: str,
    resolution: int,
    options: GenerateOptions,
    use: ControlUse,
) -> list[Image.Image]:
    pictures: list[Image.Image] = []
    for seeds in chunks(range(options.seed, options.seed + options.num), options.batch_size):
        pictures += pipeline(
            prompt,
            control,
            **asdict(use),
            negative_prompt=options.negative_prompt,
            height=resolution,
            width=resolution,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
    return pictures


def _settings(options: GenerateOptions, number: int) -> dict[str, object]:
    return {
        "seed": options.seed + number,
        "steps": options.steps,
        "sampler": S2I_SAMPLING["sampler"],
        "guidance_scale": options.guidance_scale,
        "negative_prompt": options.negative_prompt,
    }
