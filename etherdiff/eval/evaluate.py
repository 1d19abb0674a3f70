"""`etherdiff eval`: draw a run's image sets, score them, and write eval/metrics.json.

    eval/settings.json           what the sets were made with
    eval/SET/NNN-name/SEED.png   their images
    eval/metrics.json            scores        eval/cost.json   seconds

A batch with a missing image is drawn whole: so a killed evaluation resumes, and ends with the same bytes.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Group
from rich.table import Table

from etherdiff.config import ControlEvalOptions, EvalOptions
from etherdiff.eval.intervals import interval_text
from etherdiff.eval.judges import Judge, find_judge, find_networks, option_problems, refuse_too_few
from etherdiff.eval.metrics import METRICS, metric_of
from etherdiff.eval.networks import versions_of
from etherdiff.families.diffusion import sheet
from etherdiff.images.reading import read_image
from etherdiff.images.writing import is_whole, save_png
from etherdiff.runs.result import named_differences
from etherdiff.runs.run import Run
from etherdiff.system.devices import resolve_device
from etherdiff.system.errors import Answer, Problems, RunError, UserError
from etherdiff.system.files import remove_temporary, staged_file, write_json
from etherdiff.system.locks import run_lock
from etherdiff.system.terminal import track
from etherdiff.tasks import find_task
from etherdiff.tasks.control_sets import REAL, TITLES, ControlImageSets
from etherdiff.tasks.image_sets import IMAGES, ImageSet, ImageSets, Picture
from etherdiff.tasks.subject_sets import SubjectImageSets

ROUNDING = "computed_with"
"""Key of a set's settings that only change the rounding: device, batch size, versions of libraries."""
SHEET_ROWS = 8


@dataclass(frozen=True)
class EvalPlan:
    """A checked evaluation."""

    folder: Path
    """RUN/eval."""
    sets: ImageSets
    judge: Judge
    options: EvalOptions

    def settings(self, images: ImageSet) -> dict[str, Any]:
        """Return everything that determines the images of a set."""
        drawn = {"device": resolve_device(self.options.device), "batch_size": self.options.batch_size, **drawing_versions()}
        return {**images.settings, ROUNDING: {} if images.read else drawn}

    def missing(self, batch: Sequence[Picture]) -> list[Picture]:
        """Return the pictures of a batch that are missing or damaged."""
        return [picture for picture in batch if not is_whole(self.folder / picture.place)]


def evaluate(run: Run, options: EvalOptions) -> dict[str, Any]:
    """Score a run; return the content of RUN/eval/metrics.json, which is written whole or not at all.

    Raises:
        UserError: everything that is wrong, before anything is drawn.
        RunError: not enough memory.
    """
    seconds: dict[str, float] = {}
    with enough_memory():
        plan = plan_evaluation(run, options)
        with run_lock(plan.folder):
            remove_temporary(plan.folder, also_of_live_processes=True)
            draw_missing(plan, find_stale(plan), seconds)
            with timed(seconds, "score"):
                result = score_sets(plan)
            if isinstance(plan.sets, ControlImageSets):
                write_sheet(plan.sets, plan.folder)
            write_json(plan.folder / "metrics.json", result, allow_nan=False)
            write_json(plan.folder / "cost.json", {"seconds": seconds})
    return result


def plan_evaluation(run: Run, options: EvalOptions) -> EvalPlan:
    """Check the run, its data, the options and the networks. Raises one UserError with everything."""
    task = find_task(run.task)
    if isinstance(options, ControlEvalOptions) != run.is_controlled:
        raise UserError(f"{run.path} is a {run.task} run: these options are for another task")
    problems = Problems()
    sets: Answer[ImageSets] = problems.attempt(task.image_sets, run, options)
    signal = sets.value.dataset.signal if isinstance(sets.value, ControlImageSets) else None
    wrong = option_problems(options, signal.name if signal else getattr(run.config, "signal", None))
    problems.add(*wrong)
    if wrong or (run.is_controlled and not sets):  # then networks cannot be looked for
        problems.raise_if_any()
    networks = problems.attempt(find_networks, run.config.base, options, signal)
    if isinstance(sets.value, SubjectImageSets):
        problems.attempt(refuse_too_few, sets.value, options)
    found_sets, found_networks = problems.settle(sets, networks)
    return EvalPlan(run.folder.eval, found_sets, find_judge(found_sets, options, found_networks), options)


