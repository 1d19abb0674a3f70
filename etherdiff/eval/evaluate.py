"""`etherdiff eval`: draw the protocol's images with a run's adapter and with its base, score both, write metrics.json."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from rich.console import Group
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file

from etherdiff.adapters.io import load_adapter, read_adapter
from etherdiff.adapters.methods import add_adapter
from etherdiff.config import DreamBoothConfig, PerturbConfig, RunConfig, SubjectConfig, TrainConfig
from etherdiff.eval.functional import fid_problem
from etherdiff.eval.intervals import interval_text
from etherdiff.eval.metrics import HELD_OUT, METRICS, PROMPT_METRICS, SUBJECT_METRICS
from etherdiff.eval.networks import PRESETS, ROLES, Backbone, choose_preset, find_backbones, versions_of
from etherdiff.eval.paper import PAPER_SCOPE, differs_from_paper, paper_value
from etherdiff.eval.protocol import (
    BASE_IMAGES,
    IMAGES,
    ROUNDING,
    Batch,
    Protocol,
    batches,
    draw,
    found_images,
    read_sets,
    why_not_these,
    write_set,
)
from etherdiff.eval.scores import PromptForm, Scoring, score_images
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import Base, fingerprint, load_base, make_pipeline
from etherdiff.images.reading import read_images
from etherdiff.runs.folder import RunFolder, check_result
from etherdiff.runs.run import Run
from etherdiff.system.devices import device_problem, resolve_device
from etherdiff.system.errors import Problems, RunError, UserError
from etherdiff.system.files import digest, file_hash, remove_temporary, write_json
from etherdiff.system.locks import run_lock
from etherdiff.system.terminal import warn
from etherdiff.tasks.planning import method_options
from etherdiff.tasks.subjects import Subject, find_subject, make_prompts, pixels_digest, prompts_for, read_prompts
from etherdiff.train.checkpoint import checkpoint_path

SD1_TEXT_WIDTH = 768
PAPER_PROMPTS, PAPER_SEEDS = 25, 4


@dataclass(frozen=True)
class EvalOptions:
    """How to judge a run; sizes in images."""

    prompts: Path | None = None
    """A file with a prompt per line instead of DreamBooth's 25."""
    num: int = 4
    """Images per prompt."""
    seed: int = 0
    """Of the first image of a prompt; the next ones count up."""
    steps: int = 25
    batch_size: int = 4
    device: str = "auto"
    metrics: tuple[str, ...] = SUBJECT_METRICS
    preset: str | None = None
    """Networks to score by, of `PRESETS`; None: tiny for the tiny base, else paper."""
    backbones: tuple[str, ...] = ()
    """ROLE=NAME, each: another network than the preset's."""
    clip_t_prompt: PromptForm = "with identifier"
    checkpoint: str = "last"
    """last: the run's result; best; or step-N."""
    base: bool = True
    """Whether the base is drawn and scored beside."""
    overwrite: bool = False

    def problems(self) -> list[str]:
        """Everything wrong with the options by themselves, one sentence each."""
        counts = {"num": self.num, "steps": self.steps, "batch_size": self.batch_size}
        found = drawing_problems(counts, self.seed, self.device)
        there = ", ".join(PROMPT_METRICS)
        if not self.metrics:
            found.append(f"metrics: none is asked for; there are {there}")
        found += [f"metric {name!r}: there are {there}" for name in self.metrics if name not in PROMPT_METRICS]
        return found + network_problems(self.preset, PRESETS, self.backbones, ROLES)

    @property
    def named_backbones(self) -> dict[str, str]:
        """Role -> another network than the preset's."""
        return by_role(self.backbones)


def drawing_problems(counts: Mapping[str, int | None], seed: int, device: str) -> list[str]:
    """What is wrong with how many images are drawn (None: all), from which seed and where."""
    found = [f"{name}: must be at least 1, not {value}" for name, value in counts.items() if value is not None and value < 1]
    if seed < 0:
        found.append(f"seed: must be at least 0, not {seed}")
    if wrong_device := device_problem(device):
        found.append(wrong_device)
    return found


