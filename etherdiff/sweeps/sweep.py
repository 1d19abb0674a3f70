"""`etherdiff sweep`: make every run of a file once, also across interruptions, and show how far it is."""

import importlib.util
import json
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from etherdiff.config import SweepOptions
from etherdiff.sweeps.backends import Backend, LocalBackend, RayBackend
from etherdiff.sweeps.execute import Outcome, RunSettings
from etherdiff.sweeps.planning import plan_units
from etherdiff.sweeps.runs import Stage, SweepRun, Unit, expect_scores, read_state, shell_command, stage_of
from etherdiff.sweeps.spec import Sweep, read_sweep
from etherdiff.system import signals
from etherdiff.system.errors import Problems, RunError, Stopped, UserError
from etherdiff.system.files import write_text
from etherdiff.system.locks import LOCK, run_lock
from etherdiff.system.terminal import console, say, warn
from etherdiff.system.text import read_user_text

COPY = "sweep.yaml"
FORWARDED = ("ETHERDIFF_CACHE", "ETHERDIFF_DATA")
"""Environment variables that are passed on to runs on other machines."""
STAGE_LABELS = {Stage.ABSENT: "to do", Stage.BEGUN: "to be resumed", Stage.MADE: "to be scored", Stage.FINISHED: "finished"}


@dataclass(frozen=True)
class Planned:
    """A sweep of which every run was checked and could start."""

    sweep: Sweep
    output: Path
    units: list[Unit]
    stages: dict[str, Stage]
    """Name of a run -> its stage."""

    @property
    def unfinished(self) -> list[Unit]:
        """Units with something left to do, without their runs that are finished."""
        left = [
            Unit(tuple(run for run in unit.runs if self.stages[run.name] < Stage.FINISHED), unit.threads, unit.gpus)
            for unit in self.units
        ]
        return [unit for unit in left if unit.runs]


def has_ray() -> bool:
    """Return whether the extra `ray` is installed."""
    return importlib.util.find_spec("ray") is not None


def plan_sweep(file: Path, options: SweepOptions, for_now: bool = True) -> Planned:
    """Check everything and write nothing. UserError with everything that is wrong."""
    problems = Problems()
    if (options.address is not None or (options.jobs or 1) > 1) and not has_ray():
        problems.add("several runs at a time need Ray: pip install 'etherdiff[ray]'")
    (sweep,) = problems.settle(problems.attempt(read_sweep, file))
    output = (options.output or Path("sweeps") / file.stem).absolute()
    if output.is_dir() and any(path.name != LOCK for path in output.iterdir()) and not (output / COPY).is_file():
        raise UserError(f"output: {output} holds something that is not a sweep; choose another folder")
    units = plan_units(sweep, output, for_now)
    runs = [run for unit in units for run in unit.runs]
    stages = {run.name: problems.of(run.name).attempt(stage_of, run).value for run in runs}
    problems.raise_if_any(f"{file}: ")
    return Planned(sweep, output, units, {name: stage for name, stage in stages.items() if stage is not None})


def run_sweep(file: Path, options: SweepOptions, program: tuple[str, ...] = ()) -> Path:
    """Make and score all unfinished runs; return the sweep's folder. program: replaces etherdiff, for tests.

    Raises:
        UserError: everything that is wrong, before anything starts.
        RunError: some runs failed; all others are finished.
        Stopped: a signal arrived; the active runs have saved a checkpoint.
    """
    planned = plan_sweep(file, options)
    with run_lock(planned.output):
        write_files(planned)
        units, total = planned.unfinished, planned.sweep.size
        left = sum(len(unit.runs) for unit in units)
        say(f"{planned.output}: {total} runs, {total - left} finished already", style="bold")
        _warn_of_gpu(planned.sweep)
        _warn_of_others(planned)
        failed = _run_units(units, total - left, options, program) if units else []
    if failed:
        raise RunError(_summary(failed, total))
    say(f"{planned.output}: all {total} runs are finished")
    return planned.output


def print_commands(file: Path, options: SweepOptions) -> list[str]:
    """Write the recipes, run nothing, and return a shell command for each unit that is not finished."""
    planned = plan_sweep(file, options, for_now=False)
    with run_lock(planned.output):
        write_files(planned)
        lines = []
        for unit in planned.unfinished:
            commands = [command for run in unit.runs for command in _commands(run, planned.stages[run.name])]
            lines.append(" && ".join(shell_command(unit, command) for command in commands))
            for run in unit.runs:
                expect_scores(run, {"status": "printed"})
    return lines


def dry_run(file: Path, options: SweepOptions) -> list[str]:
    """Check everything, and return a line for each run: its name and its stage."""
    planned = plan_sweep(file, options, for_now=False)
    return [f"{run.name}: {STAGE_LABELS[planned.stages[run.name]]}" for unit in planned.units for run in unit.runs]


def write_files(planned: Planned) -> None:
    """Write a copy of the sweep file, for reading, and the recipe of every run."""
    write_text(planned.output / COPY, read_user_text(planned.sweep.path))
    for unit in planned.units:
        for run in unit.runs:
            run.recipe.parent.mkdir(exist_ok=True)
            write_text(run.recipe, yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))


