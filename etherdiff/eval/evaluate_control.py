"""`etherdiff eval` of a run of train-s2i: draw the evaluation pairs' prompts with their controls, and score what comes out.

    eval/images/NNN-name/SEED.png               of each pair's prompt and its own control
    eval/shuffled_images/NNN-name/SEED.png      of another pair's control: held against its own, it shows that control is real
    eval/uncontrolled_images/NNN-name/SEED.png  with the hint switched off
    eval/real_images/NNN-name/SEED.png          the dataset's image, brought to the same square

As in `eval.protocol`, an image is a function of its seed, and batches are fixed.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Group
from rich.table import Table

from etherdiff.config import S2IConfig
from etherdiff.control.datasets import ControlDataset, Pair
from etherdiff.eval.control_scores import ControlledImage, ControlScoring, score_controlled
from etherdiff.eval.evaluate import by_role, drawing_problems, drawing_versions, enough_memory, network_problems, notes, timed
from etherdiff.eval.intervals import interval_text
from etherdiff.eval.metrics import CONTROL_METRICS, CONTROL_ROLES
from etherdiff.eval.networks import PRESETS, Backbone, choose_preset, find_backbones
from etherdiff.eval.paper import PAPER_S2I_SCOPE, paper_value
from etherdiff.eval.protocol import ROUNDING, is_whole, read_sets, why_not_these, write_set
from etherdiff.eval.readback import NotReadable, ReadBack, find_readback
from etherdiff.families.sampling import S2I_SAMPLING, chunks, sheet, slug
from etherdiff.images.crops import resize_and_crop
from etherdiff.images.png import save_png
from etherdiff.images.reading import UnreadableImage, read_image
from etherdiff.runs.control import load_control_run
from etherdiff.runs.run import Run
from etherdiff.system.devices import resolve_device
from etherdiff.system.errors import Problems, UserError
from etherdiff.system.files import digest, file_hash, remove_temporary, staged_file, write_json
from etherdiff.system.locks import run_lock
from etherdiff.system.terminal import track

IMAGES, SHUFFLED, UNCONTROLLED, REAL = "images", "shuffled_images", "uncontrolled_images", "real_images"
TITLES = {IMAGES: "the run", SHUFFLED: "another's control", UNCONTROLLED: "no control", REAL: "real images"}
CONTROLS = {
    IMAGES: "the pair's own",
    SHUFFLED: "that of the pair half the set further on",
    UNCONTROLLED: "switched off",
}
"""Set of images -> which control it is drawn with; part of what its scores mean."""
MAX_MAPS = 2000
"""As many as the paper scores."""
SHEET_ROWS = 8
ROLES = (*CONTROL_ROLES, "fid")


@dataclass(frozen=True)
class ControlOptions:
    """How to judge a controllable run."""

    num_maps: int | None = None
    """How many of the evaluation pairs, from the first; None: all, at most `MAX_MAPS`."""
    seed: int = 0
    """Of the first pair's image; the next ones count up."""
    steps: int = S2I_SAMPLING["steps"]
    guidance_scale: float = S2I_SAMPLING["guidance_scale"]
    guide_control: bool = False
    """Whether guidance strengthens the control too (see `StableDiffusionS2IPipeline`); not so in the paper's protocol."""
    batch_size: int = 4
    device: str = "auto"
    metrics: tuple[str, ...] | None = None
    """None: all of `CONTROL_METRICS` for the run's signal."""
    preset: str | None = None
    """Networks to score by, of `PRESETS`; None: tiny for the tiny base, else paper."""
    backbones: tuple[str, ...] = ()
    """ROLE=NAME, each: another network than the preset's, for segmenter or fid; landmarks=FILE.task."""
    shuffle_maps: bool = False
    """Also draw each prompt with another pair's control, and hold it against its own."""
    without_control: bool = False
    """Also draw with the hint switched off."""
    real: bool = False
    """Also score the real images: the ceiling."""
    overwrite: bool = False

    def problems(self) -> list[str]:
        """Everything wrong with the options by themselves, one sentence each."""
        counts = {"num_maps": self.num_maps, "steps": self.steps, "batch_size": self.batch_size}
        found = drawing_problems(counts, self.seed, self.device)
        return found + network_problems(self.preset, PRESETS, self.backbones, ROLES)

    @property
    def named_backbones(self) -> dict[str, str]:
        """Role -> another network than the preset's."""
        return by_role(self.backbones)


