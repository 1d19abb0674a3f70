"""`etherdiff generate`: images from a run, or from a base with adapters, and the sheet that shows them together.

    OUTPUT/NNN-prompt/SEED.png           an image, with all that it was made with
    OUTPUT/NNN-control-prompt/SEED.png   an image of a controllable run
    OUTPUT/sheet.png                     the first images of each row

Each batch is saved as it is drawn. What is there already of the same settings is kept, so that a command that was stopped
goes on; what is there of other settings is refused, or replaced with --overwrite.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from etherdiff.adapters.io import load_adapters, read_adapter
from etherdiff.config import GenerateOptions, S2IConfig, SubjectConfig
from etherdiff.control.signals import SIGNALS, recorded_signal
from etherdiff.control.signals.signal import Signal
from etherdiff.families.bases import Parts, find_base
from etherdiff.families.diffusion import PAPER_SAMPLING, S2I_SAMPLING, chunks, sample, sheet, slug
from etherdiff.families.sd1 import (
    Base,
    cut_off,
    encode_long_prompts,
    fingerprint,
    load_base,
    load_tokenizer,
    make_pipeline,
    token_chunks,
)
from etherdiff.images.reading import IMAGE_SUFFIXES, describe_left_out, is_hidden, read_image
from etherdiff.images.writing import is_whole, read_png_settings, save_png
from etherdiff.runs.model import load_hint_encoder, make_s2i_pipeline
from etherdiff.runs.result import named_differences
from etherdiff.runs.run import Run
from etherdiff.system.devices import device_problem, resolve_device
from etherdiff.system.errors import Problems, UserError
from etherdiff.system.files import digest, file_hash, remove_temporary
from etherdiff.system.locks import run_lock
from etherdiff.system.terminal import say, track, warn
from etherdiff.tasks.subjects import SLOT, fill_in, read_prompts

MAX_COLUMNS = 8
"""Images in a row of the sheet."""
WEIGHTED = re.compile(r"\([^()]+:\s*\d+(\.\d+)?\s*\)")
"""A weight as other programs read it in a prompt: (word:1.5)."""
OWN = ("prompt", "seed", "control", "control_sha256")
"""Settings that images in one output may differ in."""
NAMES = ("model", "run", "adapters")
"""Settings that are names: what counts is the weights."""


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
    def weights(self) -> str:
        """Digest of all weights and configurations that draw."""
        places = [read_adapter(place).folder for place in self.adapters] + [*filter(None, [self.hint_encoder])]
        content = [path for place in places for path in ([place] if place.is_file() else sorted(place.glob("*")))]
        files = [path for path in content if path.suffix in (".json", ".safetensors")]
        return digest({"base": fingerprint(self.base), "on it": [[path.name, file_hash(path)] for path in files]})

    @cached_property
    def signal(self) -> Signal:
        """How a controllable run's control files are read. UserError where run.yaml does not say it."""
        return recorded_signal(self.run.provenance.control if self.run else {})


@dataclass(frozen=True)
class SheetRow:
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
    negative_prompt: str
    controls: list[Path]

    @property
    def resolution(self) -> int:
        """Side of the images in pixels."""
        return self.options.resolution or self.source.resolution

    @property
    def seeds(self) -> range:
        """Of each row's images."""
        return range(self.options.seed, self.options.seed + self.options.num)

    def problems(self) -> list[str]:
        """Why the base cannot draw so, which options would do nothing, and what is wrong with the control files."""
        found = self.source.base.resolution_problems(self.resolution)
        found += self.source.base.steps_problems(self.sampling["steps"])
        found += self._options_without_effect()
        return found + [f"{path}: {problem}" for path in self.controls for problem in self.source.signal.problems(path)]

    def _options_without_effect(self) -> list[str]:
        options, found = self.options, []
        if self.sampling["guidance_scale"] <= 1:
            unguided = "does nothing without guidance: --guidance-scale has to be above 1"
            found += [f"negative_prompt: {unguided}"] if options.negative_prompt else []
            found += [f"guide_control: {unguided}"] if options.guide_control else []
        if self.source.hint_encoder is None:
            given = {"control_scale": options.control_scale != 1, "guide_control": options.guide_control}
            found += [
                f"{name}: is for runs of train-s2i; there is no control here" for name, is_given in given.items() if is_given
            ]
        if options.scale != 1 and not self.source.adapters:
            found.append("scale: there is no adapter here whose update it could multiply")
        return found

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampler, steps and guidance: the paper's for the task, unless the options say otherwise."""
        usual = S2I_SAMPLING if self.source.hint_encoder else PAPER_SAMPLING
        given = {"steps": self.options.steps, "guidance_scale": self.options.guidance_scale}
        return usual | {name: value for name, value in given.items() if value is not None}

    def rows(self) -> list[SheetRow]:
        """Every prompt; under control, every prompt with every control file. Numbered: names that look alike stay apart."""
        controls: list[Path | None] = list(self.controls) if self.controls else [None]
        pairs = [(control, prompt) for control in controls for prompt in self.prompts]
        names = [f"{slug(control.stem)}-{slug(prompt)}" if control else slug(prompt) for control, prompt in pairs]
        folders = [self.options.output / f"{number:03d}-{name}" for number, name in enumerate(names)]
        return [SheetRow(prompt, folder, control) for (control, prompt), folder in zip(pairs, folders, strict=True)]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What all images are made with; their files hold it."""
        source, options, sampling = self.source, self.options, self.sampling
        made_by: dict[str, Any] = {"model": source.base.name, "adapters": [str(folder) for folder in source.adapters]}
        drawn = {name: sampling[name] for name in ("steps", "sampler", "guidance_scale")}
        use: dict[str, Any] = {"adapter_scale": options.scale, "negative_prompt": self.negative_prompt, **drawn}
        if source.hint_encoder:
            made_by["run"] = str(options.run)
            use |= {"control_scale": options.control_scale, "guide_control": options.guide_control}
        if options.long_prompts:
            use["long_prompts"] = True
        return {**made_by, **use, "resolution": self.resolution, "weights": source.weights}

    def png_settings(self, row: SheetRow, seed: int) -> dict[str, Any]:
        """What an image's file holds about how it was made."""
        control = {"control": row.control.name, "control_sha256": file_hash(row.control)} if row.control else {}
        return {"prompt": row.prompt, "seed": seed, **control, **self.settings}