# --- Images ----------------------------------------------------------------------------------------------------------


def find_stale(plan: EvalPlan) -> list[str]:
    """Return the sets whose images are to be overwritten; the others are kept. UserError where neither is allowed."""
    problems, stale = Problems(), []
    for images in plan.sets.sets:
        if found := why_not_these(plan, images):
            problems.add(found)
            stale.append(images.name)
    if not plan.options.overwrite:
        problems.raise_if_any()
    return stale


def why_not_these(plan: EvalPlan, images: ImageSet) -> str | None:
    """Return why existing images cannot be used for the set; None if they can.

    If none is missing, rounding does not matter; else it must stay the same.
    """
    place = plan.folder / images.name
    if not any(place.glob("*/*.png")):
        return None
    recorded = read_sets(plan.folder).get(images.name)
    if recorded is None:
        return f"{place} holds images, and nothing says how they were made: pass --overwrite to draw them again"
    found = named_differences(recorded, plan.settings(images), () if plan.missing(images.pictures) else (ROUNDING,))
    if not found:
        return None
    return f"{place} holds images made with other settings ({'; '.join(found)}): pass --overwrite to draw them again"


def draw_missing(plan: EvalPlan, stale: Sequence[str], seconds: dict[str, float]) -> None:
    """Crop real images, then draw what is missing of each set. The model is loaded only if something is missing.

    A stale set's images are removed when the first batch that replaces them has been drawn.
    """
    todo = {
        images.name: batches
        for images in sorted(plan.sets.sets, key=lambda images: images.read is None)
        if (batches := [batch for batch in images.batches if images.name in stale or plan.missing(batch)])
    }
    draw = None
    for name, batches in todo.items():
        images = plan.sets[name]
        if images.read is None and draw is None:
            with timed(seconds, "load"):
                draw = plan.sets.load(resolve_device(plan.options.device))
        with timed(seconds, name):
            if draw is None:
                begin_set(plan, images, stale)
                write_squares(plan, images)
                continue
            for batch in track(batches, "drawing" if name == IMAGES else f"drawing, {images.title}"):
                drawn = draw(images, batch)
                if batch is batches[0]:
                    begin_set(plan, images, stale)
                missing = plan.missing(batch)
                for picture, pixels in zip(batch, drawn, strict=True):
                    if picture in missing:
                        facts = {"prompt": picture.text, "seed": picture.seed, **images.facts}
                        save_picture(plan.folder / picture.place, pixels, facts)


def begin_set(plan: EvalPlan, images: ImageSet, stale: Sequence[str]) -> None:
    """Remove a stale set's images, and record the settings of the new ones."""
    if images.name in stale:
        shutil.rmtree(plan.folder / images.name)
    write_set(plan.folder, images.name, plan.settings(images))


def write_squares(plan: EvalPlan, images: ImageSet) -> None:
    """Crop real images as in training, and save each in its place. UserError with all that cannot be read."""
    problems = Problems()
    for picture in track(plan.missing(images.pictures), images.title):
        if images.read is not None and picture.pair is not None:
            square = problems.attempt(images.read, picture).value
            if square is not None:
                facts = {"prompt": picture.text, "real": picture.pair.image.name}
                save_picture(plan.folder / picture.place, square, facts)
    problems.raise_if_any()


