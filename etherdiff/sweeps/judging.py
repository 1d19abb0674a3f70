"""Whether `etherdiff eval` will be able to score a run with the file's options, asked before the run is made."""

import re
from collections.abc import Callable, Hashable
from typing import Any

from etherdiff import config as c
from etherdiff.config import ControlEvalOptions, DreamBoothConfig, PerturbConfig, RunConfig, S2IConfig, SubjectEvalOptions
from etherdiff.control.datasets import ControlDataset
from etherdiff.eval.evaluate import EvalOptions, prompt_texts
from etherdiff.eval.evaluate_control import ControlOptions, choose_pairs
from etherdiff.eval.functional import fid_problem
from etherdiff.eval.metrics import CONTROL_METRICS
from etherdiff.eval.networks import choose_preset, find_backbones
from etherdiff.eval.readback import NotReadable, find_readback
from etherdiff.eval.scores import Scoring as SubjectScores
from etherdiff.system.devices import resolve_device
from etherdiff.system.errors import UserError


class ScoringCheck:
    """Called with each run's resolved configuration and plan; networks, the same for many runs, are looked for once."""

    def __init__(self, scoring: c.EvalOptions | None) -> None:
        self.scoring = scoring
        self.networks: dict[Hashable, list[str]] = {}

    def __call__(self, config: RunConfig, plan: Any) -> None:
        """UserError with everything that scoring will stumble over."""
        if isinstance(self.scoring, SubjectEvalOptions):
            assert isinstance(config, DreamBoothConfig | PerturbConfig)
            problems = self._of_subject(self.scoring, config, plan)
        elif isinstance(self.scoring, ControlEvalOptions):
            assert isinstance(config, S2IConfig)
            problems = self._of_control(self.scoring, config, plan.dataset)
        else:
            return
        if problems:
            raise UserError([f"eval: {problem}" for problem in problems])

    def _of_subject(self, scoring: SubjectEvalOptions, config: DreamBoothConfig | PerturbConfig, plan: Any) -> list[str]:
        options = subject_options(scoring)
        if found := options.problems():
            return found
        found = checkpoint_problems(options.checkpoint, config)
        try:
            texts = prompt_texts(config, options)  # type: ignore[arg-type,unused-ignore]
        except UserError as error:
            return found + error.problems
        drawn = len(texts) * options.num
        if "fid" in options.metrics and isinstance(config, DreamBoothConfig) and len(plan.images) != drawn:
            found.append(f"fid: {fid_problem(len(plan.images), drawn, 0)}")
        preset = choose_preset(config.base, options.preset)
        roles = SubjectScores(metrics=options.metrics).roles
        return found + self._once(preset, lambda: find_backbones(roles, preset, options.named_backbones, options.device))

    def _of_control(self, scoring: ControlEvalOptions, config: S2IConfig, dataset: ControlDataset) -> list[str]:
        options = control_options(scoring)
        if found := options.problems():
            return found
        there = CONTROL_METRICS[dataset.signal.name]
        metrics = options.metrics if options.metrics is not None else there
        found = [
            f"metric {name!r}: of {dataset.signal.name} there are {', '.join(there)}" for name in metrics if name not in there
        ]
        if not metrics:
            found.append(f"metrics: none is asked for; there are {', '.join(there)}")
        found += _problems(lambda: choose_pairs(dataset, options))
        preset = choose_preset(config.base, options.preset)

        def find_networks() -> None:
            named = options.named_backbones
            if "fid" in metrics:
                find_backbones(["fid"], preset, {role: name for role, name in named.items() if role == "fid"}, options.device)
            if set(metrics) - {"fid"}:
                find_readback(dataset.signal, named, preset, resolve_device(options.device))

        return found + self._once((preset, dataset.name, config.palette), find_networks)

    def _once(self, key: Hashable, find: Callable[[], object]) -> list[str]:
        if key not in self.networks:
            self.networks[key] = _problems(find)
        return self.networks[key]


def subject_options(options: SubjectEvalOptions) -> EvalOptions:
    """As `evaluate` takes them."""
    found = options.model_dump(exclude={"plain_clip_t", "backbone", "metrics"})
    found |= {} if options.metrics is None else {"metrics": options.metrics}
    form = "without identifier" if options.plain_clip_t else "with identifier"
    return EvalOptions(backbones=options.backbone, clip_t_prompt=form, **found)


def control_options(options: ControlEvalOptions) -> ControlOptions:
    """As `evaluate_control` takes them."""
    return ControlOptions(backbones=options.backbone, **options.model_dump(exclude={"backbone"}))


def checkpoint_problems(name: str, config: DreamBoothConfig | PerturbConfig) -> list[str]:
    """Why a run of this configuration will have no such checkpoint."""
    if name == "last":
        return []
    if isinstance(config, PerturbConfig):
        return [f"checkpoint: etherdiff perturb writes only its last, not {name!r}"]
    if name == "best":
        wrong = config.eval_scores == "off"
        return ["checkpoint: there is no best where nothing scores along the way (eval_scores: on)"] if wrong else []
    number = re.fullmatch(r"step-(\d{1,9})", name)
    if number is None:
        return [f"checkpoint: must be last, best or step-N, not {name!r}"]
    step = int(number[1])
    if 0 < step <= config.steps and (step % config.checkpoint_every == 0 or step == config.steps):
        return []
    return [f"checkpoint: {config.steps} steps with one every {config.checkpoint_every} have no {name}"]


def _problems(action: Callable[[], object]) -> list[str]:
    try:
        action()
    except UserError as error:
        return error.problems
    except NotReadable:  # its scores are then left out, as eval says
        return []
    return []