def generate(options: GenerateOptions) -> Path:
    """Draw every prompt at seeds seed, seed + 1, …, under every control file; return the contact sheet's path.

    Raises:
        UserError: everything that is wrong, before anything is loaded.
        RunError: an image is not finite. Those before it are saved.
    """
    drawing = plan_drawing(options)
    with run_lock(options.output):
        rows, total = drawing.rows(), len(drawing.rows()) * options.num
        for row in rows:
            remove_temporary(row.folder, also_of_live_processes=True)
        stale = find_stale(drawing)
        try:
            draw_missing(drawing, rows, stale)
        finally:
            if (there := sum((row.folder / f"{seed}.png").is_file() for row in rows for seed in drawing.seeds)) < total:
                say(f"{there} of {total} images are in {options.output}; the same command draws the others")
        path = options.output / "sheet.png"
        save_png(draw_sheet(drawing, rows), path, drawing.settings)
    say(f"{total} images in {options.output}; all together: {path}")
    return path


def find_stale(drawing: Drawing) -> list[Path]:
    """List images in the output that are to be replaced, being made with other settings. UserError where they may not be."""
    output, found, reasons = drawing.options.output, [], []
    ignored: tuple[str, ...]
    wanted = {row.folder / f"{seed}.png": (row, seed) for row in drawing.rows() for seed in drawing.seeds}
    for path in filter(Path.is_file, [*sorted(output.glob("*/*.png")), output / "sheet.png"]):
        recorded = recorded_settings(path)
        if path in wanted:
            settings, ignored = drawing.png_settings(*wanted[path]), NAMES
        elif path.name == "sheet.png" or (recorded and re.match(r"\d{3,}-", path.parent.name)):
            settings, ignored = drawing.settings, (*NAMES, *OWN)
        else:
            continue  # not one of ours
        if recorded is None:
            reasons.append("nothing in it says how it was made")
        elif different := named_differences(recorded, settings, ignored):
            reasons.append("; ".join(different))
        else:
            continue
        found.append(path)
    if found and not drawing.options.overwrite:
        raise UserError(
            f"output: {output} holds {len(found)} images made with other settings, such as {found[0].relative_to(output)} "
            f"({reasons[0]}): choose another folder, or pass --overwrite to replace them"
        )
    return found


def recorded_settings(path: Path) -> Mapping[str, Any] | None:
    """Read what an image was made with; None where its file does not say so."""
    try:
        found = read_png_settings(path)
    except UserError:
        return None
    return found if isinstance(found, Mapping) else None


def draw_missing(drawing: Drawing, rows: Sequence[SheetRow], stale: Sequence[Path]) -> None:
    """Draw and save, batch by batch, what is not there or stale. Stale images go when the first batch has been drawn."""
    todo = []
    for row in rows:
        for part in chunks(drawing.seeds, drawing.options.batch_size):
            paths = [row.folder / f"{seed}.png" for seed in part]
            if missing := [path for path in paths if path in stale or not is_whole(path)]:
                todo.append((row, part, paths, missing))
    if not todo:
        return
    pipeline = load_pipeline(drawing)
    for number, (row, part, paths, missing) in enumerate(track(todo, "generating")):
        images = _draw(pipeline, drawing, row, part)  # whole, as a batch's last bits depend on all of it
        for path in stale if number == 0 else ():
            path.unlink()
        row.folder.mkdir(parents=True, exist_ok=True)
        for seed, path, image in zip(part, paths, images, strict=True):
            if path in missing:
                save_png(image, path, drawing.png_settings(row, seed))


