"""`etherdiff generate`: images from a run, or from a base with adapters, and the sheet that shows them together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from etherdiff.adapters.io import load_adapters, read_adapter
from etherdiff.config import GenerateOptions, S2IConfig
from etherdiff.control.signals import SIGNALS, recorded_signal
from etherdiff.control.signals.signal import Signal
from etherdiff.families.bases import Parts, find_base
from etherdiff.families.sampling import PAPER_SAMPLING, S2I_SAMPLING, chunks, sample, sheet, slug
from etherdiff.families.sd1 import Base, load_base, make_pipeline
from etherdiff.images.reading import IMAGE_SUFFIXES, describe_left_out, is_hidden
from etherdiff.images.writing import save_png
from etherdiff.runs.model import load_hint_encoder, make_s2i_pipeline
from etherdiff.runs.run import Run
from etherdiff.system.devices import device_problem, resolve_device
from etherdiff.system.errors import Answer, Problems, UserError
from etherdiff.system.terminal import say, track, warn
from etherdiff.tasks.subjects import read_prompts

MAX_COLUMNS = 8
"""Images in a row of the sheet."""


@dataclass(frozen=True)
class Source:
    """What draws: a base, the adapters on it, and the run that they are of, if they are of one."""

    base: Base
    adapters: list[Path]
    run: Run | None = None

    @property
    def hint_encoder(self) -> Path | None:
        """The folder of a controllable run's."""
        return self.run.folder.control_encoder if self.run and self.run.is_controlled else None

    @property
    def resolution(self) -> int:
        """Side in pixels: that of a controllable run's training, else the base's."""
        trained = self.run.config.resolution if self.run and isinstance(self.run.config, S2IConfig) else None
        return trained or self.base.resolution

    @cached_property
    def signal(self) -> Signal:
        """How a controllable run's control files are read. UserError where run.yaml does not say it."""
        return recorded_signal(self.run.provenance.control if self.run else {})


@dataclass(frozen=True)
class Row:
    """One row of the sheet: a prompt, with a control file if the run is controllable."""

    prompt: str
    folder: Path
    """Folder of its images."""
    control: Path | None = None


@dataclass(frozen=True)
class Drawing:
    """What is drawn and how, checked."""

    source: Source
    options: GenerateOptions
    prompts: list[str]
    controls: list[Path]

    @property
    def resolution(self) -> int:
        """Side of the images in pixels."""
        return self.options.resolution or self.source.resolution

    def problems(self) -> list[str]:
        """Why the base cannot draw at this size, and what is wrong with the control files."""
        found = self.source.base.resolution_problems(self.resolution)
        return found + [f"{path}: {problem}" for path in self.controls for problem in self.source.signal.problems(path)]

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampler, steps and guidance: the paper's for the task, unless the options say otherwise."""
        usual = S2I_SAMPLING if self.controls else PAPER_SAMPLING
        given = {"steps": self.options.steps, "guidance_scale": self.options.guidance_scale}
        return usual | {name: value for name, value in given.items() if value is not None}

    def rows(self) -> Iterator[Row]:
        """Every prompt; under control, every prompt with every control file."""
        for number, prompt in enumerate(self.prompts if not self.controls else []):
            yield Row(prompt, self.options.output / f"{number:03d}-{slug(prompt)}")
        for file in self.controls:
            for prompt in self.prompts:
                yield Row(prompt, self.options.output / f"{file.stem}-{slug(prompt)}", file)

    def png_settings(self, row: Row, seed: int) -> dict[str, Any]:
        """What an image's file holds about how it was made."""
        drawn = {**self.sampling, "negative_prompt": self.options.negative_prompt}
        drawn = {name: drawn[name] for name in ("steps", "sampler", "guidance_scale", "negative_prompt")}
        named = {"prompt": row.prompt, "seed": seed}
        if row.control is None:
            adapters = [str(folder) for folder in self.source.adapters]
            return {**named, "model": self.source.base.name, "adapters": adapters, "adapter_scale": self.options.scale, **drawn}
        use = {"control_scale": self.options.control_scale, "guide_control": self.options.guide_control}
        made_by = {"model": self.source.base.name, "run": str(self.options.run), "control": row.control.name}
        return {**named, **drawn, **made_by, **use}


def generate(options: GenerateOptions) -> Path:
    """Draw every prompt at seeds seed, seed + 1, …, under every control file; return the contact sheet's path.

    UserError with everything that is wrong, before anything is loaded.
    """
    drawing = plan_drawing(options)
    pipeline, seeds = load_pipeline(drawing), range(options.seed, options.seed + options.num)
    rows, labels = [], []
    for row in track(list(drawing.rows()), "generating"):
        control = Image.fromarray(drawing.source.signal.picture(row.control, drawing.resolution)) if row.control else None
        images = _draw(pipeline, drawing, row.prompt, control, seeds)
        row.folder.mkdir(parents=True, exist_ok=True)
        for seed, image in zip(seeds, images, strict=True):
            save_png(image, row.folder / f"{seed}.png", drawing.png_settings(row, seed))
        rows.append([*([control] if control else []), *images][:MAX_COLUMNS])
        labels.append(row.prompt)
    titles = [*(["control"] if drawing.controls else []), *(f"seed {seed}" for seed in seeds)]
    path = options.output / "sheet.png"
    sheet(rows, labels, titles[: len(rows[0])]).save(path)
    say(f"{len(rows) * options.num} images in {options.output}; all together: {path}")
    return path