def save_picture(path: Path, pixels: Image.Image, facts: Mapping[str, Any]) -> None:
    """Write an image with its settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(pixels, path, dict(facts))


def read_sets(folder: Path) -> dict[str, Any]:
    """Read the settings of the sets in an eval folder: name of the set -> settings. Empty if nothing is recorded."""
    try:
        content = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_set(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Record the settings of a set of images, before its first image."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", read_sets(folder) | {name: settings})


def drawing_versions() -> dict[str, str]:
    """Return the versions of the libraries that images are drawn with."""
    return {name: found for name, found in versions_of("diffusers", "transformers").items() if name != "pillow"}


def write_sheet(sets: ControlImageSets, folder: Path) -> None:
    """Write RUN/eval/sheet.png: a row for each of the first pairs with its control, the generated and the real image."""
    signal, rows, texts = sets.dataset.signal, [], []
    both = zip(sets[IMAGES].pictures[:SHEET_ROWS], sets[REAL].pictures, sets.pairs, strict=False)
    for image, real, pair in both:
        control = Image.fromarray(signal.picture(pair.control, sets.resolution))
        rows.append([control, read_image(folder / image.place), read_image(folder / real.place)])
        texts.append(pair.text)
    with staged_file(folder / "sheet.png") as staged:
        sheet(rows, texts, ["control", "generated", "real"]).save(staged, format="PNG")


# --- Scores ----------------------------------------------------------------------------------------------------------


def score_sets(plan: EvalPlan) -> dict[str, Any]:
    """Return the content of metrics.json."""
    drawn = {images.name: dict(read_sets(plan.folder)[images.name][ROUNDING]) for images in plan.sets.sets}
    scored = {}
    for images in plan.sets.sets:
        if plan.judge.is_scored(images):
            # versions when the images were drawn, which may differ from the installed ones
            versions = {key: drawn[images.name].get(key) for key in drawing_versions()}
            scored[images.name] = plan.judge.score(images, plan.folder, {**images.generation, "versions": versions})
    return {**plan.judge.result(scored), "drawn": {name: found for name, found in drawn.items() if not plan.sets[name].read}}


# --- Terminal output -------------------------------------------------------------------------------------------------


def render(result: Mapping[str, Any]) -> Group:
    """Return a table of the scores of all sets, and below it what was left out."""
    run, paper = result["run"], result["paper"]["scores"]
    others = {TITLES[name]: found for name, found in result.get("beside", {}).items()}
    if result.get("base"):
        others["the base"] = result["base"]
    baselines = {metric.baseline for metric in METRICS.values() if metric.baseline}
    has_baselines = not baselines.isdisjoint(result["scores"])
    comparable = {name: one["value"] for name, one in paper.items() if not one["differs"]}
    checkpoint = f", {run['checkpoint']} (step {run['step']})" if "subject" in run else f", step {run['step']}"
    title = f"{run.get('subject') or run.get('dataset')}: {run['method']} on {run['base_model']}{checkpoint}"
    table = Table(title=title, title_justify="left")
    table.add_column("score")
    headers = ["mean", "95% interval", "images", *others, *(["real images"] if has_baselines else [])]
    for header in [*headers, *([f"the paper's {run['method']}"] if comparable else [])]:
        table.add_column(header, justify="right")
    for name, one in result["scores"].items():
        if name in baselines:
            continue
        row = [name, f"{one['mean']:.4f}", interval_text(one["low"], one["high"]), str(one["n"])]
        row += [_mean(found["scores"].get(name)) for found in others.values()]
        if has_baselines:
            row.append(_mean(result["scores"].get(METRICS[name].baseline or "")) if name in METRICS else "")
        if comparable:
            row.append(f"{comparable[name]:.3f}" if name in comparable else "")
        table.add_row(*row)
    lines = [*notes(result, "the run"), *(line for whose, found in others.items() for line in notes(found, whose))]
    lines.append(_interval_note(result["scores"]))
    if comparable:
        lines.append(f"the paper's: {result['paper']['scope']}")
    return Group(table, *lines)


def notes(result: Mapping[str, Any], whose: str) -> list[str]:
    """Return a line for each kind of image or prompt that is left out, and for each missing score."""
    lines = []
    for reason, found in result["left_out"].items():
        if found:
            first = ", ".join(str(value) for value in found[0].values())
            lines.append(f"{whose}: left out, {reason.replace('_', ' ')}: {len(found)} (the first: {first})")
    return lines + [f"{whose}: no {name}: {why}" for name, why in result["not_scored"].items()]


def _interval_note(scores: Mapping[str, Any]) -> str:
    units = {name: one["interval"]["over"] for name, one in scores.items() if one["low"] is not None}
    plain = sorted({unit for name, unit in units.items() if metric_of(name).compares != "sets"})
    found = f"how the score would move with other {' or '.join(plain)}" if plain else ""
    blocks = "FID's with blocks of images left out in turn" if len(units) and "fid" in units else ""
    return f"intervals: {'; '.join(filter(None, [found, blocks]))}" if units else "no intervals"


def _mean(one: Mapping[str, Any] | None) -> str:
    return "" if one is None else f"{one['mean']:.4f}"


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Record how long a stage takes."""
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 3)


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turn out-of-memory errors into a RunError that says what would help."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunError("out of memory: try again with a smaller --batch-size (and --overwrite), or --device cpu") from error