@dataclass(frozen=True)
class Judged:
    """A loaded run."""

    run: Run
    config: S2IConfig
    pipeline: Any
    """A `StableDiffusionS2IPipeline`, ready to draw by DDIM; anything that is called alike will do."""
    dataset: ControlDataset

    @property
    def resolution(self) -> int:
        """Side of the images in pixels: that of training."""
        assert self.config.resolution is not None  # the plan of the training filled it in
        return self.config.resolution

    @property
    def weights_sha256(self) -> str:
        """Of the adapters, where there are any, and of the control encoder."""
        folders = [*self.run.adapters, self.run.folder.control_encoder]
        files = [path for folder in folders for path in sorted(folder.glob("*")) if path.suffix in (".json", ".safetensors")]
        return digest({f"{path.parent.name}/{path.name}": file_hash(path) for path in files})


@dataclass(frozen=True)
class Plan:
    """An evaluation that can start."""

    judged: Judged
    options: ControlOptions
    pairs: tuple[Pair, ...]
    scoring: ControlScoring

    @property
    def folder(self) -> Path:
        return self.judged.run.folder.eval

    @property
    def drawn(self) -> tuple[str, ...]:
        """The sets of images that are drawn."""
        wanted = {IMAGES: True, SHUFFLED: self.options.shuffle_maps, UNCONTROLLED: self.options.without_control}
        return tuple(name for name, is_wanted in wanted.items() if is_wanted)

    def images(self, name: str) -> list[ControlledImage]:
        """The images of a set, one of each pair, whether they are there or not."""
        seeds = range(self.options.seed, self.options.seed + len(self.pairs))
        return [
            ControlledImage(pair, seed, self.folder / name / f"{number:03d}-{slug(pair.name)}" / f"{seed}.png")
            for number, (pair, seed) in enumerate(zip(self.pairs, seeds, strict=True))
        ]

    def controls(self, name: str) -> dict[str, Path]:
        """Name of a pair -> the control that its image of a set is drawn with."""
        shift = len(self.pairs) // 2 if name == SHUFFLED else 0
        return {pair.name: self.pairs[(at + shift) % len(self.pairs)].control for at, pair in enumerate(self.pairs)}

    def generation(self) -> dict[str, Any]:
        """How an image comes from its prompt, control and seed."""
        return {
            "sampler": S2I_SAMPLING["sampler"],
            "steps": self.options.steps,
            "guidance_scale": self.options.guidance_scale,
            **({"guide_control": True} if self.options.guide_control else {}),  # so that earlier scores keep their identity
            "resolution": self.judged.resolution,
        }

    def settings(self, name: str) -> dict[str, Any]:
        """What decides the images of a set, and how they are computed."""
        seeds = {"first": self.options.seed, "n": len(self.pairs)}
        if name == REAL:
            images = digest(_hashes(pair.image for pair in self.pairs))
            return {"images": images, "seeds": seeds, "resolution": self.judged.resolution, ROUNDING: {}}
        facts = {"device": resolve_device(self.options.device), "batch_size": self.options.batch_size}
        return {
            "run": self.judged.weights_sha256,
            "base": self.judged.run.provenance.base.fingerprint,
            "prompts": digest([pair.text for pair in self.pairs]),
            "controls": digest(_hashes(self.controls(name).values())),
            "signal": digest(self.judged.dataset.signal.settings()),
            "control": CONTROLS[name],
            "seeds": seeds,
            **self.generation(),
            ROUNDING: facts | drawing_versions(),
        }


def is_control_run(path: Path) -> bool:
    """Whether a folder holds a run of train-s2i. UserError where it holds none."""
    return Run.open(path).is_controlled