def network_problems(preset: str | None, presets: Iterable[str], backbones: Sequence[str], roles: Sequence[str]) -> list[str]:
    """What is wrong with the networks named to score by."""
    found = []
    if preset is not None and preset not in presets:
        found.append(f"preset {preset!r}: there are {', '.join(presets)}")
    for text in backbones:
        role, _, name = text.partition("=")
        if role not in roles or not name:
            found.append(f"backbone {text!r}: write it as ROLE=NAME, with ROLE of {', '.join(roles)}")
    return found


def by_role(backbones: Iterable[str]) -> dict[str, str]:
    """Role -> name, of networks given as ROLE=NAME."""
    return {role: name for role, _, name in (text.partition("=") for text in backbones)}


@dataclass(frozen=True)
class Trained:
    """What of a run is judged."""

    name: str
    """last, best or step-N."""
    step: int
    sha256: str
    """Of its weights and, where it has one, its configuration."""
    put_on: Callable[[UNet2DConditionModel], Any]
    """Puts it on the base's UNet, in place."""


@dataclass(frozen=True)
class Plan:
    """An evaluation that can start."""

    run: RunFolder
    config: DreamBoothConfig | PerturbConfig
    provenance: dict[str, Any]
    options: EvalOptions
    base: Base
    subject: Subject
    trained: Trained
    protocol: Protocol
    scoring: Scoring
    backbones: dict[str, Backbone]

    @property
    def folder(self) -> Path:
        return self.run.eval

    @property
    def fingerprint(self) -> dict[str, str]:
        """Of the base that the run was trained on."""
        return dict(self.provenance.get("base", {}).get("fingerprint", {}))

    def set_settings(self, name: str) -> dict[str, Any]:
        """What decides the images of a set, and how they are computed."""
        drawn = {"adapter": self.trained.sha256 if name == IMAGES else None, "base": self.fingerprint}
        facts = {"device": resolve_device(self.options.device), "batch_size": self.protocol.batch_size}
        return {**self.protocol.settings(), **drawn, ROUNDING: facts | drawing_versions()}


def evaluate(path: Path, options: EvalOptions) -> dict[str, Any]:
    """Judge a run; returns the content of RUN/eval/metrics.json, which is written whole or not at all.

    Raises:
        UserError: everything that is wrong, before anything is drawn.
        RunError: not enough memory.
    """
    plan = plan_evaluation(path, options)
    seconds: dict[str, float] = {}
    with run_lock(plan.folder), enough_memory():
        remove_temporary(plan.folder, also_of_live_processes=True)
        claim_sets(plan)
        draw_missing(plan, seconds)
        with timed(seconds, "score"):
            result = score(plan)
        write_json(plan.folder / "metrics.json", result, allow_nan=False)
        write_json(plan.folder / "cost.json", {"seconds": seconds})
    return result


def plan_evaluation(path: Path, options: EvalOptions) -> Plan:
    """Check the run, its subject, its base, the options and the networks. Raises one UserError with everything."""
    run, config, provenance = read_run(path)
    problems = Problems()
    problems.add(*options.problems())
    trained = problems.attempt(lambda: find_trained(run, config, options.checkpoint)).value
    base = problems.attempt(lambda: find_base(config.base, config.prediction_type, "configs")).value
    subject = problems.attempt(lambda: find_subject(config.subject, config.data_root)).value
    texts = problems.attempt(lambda: prompt_texts(config, options)).value
    if subject is not None:
        problems.attempt(lambda: refuse_other_images(run, config, provenance, subject))
    scoring = Scoring(
        metrics=options.metrics,
        preset=choose_preset(config.base, options.preset),
        backbones=options.named_backbones,
        clip_t_prompt=options.clip_t_prompt,
        device=options.device,
    )
    if subject and texts and "fid" in options.metrics and len(subject.images) != len(texts) * options.num:
        problems.add(f"fid: {fid_problem(len(subject.images), len(texts) * options.num, 0)}")
    backbones = None
    if not options.problems():
        backbones = problems.attempt(
            lambda: find_backbones(scoring.roles, scoring.preset, scoring.backbones, scoring.device)
        ).value
    problems.raise_if_any()
    assert trained is not None
    assert base is not None
    assert subject is not None
    assert texts is not None
    assert backbones is not None
    prompts = make_prompts(texts, config.identifier, str(config.class_noun))
    if unmarked := [prompt.text for prompt in prompts if prompt.text == prompt.plain]:
        warn(f"{len(unmarked)} prompts do not hold the identifier {config.identifier!r}, for instance {unmarked[0]!r}")
    protocol = Protocol(
        prompts,
        tuple(range(options.seed, options.seed + options.num)),
        base.resolution,
        options.steps,
        batch_size=options.batch_size,
    )
    return Plan(run, config, provenance, options, base, subject, trained, protocol, scoring, backbones)