def plan_drawing(options: GenerateOptions) -> Drawing:
    """Check the options, and find what draws and what is drawn. Raises one UserError with everything."""
    problems = Problems()
    if (options.run is None) == (options.base is None):
        problems.add("give either --run, or --base (with --adapter)")
    if options.run is not None and options.adapter:
        problems.add("--adapter goes with --base; a run brings its own")
    if options.run is None and options.control is not None:
        problems.add("--control goes with --run: a base alone has no control encoder")
    problems.raise_if_any()
    from_file = problems.attempt(lambda: read_prompts(options.prompts) if options.prompts else [])
    prompts = list(dict.fromkeys([*options.prompt, *(from_file.value or [])]))
    if from_file and not prompts:
        problems.add("prompt: give --prompt TEXT or --prompts FILE")
    problems.add(*filter(None, [device_problem(options.device)]))
    if options.offload and not torch.cuda.is_available():
        problems.add("offload: there is no GPU to offload from")
    source = problems.attempt(_find_source, options)
    controls = problems.attempt(_find_controls, options, source.value)
    if source.value:
        problems.check(Drawing(source.value, options, prompts, controls.value or []).problems)
    return Drawing(*problems.settle(source, Answer(options), Answer(prompts), controls))


def _find_source(options: GenerateOptions) -> Source:
    """The run's base and result, or the base and adapters that are named."""
    if options.run is None:
        base = find_base(str(options.base))
        for adapter in options.adapter:
            read_adapter(adapter)
        return Source(base, list(options.adapter))
    source = run_source(options.run)
    if source.hint_encoder is not None and options.control is None:
        raise UserError(
            f"{options.run} is a controllable run: say with --control what is to be followed (a file, or a folder of them)"
        )
    if source.hint_encoder is None and options.control is not None:
        raise UserError(f"{options.run} is not a run of train-s2i: it has no control")
    return source


def run_source(run: Path, parts: Parts = "weights") -> Source:
    """The base and the result of a run folder; `parts` of the base are fetched if it comes from the hub."""
    opened = Run.open(run)
    opened.check_results()
    base = find_base(opened.config.base, opened.config.prediction_type, parts)
    return Source(base, opened.adapters, opened)


def load_pipeline(drawing: Drawing) -> Any:
    """The base's pipeline with the adapters in its UNet, where it will compute."""
    source, options = drawing.source, drawing.options
    model = load_base(source.base)
    load_adapters(model.unet, [(folder, options.scale) for folder in source.adapters])
    pipeline: Any = make_pipeline(model)
    if source.run and source.run.is_controlled:
        pipeline = make_s2i_pipeline(model, load_hint_encoder(source.run.folder))
    if options.offload:
        pipeline.enable_model_cpu_offload()
        return pipeline
    return pipeline.to(resolve_device(options.device))


def _draw(pipeline: Any, drawing: Drawing, prompt: str, control: Image.Image | None, seeds: range) -> list[Image.Image]:
    options, sampling = drawing.options, drawing.sampling
    more: dict[str, Any] = {"negative_prompt": options.negative_prompt}
    if control is not None:
        more |= {"control_image": control, "control_scale": options.control_scale, "guide_control": options.guide_control}
    images: list[Image.Image] = []
    for part in chunks(seeds, options.batch_size):
        images += sample(pipeline, prompt, part, drawing.resolution, sampling["steps"], sampling["guidance_scale"], **more)
    return images


def _find_controls(options: GenerateOptions, source: Source | None) -> list[Path]:
    """The control files that are named; none where there is no control."""
    if options.control is None:
        return []
    if source and source.hint_encoder:
        return control_files(options.control, source.signal.suffixes)
    return control_files(options.control, [suffix for signal in SIGNALS.values() for suffix in signal.suffixes])


def control_files(path: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Path]:
    """The file, or all files of the folder with these suffixes; what else is there is said. UserError if there is none."""
    if path.is_file():
        return [path]
    listed = [file for file in sorted(path.glob("*")) if file.suffix.lower() in suffixes and not is_hidden(file)]
    found = [file for file in listed if file.is_file()]
    others = describe_left_out(path, suffixes=suffixes) if path.is_dir() else ""
    if not found:
        content = f"; it holds {others}" if others else ""
        raise UserError(f"control: {path} is neither a control file nor a folder of them ({', '.join(suffixes)}){content}")
    if others:
        warn(f"left out of {path}: {others}")
    return found