def evaluate_control(path: Path, options: ControlOptions) -> dict[str, Any]:
    """Judge a run; returns the content of RUN/eval/metrics.json, which is written whole or not at all.

    Raises:
        UserError: everything that is wrong, before anything is drawn.
        RunError: not enough memory.
    """
    seconds: dict[str, float] = {}
    with enough_memory():
        with timed(seconds, "load"):
            plan = plan_evaluation(path, options)
        with run_lock(plan.folder):
            remove_temporary(plan.folder, also_of_live_processes=True)
            claim_sets(plan)
            draw_missing(plan, seconds)
            with timed(seconds, "score"):
                result = score(plan)
            write_sheet(plan)
            write_json(plan.folder / "metrics.json", result, allow_nan=False)
            write_json(plan.folder / "cost.json", {"seconds": seconds})
    return result


def load_run(path: Path, device: str) -> Judged:
    """The run's model and its dataset. UserError where either cannot be used."""
    pipeline, dataset, run, config = load_control_run(path, device)
    return Judged(run, config, pipeline, dataset)


def plan_evaluation(path: Path, options: ControlOptions) -> Plan:
    """Check the run, its dataset, the options and the networks. Raises one UserError with everything."""
    if not is_control_run(path):
        raise UserError(f"{path} is not a run of train-s2i")
    problems = Problems()
    problems.add(*options.problems())
    problems.raise_if_any()
    judged = load_run(path, resolve_device(options.device))
    signal = judged.dataset.signal
    metrics = options.metrics if options.metrics is not None else CONTROL_METRICS[signal.name]
    there = f"there are {', '.join(CONTROL_METRICS[signal.name])}"
    wrong = [name for name in metrics if name not in CONTROL_METRICS[signal.name]]
    problems.add(*[f"metric {name!r}: of {signal.name} {there}" for name in wrong])
    if not metrics:
        problems.add(f"metrics: none is asked for; {there}")
    pairs = problems.attempt(lambda: choose_pairs(judged.dataset, options)).value
    if pairs is not None:
        problems.add(*[f"{pair.control}: {found}" for pair in pairs for found in signal.problems(pair.control)][:20])
    preset = choose_preset(judged.config.base, options.preset)
    named = {role: name for role, name in options.named_backbones.items() if role == "fid"}
    backbones: dict[str, Backbone] | None = {}
    if "fid" in metrics:
        backbones = problems.attempt(lambda: find_backbones(["fid"], preset, named, options.device)).value
    reader, why = None, ""
    if set(metrics) - {"fid"}:
        try:
            reader = problems.attempt(lambda: _find_readback(judged, options, preset)).value
        except NotReadable as reason:
            why = str(reason)
    problems.raise_if_any()
    assert pairs is not None
    assert backbones is not None
    scoring = ControlScoring(metrics, signal, judged.resolution, reader, backbones, why)
    return Plan(judged, options, pairs, scoring)


def _find_readback(judged: Judged, options: ControlOptions, preset: str) -> ReadBack:
    return find_readback(judged.dataset.signal, options.named_backbones, preset, resolve_device(options.device))


def choose_pairs(dataset: ControlDataset, options: ControlOptions) -> tuple[Pair, ...]:
    """The pairs to judge by. UserError where there are none, too few, or what is to be shuffled cannot be."""
    there = len(dataset.evaluation)
    if not there:
        raise UserError(f"{dataset.name} has no pairs to evaluate with: every one of them is trained on")
    if options.num_maps is not None and options.num_maps > there:
        raise UserError(f"num_maps: {dataset.name} has {there} pairs to evaluate with, not {options.num_maps}")
    pairs = dataset.evaluation[: options.num_maps or MAX_MAPS]
    if options.shuffle_maps and len(pairs) < 2:
        raise UserError("shuffle_maps: one map cannot be exchanged for another")
    return tuple(pairs)


# --- Images ----------------------------------------------------------------------------------------------------------


