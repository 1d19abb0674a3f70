"""From a sweep file to its runs: everything that any of them needs is looked for before the first one starts."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etherdiff.config import (
    SWEEP_OWN_KEYS,
    TASK_CONFIGS,
    DreamBoothConfig,
    PerturbConfig,
    RunConfig,
    S2IConfig,
    TrainConfig,
    load_run_config,
)
from etherdiff.eval.best import find_scorer
from etherdiff.runs.folder import RunFolder, write_settings
from etherdiff.sweeps.judging import ScoringCheck
from etherdiff.sweeps.runs import SweepRun, Unit
from etherdiff.sweeps.spec import PREVIOUS, Sweep, Variant
from etherdiff.system.errors import Problems, UserError
from etherdiff.system.terminal import console
from etherdiff.tasks import plan_training
from etherdiff.tasks.perturb import plan_perturbation


def plan_units(sweep: Sweep, output: Path, for_now: bool = True) -> list[Unit]:
    """The units of a sweep, every run resolved. Raises one UserError with everything that is wrong with any of them.

    output: the sweep's folder, absolute. for_now: whether the runs are to start here, which takes the base's weights.
    """
    problems, check = Problems(), ScoringCheck(sweep.scoring)
    units, labels = [], dict[str, str]()
    with _silence():
        for variants in sweep.units:
            runs: list[SweepRun] = []
            for variant in variants:
                previous = runs[-1] if runs else None
                run = problems.of(variant.label).attempt(_plan, sweep, variant, previous, output, check, for_now).value
                if run is None:
                    break  # what builds on it cannot be planned
                told = json.dumps(run.config, sort_keys=True)
                if told in labels:
                    problems.add(f"{labels[told]} and {variant.label} are the same run: leave one out")
                labels[told] = variant.label
                runs.append(run)
            units.append(Unit(tuple(runs), sweep.resources.cpus, sweep.resources.gpus))
    problems.raise_if_any(f"{sweep.path}: ", sweep.size)
    return units


def _plan(
    sweep: Sweep, variant: Variant, previous: SweepRun | None, output: Path, check: ScoringCheck, for_now: bool
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
    # without defaults, so that an option more in a later version leaves names as they are, and with the run before by its
    # name, so that another place for the sweep's folder does
    telling = resolved.model_dump(mode="json", exclude=set(SWEEP_OWN_KEYS), exclude_defaults=True)
    told = json.dumps(_replaced(telling, folder, previous.name if previous else ""), sort_keys=True)
    name = f"{variant.label}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    return SweepRun(name, output, sweep.task, _replaced(content, folder, stands_for), sweep.scoring)


def _resolve(config: RunConfig) -> tuple[RunConfig, Any]:
    """The configuration with every default filled in, and the plan it comes from. UserError with all that is wrong."""
    if isinstance(config, PerturbConfig):
        perturbation = plan_perturbation(config)
        return perturbation.config, perturbation
    assert isinstance(config, DreamBoothConfig | S2IConfig)
    plan = plan_training(config, find_scorer=find_scorer).plan
    return plan.config, plan


def _with_previous(config: RunConfig, folder: str) -> RunConfig:
    """The configuration with a folder for `PREVIOUS`."""
    values = {name: getattr(config, name) for name in type(config).model_fields}
    named = {name: value for name, value in values.items() if isinstance(value, str | Path) and PREVIOUS in str(value)}
    return config.model_copy(update={name: type(v)(str(v).replace(PREVIOUS, folder)) for name, v in named.items()})


@contextmanager
def _stand_in(run: SweepRun | None) -> Iterator[str]:
    """A folder that can be planned upon as if the run had been made: its settings are there, its results are empty."""
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
    """Warnings belong to the runs' own logs: here each would come once per run."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before