def read_run(path: Path) -> tuple[RunFolder, DreamBoothConfig | PerturbConfig, dict[str, Any]]:
    """A subject-driven run. UserError where it is none."""
    run = Run.open(path)
    if not isinstance(run.config, DreamBoothConfig | PerturbConfig):
        raise UserError(f"{path} is a run of train-s2i: it is judged by its controls, not by a subject")
    return run.folder, run.config, run.provenance.content()


def refuse_other_images(run: RunFolder, config: SubjectConfig, provenance: Mapping[str, Any], subject: Subject) -> None:
    """UserError where the subject's images are not those that the run was trained on, if it recorded that."""
    recorded = provenance.get("images")
    if recorded is None or not isinstance(config, DreamBoothConfig):
        return
    if pixels_digest(read_images(subject.images, config.skip_bad)) != recorded:
        raise UserError(f"{run.path} was trained on other images than {config.subject} holds now: put them back")


def prompt_texts(config: SubjectConfig, options: EvalOptions) -> Sequence[str]:
    """The prompts, with the identifier or its place."""
    if options.prompts is None:
        return prompts_for(str(config.class_noun), tiny=config.base == "tiny")
    texts = read_prompts(options.prompts)
    if not texts:
        raise UserError(f"prompts: {options.prompts} holds none; write one per line, with {config.identifier!r} in it")
    return texts


# --- What is judged --------------------------------------------------------------------------------------------------


def find_trained(run: RunFolder, config: RunConfig, name: str) -> Trained:
    """The run's result, its best adapter or a checkpoint. UserError where it is not there or damaged."""
    if name == "last":
        if not run.adapter.is_dir():
            steps = ", ".join(path.name for path in sorted(run.checkpoints.glob("step-*"))) or "none"
            raise UserError(
                f"{run.path} has no adapter yet: the run has not finished. Go on with etherdiff resume {run.path}, or judge a "
                f"checkpoint with --checkpoint step-N (there are: {steps})"
            )
        check_result(run, run.adapter)
        return _from_folder(run.adapter, name, config.steps)
    if isinstance(config, PerturbConfig):
        raise UserError(f"checkpoint: {run.path} was made by etherdiff perturb: there is only its last")
    if name == "best":
        return _from_folder(run.best, name, read_best_step(run))
    number = re.fullmatch(r"step-(\d{1,9})", name)
    if number is None:
        raise UserError(f"checkpoint: must be last, best or step-N, not {name!r}")
    return _from_checkpoint(run, config, int(number[1]))


def read_best_step(run: RunFolder) -> int:
    """The step of best/. UserError where there is none."""
    path = run.best / "best.json"
    if not path.is_file():
        raise UserError(f"{run.path} has no best/: it was trained without scores along the way (--eval-scores on)")
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r})") from error


def _from_folder(folder: Path, name: str, step: int) -> Trained:
    saved = read_adapter(folder)
    hashes = {path.name: file_hash(path) for path in sorted(saved.folder.glob("adapter_*"))}
    return Trained(name, step, digest(hashes), lambda unet: load_adapter(unet, saved.folder))