def claim_sets(plan: Plan) -> None:
    """Take up the images that are there, or remove them where they are to be overwritten. UserError where neither may be."""
    problems, stale = [], []
    for name in (*plan.drawn, REAL):
        complete = all(is_whole(image.path) for image in plan.images(name))
        if found := why_not_these(plan.folder, name, plan.settings(name), complete):
            problems += found
            stale.append(name)
    if problems and not plan.options.overwrite:
        raise UserError(problems)
    for name in stale:
        shutil.rmtree(plan.folder / name)


def draw_missing(plan: Plan, seconds: dict[str, float]) -> None:
    """Bring the real images to their squares, and draw what is missing of each set."""
    missing = [image for image in plan.images(REAL) if not is_whole(image.path)]
    if missing:
        write_set(plan.folder, REAL, plan.settings(REAL))
        with timed(seconds, REAL):
            write_squares(missing, plan.judged.resolution)
    for name in plan.drawn:
        batches = [batch for batch in chunks(plan.images(name), plan.options.batch_size) if not _are_whole(batch)]
        if not batches:
            continue
        write_set(plan.folder, name, plan.settings(name))
        facts = {"model": plan.judged.config.base, "run_sha256": plan.judged.weights_sha256, **plan.generation()}
        title = "drawing" if name == IMAGES else f"drawing, {TITLES[name]}"
        with timed(seconds, name):
            draw(partial(call_pipeline, plan, name), batches, facts | {"control": CONTROLS[name]}, title)


def write_squares(images: Sequence[ControlledImage], resolution: int) -> None:
    """The pairs' own images as they are trained on, each where it belongs. UserError with all that cannot be read."""
    bad = []
    for image in track(images, "real images"):
        try:
            square = resize_and_crop(read_image(image.pair.image), resolution)
        except UnreadableImage as error:
            bad.append(str(error))
            continue
        image.path.parent.mkdir(parents=True, exist_ok=True)
        save_png(square, image.path, {"prompt": image.pair.text, "real": image.pair.image.name})
    if bad:
        raise UserError(bad)


def draw(
    call: Callable[[Sequence[ControlledImage]], list[Image.Image]],
    batches: Sequence[Sequence[ControlledImage]],
    facts: Mapping[str, Any],
    title: str,
) -> None:
    """Draw each batch whole, and keep what is missing of it; `facts` go into every PNG beside its prompt and seed."""
    for batch in track(batches, title):
        missing = [image for image in batch if not is_whole(image.path)]
        for image, pixels in zip(batch, call(batch), strict=True):
            if image in missing:
                image.path.parent.mkdir(parents=True, exist_ok=True)
                save_png(pixels, image.path, {"prompt": image.pair.text, "seed": image.seed, **facts})


def call_pipeline(plan: Plan, name: str, batch: Sequence[ControlledImage]) -> list[Image.Image]:
    """An image for each of a batch; its noise comes from its own seed, drawn on the CPU whatever the device."""
    judged, controls = plan.judged, plan.controls(name)
    signal, resolution = judged.dataset.signal, judged.resolution
    pictures = [Image.fromarray(signal.picture(controls[image.pair.name], resolution)) for image in batch]
    return judged.pipeline(
        prompt=[image.pair.text for image in batch],
        control_image=pictures,
        control_scale=0.0 if name == UNCONTROLLED else 1.0,
        height=resolution,
        width=resolution,
        num_inference_steps=plan.options.steps,
        guidance_scale=plan.options.guidance_scale,
        guide_control=plan.options.guide_control,
        generator=[torch.Generator().manual_seed(image.seed) for image in batch],
    ).images


def write_sheet(plan: Plan) -> None:
    """RUN/eval/sheet.png: a row for each of the first pairs, its control, what was drawn of it, and the real image."""
    images, real = plan.images(IMAGES)[:SHEET_ROWS], plan.images(REAL)
    signal, resolution = plan.judged.dataset.signal, plan.judged.resolution
    rows = []
    for image, other in zip(images, real, strict=False):
        control = Image.fromarray(signal.picture(image.pair.control, resolution))
        rows.append([control, read_image(image.path), read_image(other.path)])
    drawn = sheet(rows, [image.pair.text for image in images], ["control", "generated", "real"])
    with staged_file(plan.folder / "sheet.png") as staged:
        drawn.save(staged, format="PNG")


