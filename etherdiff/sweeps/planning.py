"""Plan the runs of a sweep file: everything that any run needs is checked before the first one starts."""

import hashlib
import json
import re
import tempfile
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etherdiff.config import (
    SWEEP_OWN_KEYS,
    TASK_CONFIGS,
    ControlEvalOptions,
    DreamBoothConfig,
    EvalOptions,
    PerturbConfig,
    RunConfig,
    S2IConfig,
    SubjectEvalOptions,
    TrainConfig,
    load_run_config,
)
from etherdiff.control.datasets import ControlDataset
from etherdiff.eval.best import find_scorer
from etherdiff.eval.functional import fid_problem
from etherdiff.eval.judges import asked_metrics, find_networks, option_problems
from etherdiff.runs.folder import RunFolder, write_settings
from etherdiff.sweeps.runs import SweepRun, Unit
from etherdiff.sweeps.spec import PREVIOUS, Sweep, Variant
from etherdiff.system.errors import Problems, UserError
from etherdiff.system.terminal import console
from etherdiff.tasks import plan_training
from etherdiff.tasks.control_sets import choose_pairs
from etherdiff.tasks.perturb import plan_perturbation
from etherdiff.tasks.subject_sets import find_texts


def plan_units(sweep: Sweep, output: Path, for_now: bool = True) -> list[Unit]:
    """Return the units of a sweep, every run resolved. Raise one UserError with all mistakes of all runs.

    output: the sweep's folder, absolute. for_now: whether the runs start here, which needs the base's weights.
    """
    problems, check = Problems(), EvalCheck(sweep.scoring)
    units, labels = [], dict[str, str]()
    with _silence():
        for variants in sweep.units:
            runs: list[SweepRun] = []
            for variant in variants:
                previous = runs[-1] if runs else None
                run = problems.of(variant.label).attempt(_plan, sweep, variant, previous, output, check, for_now).value
                if run is None:
                    break  # what builds on it cannot be planned
                content = json.dumps(run.config, sort_keys=True)
                if content in labels:
                    problems.add(f"{labels[content]} and {variant.label} are the same run: leave one out")
                labels[content] = variant.label
                runs.append(run)
            units.append(Unit(tuple(runs), sweep.resources.cpus, sweep.resources.gpus))
    problems.raise_if_any(f"{sweep.path}: ", sweep.size)
    return units


def _plan(
    sweep: Sweep, variant: Variant, previous: SweepRun | None, output: Path, check: "EvalCheck", for_now: bool
) -> SweepRun:
    config = variant.config.model_copy(update={"output": output / "runs" / variant.label})
    if isinstance(config, TrainConfig):
        config = config.model_copy(update={"dry_run": not for_now})
    stands_for = "" if previous is None else str(previous.folder)
    with _stand_in(previous) as folder:
        try:
            resolved, data = _resolve(_with_previous(config, folder))
        except UserError as error:
            raise UserError(
                [problem.replace(folder, stands_for) if folder else problem for problem in error.problems]
            ) from None
    check(resolved, data)
    content = resolved.model_dump(mode="json", exclude=set(SWEEP_OWN_KEYS))
    # Without defaults: a new option of a later version must not change names. The previous run stands here by its name:
    # moving the sweep's folder must not change names either.
    identifying = resolved.model_dump(mode="json", exclude=set(SWEEP_OWN_KEYS), exclude_defaults=True)
    hashed = json.dumps(_replaced(identifying, folder, previous.name if previous else ""), sort_keys=True)
    name = f"{variant.label}-{hashlib.sha256(hashed.encode()).hexdigest()[:8]}"
    return SweepRun(name, output, sweep.task, _replaced(content, folder, stands_for), sweep.scoring)


def _resolve(config: RunConfig) -> tuple[RunConfig, Any]:
    """Fill in every default; return the configuration and its plan. UserError with everything that is wrong."""
    if isinstance(config, PerturbConfig):
        perturbation = plan_perturbation(config)
        return perturbation.config, perturbation
    assert isinstance(config, DreamBoothConfig | S2IConfig)
    plan = plan_training(config, find_scorer=find_scorer).plan
    return plan.config, plan


