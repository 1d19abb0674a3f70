"""`etherdiff plot`: the points of its lines, from runs at each x or from what each run logged along the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from etherdiff.config import PlotOptions
from etherdiff.report.charts import points, thinned
from etherdiff.report.scores import score_title
from etherdiff.results.columns import Quantity, column, column_problems, is_score, scores_behind
from etherdiff.results.identity import check_identities
from etherdiff.results.keys import Value, check_keys, group, refuse_mixtures, shown, value_of
from etherdiff.results.paper import PaperValue, paper_of
from etherdiff.results.pooling import Cell, pool_numbers
from etherdiff.results.runs import Collection, LeftOut, collect
from etherdiff.results.tables import Numbers, lost_of
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError

STEP = "step"
"""The x of what was logged while training."""
NOT_LOGGED = ("step", "learning_rate")


@dataclass(frozen=True)
class Line:
    """One line of one panel."""

    values: tuple[str, ...]
    """Of the lines' keys."""
    points: list[tuple[float, Cell]]
    """x and number, by rising x."""
    diverged: list[float]
    """The x at which a run's loss or weights became NaN or infinite."""
    paper: PaperValue | None = None

    @property
    def name(self) -> str:
        return ", ".join(self.values)


@dataclass(frozen=True)
class Panel:
    """A quantity, and a line for each group of runs."""

    column: Quantity
    lines: list[Line]


@dataclass(frozen=True)
class Figure:
    """Everything that is drawn, and what the reader is told beside."""

    x: str
    panels: list[Panel]
    remarks: list[str]
    left_out: list[LeftOut]


def make_figure(paths: Sequence[Path], options: PlotOptions) -> Figure:
    """Read the runs and average those of each point. UserError with everything that is wrong, before anything is computed."""
    if options.x == STEP:
        return _over_steps(paths, options)
    if problems := [*column_problems(options.y, "y"), *([] if options.y else ["--y: name at least one"])]:
        raise UserError(problems)
    scores = scores_behind(options.y)
    collection = collect(paths, scored=bool(scores))
    runs = collection.runs
    _refuse_keys(runs, options)
    keys = (*options.lines, options.x)
    refuse_mixtures(group(runs, keys), keys, "lines")
    numbers = Numbers(check_identities(runs, scores, options.anyway))
    numbers.compute_facts(runs, options.y)
    panels = [_panel(column(name), collection, numbers, options) for name in options.y]
    if not any(line.points for panel in panels for line in panel.lines):
        raise UserError([f"there is nothing to draw of {', '.join(options.y)}", *numbers.remarks()])
    return Figure(options.x, panels, numbers.remarks(), collection.left_out)


def _refuse_keys(runs: Sequence[Run], options: PlotOptions) -> None:
    problems = [*check_keys(options.lines, runs, "lines"), *check_keys((options.x,), runs, "x")]
    if options.x in options.lines:
        problems.append(f"--x {options.x}: it tells the lines apart already (--lines)")
    if not problems and (wrong := [run for run in runs if _number(value_of(run, options.x)) is None]):
        problems.append(f"--x {options.x}: needs numbers, not {shown(value_of(wrong[0], options.x))}")
    if len(tasks := sorted({run.task for run in runs})) > 1:
        problems.append(
            f"a figure is of one task, but there are runs of {' and '.join(tasks)}: give the folders of one of them"
        )
    if problems:
        raise UserError(problems)


def _panel(of: Quantity, collection: Collection, numbers: Numbers, options: PlotOptions) -> Panel:
    lines = []
    for values, runs in group(collection.runs, options.lines).items():
        cells = {at: numbers.cell(there, of.name) for (at,), there in group(runs, (options.x,)).items()}
        known = [(float(at), cell) for at, cell in cells.items() if cell is not None]
        paper = paper_of(runs, of.name) if options.paper else None
        comparable = paper if paper is not None and not paper.differs else None
        lines.append(Line(_shown(values), known, _diverged(collection, values, options), comparable))
    return Panel(of, lines)


def _diverged(collection: Collection, values: tuple[Value, ...], options: PlotOptions) -> list[float]:
    lost = [one.run for one in lost_of(collection, options.lines, values) if one.diverged and one.run]
    return sorted({at for run in lost if (at := _number(value_of(run, options.x))) is not None})


def _over_steps(paths: Sequence[Path], options: PlotOptions) -> Figure:
    """Means over the runs of a line at each step that was logged; a long curve is thinned to neighbours' means."""
    collection = collect(paths, scored=False)
    runs = collection.runs
    logged = dict.fromkeys(name for run in runs for row in run.curves for name in row if name not in NOT_LOGGED)
    there = ", ".join(logged) or "nothing"
    problems = [f"--y {name}: metrics.jsonl has no such number (there is {there})" for name in options.y if name not in logged]
    problems += check_keys(options.lines, runs, "lines")
    if problems or not options.y:
        raise UserError(problems or ["--y: name at least one"])
    groups = group(runs, options.lines)
    refuse_mixtures(groups, options.lines, "lines")
    panels = []
    for name in options.y:
        lines = [Line(_shown(values), _logged(of, name), []) for values, of in groups.items()]
        higher = column(name).higher_is_better if is_score(name) else None
        label = score_title(name)
        panels.append(Panel(Quantity(name, label, is_score(name), higher), lines))
    return Figure(STEP, panels, [], collection.left_out)


def _logged(runs: Sequence[Run], name: str) -> list[tuple[float, Cell]]:
    at: dict[float, dict[str, tuple[str, float]]] = {}
    for run in runs:
        for step, value in thinned(points(run.curves, name)):
            at.setdefault(step, {})[run.name] = (run.subject_name, value)
    pooled = {step: pool_numbers(numbers) for step, numbers in sorted(at.items())}
    return [(step, cell) for step, cell in pooled.items() if cell is not None]


def _shown(values: tuple[Value, ...]) -> tuple[str, ...]:
    return tuple(shown(value) for value in values)


def _number(value: Value) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