def _commands(run: SweepRun, stage: Stage) -> list[list[str]]:
    """Return the commands that a run still needs."""
    make = {Stage.ABSENT: [run.make_command()], Stage.BEGUN: [run.resume_command()]}.get(stage, [])
    return make + ([] if run.scoring is None else [run.score_command()])


def _run_units(units: Sequence[Unit], finished: int, options: SweepOptions, program: tuple[str, ...]) -> list[Outcome]:
    """Run units; return the outcomes of the runs that failed. Stopped where a signal arrived."""
    session = uuid.uuid4().hex
    environment = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    settings = RunSettings(options.retries, session, environment, program)
    with signals.deferred():
        backend = _backend(units, settings, options)
        progress = Progress([run for unit in units for run in unit.runs], finished, session)
        try:
            with progress:
                while backend.is_busy() and signals.received() is None:
                    progress.update(backend.wait(1.0))
        finally:
            backend.stop()
        if backend.is_busy() and (number := signals.received()) is not None:
            done = f"{progress.finished} of {progress.total} runs are finished"
            raise Stopped(number, f"stopped: {done}, those at work have saved. Go on with the same command")
    return progress.failed


def _backend(units: Sequence[Unit], settings: RunSettings, options: SweepOptions) -> Backend:
    if not has_ray() or (options.jobs == 1 and options.address is None):
        return LocalBackend(units, settings)
    return RayBackend(units, settings, options.address, options.jobs)


def _summary(failed: Sequence[Outcome], total: int) -> str:
    lines = [f"{len(failed)} of {total} runs failed and are left out; the same command tries them again:"]
    for outcome in failed:
        lines += [
            f"{outcome.run} (tried {outcome.attempts} times)",
            *(f"    {line}" for line in str(outcome.error).splitlines()),
        ]
    return "\n".join(lines)


def _warn_of_gpu(sweep: Sweep) -> None:
    if sweep.resources.gpus == 0 and torch.cuda.is_available():
        warn("this machine has a GPU, and no run gets it: say `resources: {gpus: 1}`, or a fraction, in the file")


def _warn_of_others(planned: Planned) -> None:
    folder = planned.output / "runs"
    others = sorted(path.name for path in folder.iterdir() if path.name not in planned.stages) if folder.is_dir() else []
    if others:
        warn(f"{folder} holds {len(others)} runs that the file does not ask for (any more), such as {others[0]}")


TAIL = 4096
"""Bytes from the end of metrics.jsonl that hold its last line."""


class Progress:
    """Context that shows the progress: a live table in a terminal, a line per finished run elsewhere. Update it each second."""

    def __init__(self, runs: Sequence[SweepRun], finished: int, session: str) -> None:
        self.waiting = {run.name: run for run in runs}
        self.session = session
        self.finished, self.total = finished, finished + len(runs)
        self.failed: list[Outcome] = []
        self.seen: dict[tuple[str, str], float] = {}
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def update(self, outcomes: Sequence[Outcome]) -> None:
        """Report runs that ended, and show the state of the others."""
        for outcome in outcomes:
            del self.waiting[outcome.run]
            if outcome.error is None:
                self.finished += 1
            else:
                self.failed.append(outcome)
            say(self._line(outcome), style="" if outcome.error is None else "red")
        if self.live:
            self.live.update(self.render(time.monotonic()), refresh=True)

    def _line(self, outcome: Outcome) -> str:
        count = f"[{self.finished + len(self.failed)}/{self.total}]"
        if outcome.error is None:
            return f"{count} {outcome.run}: done in {outcome.seconds:.0f} s"
        return f"{count} {outcome.run}: failed, {outcome.error.splitlines()[0]}"

    def render(self, now: float) -> Group:
        """Return the counts, and a row for each run in progress. now: seconds of a monotonic clock."""
        states = [(run, read_state(run)) for run in self.waiting.values()]
        working = [(run, state) for run, state in states if self._is_worked_on(state)]
        counts = {"done": self.finished, "running": len(working), "waiting": len(self.waiting) - len(working)}
        line = " · ".join(f"{count} {what}" for what, count in {**counts, "failed": len(self.failed)}.items())
        table = Table(box=None, pad_edge=False)
        for header in ("run", "", "step", "loss", "seconds"):
            table.add_column(header, justify="left" if header in ("run", "") else "right")
        for run, state in working:
            # this process's own clock: clocks of other machines, and wall clocks, may differ
            table.add_row(*row_of(run, state, now - self.seen.setdefault((run.name, state["status"]), now)))
        return Group(Text(line, style="bold"), *([table] if working else []))

    def _is_worked_on(self, state: dict[str, Any]) -> bool:
        return state.get("session") == self.session and state.get("status") in ("training", "scoring")


def row_of(run: SweepRun, state: dict[str, Any], seconds: float) -> list[str]:
    """Return name, status, step of steps, loss, and seconds since it was first seen with that status."""
    last = last_row(run.folder / "metrics.jsonl")
    loss = last.get("loss")
    step = f"{last.get('step', 0)}/{run.steps}" if run.steps else ""
    return [run.name, state["status"], step, "" if loss is None else f"{loss:.4f}", f"{seconds:.0f}"]


def last_row(path: Path) -> dict[str, Any]:
    """Return the last whole line of a metrics.jsonl; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TAIL, 0))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # torn by a kill, or cut by us
            continue
        if isinstance(row, dict):
            return row
    return {}