def _with_previous(config: RunConfig, folder: str) -> RunConfig:
    """Return the configuration with a folder in place of `PREVIOUS`."""
    values = {name: getattr(config, name) for name in type(config).model_fields}
    named = {name: value for name, value in values.items() if isinstance(value, str | Path) and PREVIOUS in str(value)}
    return config.model_copy(update={name: type(v)(str(v).replace(PREVIOUS, folder)) for name, v in named.items()})


@contextmanager
def _stand_in(run: SweepRun | None) -> Iterator[str]:
    """Make a folder to plan upon as if the run were finished: it has the settings and empty results."""
    if run is None:
        yield ""
        return
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place) / "previous")
        folder.path.mkdir()
        write_settings(folder, run.task, load_run_config(TASK_CONFIGS[run.task], run.config), {})
        for result in run.results:
            (folder.path / result.name).mkdir()
        yield str(folder.path)


def _replaced(content: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {name: _with(value, old, new) if isinstance(value, str) else value for name, value in content.items()}


def _with(text: str, old: str, new: str) -> str:
    return text.replace(old, new) if old else text


@contextmanager
def _silence() -> Iterator[None]:
    """Print no warnings: they belong to the runs' own logs, and would come here once per run."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


# --- Whether runs can be scored --------------------------------------------------------------------------------------


class EvalCheck:
    """Checks before a run is made whether `etherdiff eval` can score it. Networks that many runs share are found once."""

    def __init__(self, options: EvalOptions | None) -> None:
        """Take the scoring options; None where runs are not scored."""
        self.options = options
        self.networks: dict[Hashable, list[str]] = {}

    def __call__(self, config: RunConfig, plan: Any) -> None:
        """Raise UserError with everything that is wrong with scoring a run of this resolved configuration and plan."""
        problems = Problems("eval: ")
        if isinstance(self.options, SubjectEvalOptions):
            assert isinstance(config, DreamBoothConfig | PerturbConfig)
            self._check_subject(problems, self.options, config, plan)
        elif isinstance(self.options, ControlEvalOptions):
            assert isinstance(config, S2IConfig)
            self._check_control(problems, self.options, config, plan.dataset)
        problems.raise_if_any()

    def _check_subject(
        self, problems: Problems, options: SubjectEvalOptions, config: DreamBoothConfig | PerturbConfig, plan: Any
    ) -> None:
        if wrong := option_problems(options):
            problems.add(*wrong)
            return
        problems.add(*checkpoint_problems(options.checkpoint, config))
        texts = problems.attempt(find_texts, config, options)
        if texts.value is None:
            return
        drawn = len(texts.value) * options.num
        if "fid" in asked_metrics(options) and isinstance(config, DreamBoothConfig) and len(plan.subject.images) != drawn:
            problems.add(f"fid: {fid_problem(len(plan.subject.images), drawn, 0)}")
        problems.add(*self._network_problems(config.base == "tiny", config.base, options))

    def _check_control(
        self, problems: Problems, options: ControlEvalOptions, config: S2IConfig, dataset: ControlDataset
    ) -> None:
        wrong = option_problems(options, dataset.signal.name)
        problems.add(*wrong)
        problems.attempt(choose_pairs, dataset, options)
        if not wrong:
            key = (config.base == "tiny", dataset.name, config.palette)
            problems.add(*self._network_problems(key, config.base, options, dataset.signal))

    def _network_problems(self, key: Hashable, *wanted: Any) -> list[str]:
        if key not in self.networks:
            problems = Problems()
            problems.attempt(find_networks, *wanted)
            self.networks[key] = problems.found
        return self.networks[key]


def checkpoint_problems(name: str, config: DreamBoothConfig | PerturbConfig) -> list[str]:
    """List why a run of this configuration will have no such checkpoint."""
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