def _from_checkpoint(run: RunFolder, config: TrainConfig, step: int) -> Trained:
    """A checkpoint's weights: their average where the run keeps one, as in its result."""
    path = checkpoint_path(run.checkpoints, step)
    if not path.is_dir():
        there = ", ".join(found.name for found in sorted(run.checkpoints.glob("step-*"))) or "none"
        raise UserError(f"checkpoint: {run.path} has no step-{step} (there are: {there})")
    weights = path / ("ema.safetensors" if config.ema_decay else "parameters.safetensors")
    try:
        recorded = json.loads((path / "manifest.json").read_text(encoding="utf-8"))[weights.name]
        sha256 = file_hash(weights)
        tensors = load_file(weights)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"checkpoint: {path} cannot be read ({error!r}): choose another") from error
    if sha256 != recorded:
        raise UserError(f"checkpoint: {weights} is not what was written: choose another")

    def put_on(unet: UNet2DConditionModel) -> None:
        add_adapter(unet, config.method, method_options(config), config.seed)
        own = {f"unet.{name}": parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
        if own.keys() != tensors.keys():
            raise UserError(f"checkpoint: {path} holds other parameters than this run trains")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
        unet.requires_grad_(False).eval()

    return Trained(f"step-{step}", step, sha256, put_on)


# --- Images ----------------------------------------------------------------------------------------------------------


def claim_sets(plan: Plan) -> None:
    """Take up the images that are there, or remove them where they are to be overwritten. UserError where neither may be."""
    problems, stale = [], []
    for name in set_names(plan):
        settings = plan.set_settings(name)
        complete = not unfinished(plan, name)
        if found := why_not_these(plan.folder, name, settings, complete):
            problems += found
            stale.append(name)
    if problems and not plan.options.overwrite:
        raise UserError(problems)
    for name in stale:
        shutil.rmtree(plan.folder / name)


def set_names(plan: Plan) -> tuple[str, ...]:
    """The sets of images that are drawn."""
    return (BASE_IMAGES, IMAGES) if plan.options.base else (IMAGES,)


def unfinished(plan: Plan, name: str) -> list[Batch]:
    """The batches of a set that lack an image."""
    return [batch for batch in batches(plan.protocol, plan.folder / name, name == BASE_IMAGES) if batch.missing()]


def draw_missing(plan: Plan, seconds: dict[str, float]) -> None:
    """Draw what is missing, the base's first: the adapter then goes on the same UNet."""
    todo = {name: found for name in set_names(plan) if (found := unfinished(plan, name))}
    if not todo:
        return
    with timed(seconds, "load"):
        base = find_base(plan.config.base, plan.config.prediction_type)
        refuse_other_base(plan, base)
        model = load_base(base)
    pipeline = make_pipeline(model).to(resolve_device(plan.options.device))
    for name, found in todo.items():
        if name == IMAGES:
            plan.trained.put_on(model.unet)
            model.unet.to(pipeline.device)
        write_set(plan.folder, name, plan.set_settings(name))
        facts = {"model": plan.config.base, "adapter_sha256": plan.trained.sha256 if name == IMAGES else None}
        with timed(seconds, name):
            draw(pipeline, found, plan.protocol, facts, "drawing" if name == IMAGES else "drawing the base")


def refuse_other_base(plan: Plan, base: Base) -> None:
    """UserError where the base is not what the run was trained on: the images would be another model's."""
    now = fingerprint(base)
    changed = sorted(name for name in plan.fingerprint if plan.fingerprint[name] != now.get(name))
    if changed:
        raise UserError(f"{plan.run.path} was trained on other weights than {base.name} holds now: {', '.join(changed)}")


def drawing_versions() -> dict[str, str]:
    """Of the libraries that images are drawn with."""
    return {name: found for name, found in versions_of("diffusers", "transformers").items() if name != "pillow"}


# --- Scores ----------------------------------------------------------------------------------------------------------


def score(plan: Plan) -> dict[str, Any]:
    """The content of metrics.json: the run's scores, the base's under "base", what was judged under "run"."""
    base = score_set(plan, BASE_IMAGES) if plan.options.base else None
    result = score_set(plan, IMAGES)
    return {
        **result,
        "base": base,
        "run": {
            "name": plan.run.path.resolve().name,
            "subject": plan.subject.name,
            "class_noun": plan.config.class_noun,
            "identifier": plan.config.identifier,
            "method": plan.config.method,
            "base_model": plan.config.base,
            "base_fingerprint": plan.fingerprint,
            "checkpoint": plan.trained.name,
            "step": plan.trained.step,
            "adapter_sha256": plan.trained.sha256,
        },
        "paper": beside_the_paper(plan, result["scores"]),
        "drawn": {name: drawn_with(plan, name) for name in set_names(plan)},
    }


def score_set(plan: Plan, name: str) -> dict[str, Any]:
    """The scores of one set of images; what they are said to show is the same for both sets."""
    drawn_from = "prompts without identifier" if name == BASE_IMAGES else "prompts with identifier"
    versions = {key: drawn_with(plan, name).get(key) for key in drawing_versions()}
    generation = {**plan.protocol.generation(), "drawn_from": drawn_from, "versions": versions}
    prompts = found_images(plan.protocol, plan.folder / name, name == BASE_IMAGES)
    return score_images(plan.subject.images, plan.subject.held_out, prompts, plan.scoring, generation, loaded=plan.backbones)


def drawn_with(plan: Plan, name: str) -> dict[str, Any]:
    """Device, batch size and versions that a set's images were drawn with, which need not be today's."""
    return dict(read_sets(plan.folder)[name][ROUNDING])


def beside_the_paper(plan: Plan, scores: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's numbers for the method, and for each why it must not stand beside ours; empty where it may."""
    protocol, found = plan.protocol, {}
    apart = []
    if isinstance(plan.config, PerturbConfig):
        apart.append("the transformation is random, not trained")
    if plan.base.config("unet").get("cross_attention_dim") != SD1_TEXT_WIDTH:
        apart.append("the base is not Stable Diffusion 1.5")
    if plan.options.prompts is not None or len(protocol.seeds) != PAPER_SEEDS:
        apart.append(f"not {PAPER_SEEDS} images of each of DreamBooth's {PAPER_PROMPTS} prompts")
    if protocol.steps != Protocol.steps:
        apart.append(f"{protocol.steps} denoising steps")
    for name, one in scores.items():
        value = paper_value(name, plan.config.method)
        if value is not None:
            found[name] = {"value": value, "differs": apart + differs_from_paper(name, one["identity"])}
    return {"method": plan.config.method, "scope": PAPER_SCOPE, "scores": found}


# --- What a person reads ---------------------------------------------------------------------------------------------


def render(result: Mapping[str, Any]) -> Group:
    """The scores as a table, and below it what was left out and what no number stands for."""
    run, base, paper = result["run"], result["base"], result["paper"]["scores"]
    shown_paper = {name: one["value"] for name, one in paper.items() if not one["differs"]}
    title = f"{run['subject']}: {run['method']} on {run['base_model']}, {run['checkpoint']} (step {run['step']})"
    table = Table(title=title, title_justify="left")
    table.add_column("score")
    for header in ("mean", "95% interval", "images", *(["the base"] if base else []), "real images"):
        table.add_column(header, justify="right")
    if shown_paper:
        table.add_column(f"the paper's {run['method']}", justify="right")
    for name, one in result["scores"].items():
        if METRICS[name.removesuffix(HELD_OUT)].compares == "real x other real":
            continue
        row = [name, f"{one['mean']:.4f}", interval_text(one["low"], one["high"]), str(one["n"])]
        if base:
            row.append(_mean(base["scores"].get(name)))
        row.append(_mean(result["scores"].get(METRICS[name].baseline)) if name in METRICS else "")
        if shown_paper:
            row.append(f"{shown_paper[name]:.3f}" if name in shown_paper else "")
        table.add_row(*row)
    lines = [*notes(result, "the run"), *(notes(base, "the base") if base else [])]
    units = sorted({one["interval"]["over"] for one in result["scores"].values() if one["low"] is not None})
    lines.append(f"intervals: how the score would move with other {' or '.join(units)}" if units else "no intervals")
    if shown_paper:
        lines.append(f"the paper's: {result['paper']['scope']}")
    return Group(table, *lines)


def notes(result: Mapping[str, Any], whose: str) -> list[str]:
    """A line for each kind of image or prompt that is in no score, or not in all, and for each score that there is not."""
    lines = []
    for reason, found in result["left_out"].items():
        if found:
            first = ", ".join(str(value) for value in found[0].values())
            lines.append(f"{whose}: left out, {reason.replace('_', ' ')}: {len(found)} (the first: {first})")
    return lines + [f"{whose}: no {name}: {why}" for name, why in result["not_scored"].items()]


def _mean(one: Mapping[str, Any] | None) -> str:
    return "" if one is None else f"{one['mean']:.4f}"


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long a stage took."""
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 3)


@contextmanager
def enough_memory() -> Iterator[None]:
    """RunError, with what would do, where there is not."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunError("out of memory: try again with a smaller --batch-size (and --overwrite), or --device cpu") from error
