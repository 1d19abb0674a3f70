"""Whether `etherdiff eval` will be able to score a run with the file's options, asked before the run is made."""

import re
from collections.abc import Callable, Hashable
from typing import Any

from etherdiff.config import (
    ControlEvalOptions,
    DreamBoothConfig,
    EvalOptions,
    PerturbConfig,
    RunConfig,
    S2IConfig,
    SubjectEvalOptions,
)
from etherdiff.control.datasets import ControlDataset
from etherdiff.eval.functional import fid_problem
from etherdiff.eval.judges import asked_metrics, find_networks, option_problems
from etherdiff.system.errors import UserError
from etherdiff.tasks.control_sets import choose_pairs
from etherdiff.tasks.subject_sets import find_texts


class ScoringCheck:
    """Called with each run's resolved configuration and plan; networks, the same for many runs, are looked for once."""

    def __init__(self, scoring: EvalOptions | None) -> None:
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

    def _of_subject(self, options: SubjectEvalOptions, config: DreamBoothConfig | PerturbConfig, plan: Any) -> list[str]:
        if found := option_problems(options):
            return found
        found = checkpoint_problems(options.checkpoint, config)
        try:
            texts = find_texts(config, options)
        except UserError as error:
            return found + error.problems
        drawn = len(texts) * options.num
        if "fid" in asked_metrics(options) and isinstance(config, DreamBoothConfig) and len(plan.images) != drawn:
            found.append(f"fid: {fid_problem(len(plan.images), drawn, 0)}")
        return found + self._once(config.base == "tiny", lambda: find_networks(config.base, options))

    def _of_control(self, options: ControlEvalOptions, config: S2IConfig, dataset: ControlDataset) -> list[str]:
        signal, key = dataset.signal, (config.base == "tiny", dataset.name, config.palette)
        wrong = option_problems(options, signal.name)
        found = wrong + _problems(lambda: choose_pairs(dataset, options))
        return found + ([] if wrong else self._once(key, lambda: find_networks(config.base, options, signal)))

    def _once(self, key: Hashable, find: Callable[[], object]) -> list[str]:
        if key not in self.networks:
            self.networks[key] = _problems(find)
        return self.networks[key]


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
    return []