def _are_whole(batch: Sequence[ControlledImage]) -> bool:
    return all(is_whole(image.path) for image in batch)


def _hashes(paths: Iterable[Path]) -> list[str]:
    return [file_hash(path) for path in paths]


# --- Scores ----------------------------------------------------------------------------------------------------------


def score(plan: Plan) -> dict[str, Any]:
    """The content of metrics.json: the run's scores, those of the other sets under "beside", what was judged under "run"."""
    judged = plan.judged
    sets = {name: score_set(plan, name) for name in (*plan.drawn, *([REAL] if plan.options.real else []))}
    result = sets.pop(IMAGES)
    return {
        **result,
        "images": {"generated": len(plan.pairs), "real": len(plan.pairs), "held_out": 0},
        "beside": sets,
        "run": {
            "name": judged.run.path.resolve().name,
            "task": "s2i",
            "dataset": judged.dataset.name,
            "signal": judged.dataset.signal.name,
            "method": judged.config.method,
            "base_model": judged.config.base,
            "base_fingerprint": judged.run.provenance.base.fingerprint,
            "checkpoint": "last",
            "step": judged.config.steps,
            "weights_sha256": judged.weights_sha256,
        },
        "paper": beside_the_paper(plan, result["scores"]),
        "drawn": {name: dict(read_sets(plan.folder)[name][ROUNDING]) for name in plan.drawn},
    }


def score_set(plan: Plan, name: str) -> dict[str, Any]:
    """The scores of one set of images, each held against its own pair's control."""
    if name == REAL:
        return score_controlled(plan.images(REAL), [], plan.scoring, None, f"scoring {TITLES[name]}")
    real = [image.path for image in plan.images(REAL)]
    drawn_with = read_sets(plan.folder)[name][ROUNDING]
    versions = {key: drawn_with.get(key) for key in drawing_versions()}
    generation = {**plan.generation(), "control": CONTROLS[name], "versions": versions}
    return score_controlled(plan.images(name), real, plan.scoring, generation, f"scoring {TITLES[name]}")


def beside_the_paper(plan: Plan, scores: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's numbers for the method as shares of 1, and for each why it must not stand beside ours."""
    method = plan.judged.run.method_label
    apart = [f"the paper's: {PAPER_S2I_SCOPE}"]
    if plan.judged.dataset.name != "ade20k" or len(plan.pairs) != MAX_MAPS:
        apart.append(f"{len(plan.pairs)} maps of {plan.judged.dataset.name}")
    values = {name: paper_value(name, method) for name in scores}
    found = {name: {"value": value, "differs": apart} for name, value in values.items() if value is not None}
    return {"method": method, "scope": PAPER_S2I_SCOPE, "scores": found}


# --- What a person reads ---------------------------------------------------------------------------------------------


def render(result: Mapping[str, Any]) -> Group:
    """The scores as a table, beside those of the other sets, and below it what was left out."""
    run, beside = result["run"], result["beside"]
    table = Table(title=f"{run['dataset']}: {run['method']} on {run['base_model']}, step {run['step']}", title_justify="left")
    table.add_column("score")
    for header in ("mean", "95% interval", "images", *(TITLES[name] for name in beside)):
        table.add_column(header, justify="right")
    for name, one in result["scores"].items():
        others = [found["scores"].get(name) for found in beside.values()]
        means = ["" if other is None else f"{other['mean']:.4f}" for other in others]
        table.add_row(name, f"{one['mean']:.4f}", interval_text(one["low"], one["high"]), str(one["n"]), *means)
    lines = [*notes(result, "the run"), *(line for name, found in beside.items() for line in notes(found, TITLES[name]))]
    lines.append("intervals: how the score would move with other images; FID's with blocks of them left out in turn")
    return Group(table, *lines)