def draw_sheet(drawing: Drawing, rows: Sequence[SheetRow]) -> Image.Image:
    """Lay out the first images of each row, after its control."""
    cells, seeds = [], drawing.seeds
    for row in rows:
        control = [_read_control(drawing, row.control)] if row.control else []
        shown = seeds[: MAX_COLUMNS - len(control)]
        cells.append([*control, *(read_image(row.folder / f"{seed}.png") for seed in shown)])
    titles = [*(["control"] if drawing.controls else []), *(f"seed {seed}" for seed in seeds)]
    return sheet(cells, [row.prompt for row in rows], titles[: len(cells[0])])


def plan_drawing(options: GenerateOptions) -> Drawing:
    """Check the options, and find what draws and what is drawn. Raises one UserError with everything."""
    problems = Problems()
    if (options.run is None) == (options.base is None):
        problems.add("give either --run, or --base (with --adapter)")
    if options.run is not None and options.adapter:
        problems.add("--adapter goes with --base; a run brings its own")
    if options.run is not None and options.prediction_type is not None:
        problems.add("--prediction-type goes with --base; a run has its own")
    if options.run is None and options.control is not None:
        problems.add("--control goes with --run: a base alone has no control encoder")
    problems.raise_if_any()
    from_file = problems.attempt(lambda: read_prompts(options.prompts) if options.prompts else [])
    given = [*options.prompt, *(from_file.value or [])]
    if from_file and not given:
        problems.add("prompt: give --prompt TEXT or --prompts FILE")
    problems.add(*filter(None, [device_problem(options.device)]))
    if options.offload and not torch.cuda.is_available():
        problems.add("offload: there is no GPU to offload from")
    if options.offload and options.device not in ("auto", "cuda"):
        problems.add(f"offload: moves models to a GPU, and --device {options.device} is none")
    source = problems.attempt(_find_source, options)
    controls = problems.attempt(_find_controls, options, source.value)
    texts = problems.then(source, lambda found: _fill_in(found, [options.negative_prompt, *given]))
    negative, *prompts = texts.value or [""]
    prompts = list(dict.fromkeys(prompts))
    if source.value:
        problems.check(Drawing(source.value, options, prompts, negative, controls.value or []).problems)
    found, found_controls = problems.settle(source, controls)
    _warn_about_prompts(found.base, [negative, *prompts], options.long_prompts)
    return Drawing(found, options, prompts, negative, found_controls)


def _fill_in(source: Source, texts: Sequence[str]) -> list[str]:
    """Fill in {identifier} and {class_noun} as eval does. UserError where no run says what they are."""
    config = source.run.config if source.run else None
    if isinstance(config, SubjectConfig):
        noun = str(config.class_noun)
        return [fill_in(text, config.identifier, noun) if SLOT.search(text) else text for text in texts]
    if slots := sorted({slot[0] for text in texts for slot in SLOT.finditer(text)}):
        raise UserError(f"prompt: {', '.join(slots)} can be filled in for a run of a subject only: write the words themselves")
    return list(texts)


def _warn_about_prompts(base: Base, texts: Sequence[str], long_prompts: bool) -> None:
    """Say what of the prompts is not read, or not as other programs do."""
    tokenizer = load_tokenizer(base)
    for text in texts if not long_prompts else ():
        if lost := cut_off(tokenizer, text):
            warn(f"the text encoder does not read {lost!r}, the end of a prompt that is too long; --long-prompts has it read")
    for text in texts:
        if weight := WEIGHTED.search(text):
            warn(f"{weight[0]!r} is read as it stands: weights in prompts mean nothing here")


def _find_source(options: GenerateOptions) -> Source:
    """The run's base and result, or the base and adapters that are named."""
    if options.run is None:
        base = find_base(str(options.base), options.prediction_type)
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


def _draw(pipeline: Any, drawing: Drawing, row: SheetRow, seeds: Sequence[int]) -> list[Image.Image]:
    options, sampling, prompt = drawing.options, drawing.sampling, row.prompt
    more: dict[str, Any] = {"negative_prompt": drawing.negative_prompt}
    texts = [prompt, drawing.negative_prompt]
    told: str | None = prompt
    if options.long_prompts and any(len(token_chunks(pipeline.tokenizer, text)) > 1 for text in texts):
        own, negative = encode_long_prompts(pipeline.tokenizer, pipeline.text_encoder, texts).split(1)
        told, more = None, {"prompt_embeds": own, "negative_prompt_embeds": negative}
    if row.control is not None:
        more |= {"control_image": _read_control(drawing, row.control)}
        more |= {"control_scale": options.control_scale, "guide_control": options.guide_control}
    return sample(pipeline, told, seeds, drawing.resolution, sampling["steps"], sampling["guidance_scale"], **more)


def _read_control(drawing: Drawing, path: Path) -> Image.Image:
    return Image.fromarray(drawing.source.signal.picture(path, drawing.resolution))


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
