"""`etherdiff plot`: the points of its lines, and the figure as a PNG or SVG file by matplotlib.

Points are runs at each x, or what each run logged while training. A figure has a panel for each quantity, lines with error
bars, and one legend below. The colours are Okabe and Ito's, which colour-blind readers can distinguish, and each line also
has its own marker. A method has the same colour in every figure. Equal figures are equal bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etherdiff.adapters.methods import Style, label_styles
from etherdiff.config import PlotOptions
from etherdiff.eval.compare import check_identities
from etherdiff.eval.paper import PaperValue, paper_of
from etherdiff.report.charts import points, thinned
from etherdiff.report.scores import score_title
from etherdiff.results.keys import (
    Quantity,
    Value,
    check_keys,
    column,
    column_problems,
    group,
    is_score,
    refuse_mixtures,
    scores_behind,
    shown,
    value_of,
)
from etherdiff.results.pooling import Cell, pool_numbers
from etherdiff.results.runs import Collection, LeftOut, collect
from etherdiff.results.tables import Numbers, left_out_runs
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.system.files import staged_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEP = "step"
"""The x of values logged while training."""
NOT_LOGGED = ("step", "learning_rate")


@dataclass(frozen=True)
class Line:
    """One line of one panel."""

    values: tuple[str, ...]
    """Values of the lines' keys."""
    points: list[tuple[float, Cell]]
    """x and number, in order of x."""
    diverged: list[float]
    """x of runs whose loss or weights became NaN or infinite."""
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
    """Everything that is drawn, and the notes."""

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
        problems.append(f"--x {options.x}: it is one of --lines already")
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
    lost = [one.run for one in left_out_runs(collection, options.lines, values) if one.diverged and one.run]
    return sorted({at for run in lost if (at := _number(value_of(run, options.x))) is not None})


def _over_steps(paths: Sequence[Path], options: PlotOptions) -> Figure:
    """Average the runs of a line at each logged step; thin long curves to the means of neighbours."""
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


# --- Drawing ----------------------------------------------------------------------------------------------------------


Values = tuple[str, ...]

FORMATS = (".png", ".svg")
COLOURS = {
    "black": "#000000",
    "grey": "#7A7A7A",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#C9B400",
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
}
DIVERGED, PAPER = "_diverged", "_paper"
"""Labels that matplotlib leaves out of the legend."""
DASHES: dict[str, Any] = {
    "solid": "-",
    "dashed": (0, (6, 2)),
    "dotted": (0, (2, 1.5)),
    "dash-dotted": (0, (7, 2, 1.5, 2)),
}
PAPER_DASHES: Any = (0, (5, 4))
OTHER_COLOURS = ("blue", "vermilion", "green", "orange", "purple", "sky", "black", "grey")
OTHER_MARKERS = ("o", "s", "^", "D", "v", "P", "<", "X", ">", "*")
PANEL = (4.8, 3.5)
"""Width and height of a panel in inches."""
LEGEND_ROW = 0.24
MAX_ACROSS = 3
ENTRIES_ACROSS = 3
"""Entries of the legend below each panel."""
MANY_POINTS = 25
"""Minimum number of points for a band instead of error bars."""
DECADES_FOR_LOG = 1.3
SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E8",
    "svg.hashsalt": "etherdiff",
    "svg.fonttype": "path",
}


def check_output(path: Path) -> None:
    """Raise UserError if a figure cannot be written there."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--output {path}: must end in {' or '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.absolute().parent}")


def draw_figure(figure: Figure, output: Path, title: str | None = None) -> None:
    """Write the figure, whole or not at all."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    across = 2 if len(figure.panels) == 4 else min(len(figure.panels), MAX_ACROSS)
    down = math.ceil(len(figure.panels) / across)
    styles = _styles([line.values for panel in figure.panels for line in panel.lines])
    entries = len(styles) + 2  # diverged runs, and the paper's
    height = PANEL[1] * down + LEGEND_ROW * math.ceil(entries / (ENTRIES_ACROSS * across))
    with matplotlib.rc_context(SETTINGS):
        canvas = Canvas(figsize=(PANEL[0] * across, height), layout="constrained")
        axes = list(canvas.subplots(down, across, squeeze=False).flat)
        for panel, ax in zip(figure.panels, axes, strict=False):
            _draw_panel(ax, figure, panel, styles)
        for ax in axes[len(figure.panels) :]:
            ax.set_visible(False)
        _draw_legend(canvas, axes[: len(figure.panels)], across)
        if title:
            canvas.suptitle(title, parse_math=False, fontsize=12)
        _write(canvas, output)


def _write(canvas: Any, output: Path) -> None:
    is_svg = output.suffix.lower() == ".svg"
    facts = {"Date": None} if is_svg else {"Software": None}
    with staged_file(output, durable=True) as staged:
        canvas.savefig(staged, format="svg" if is_svg else "png", dpi=150, metadata=facts, facecolor="white")


def _styles(lines: Sequence[Values]) -> dict[Values, Style]:
    """Return each line's style. The first key has the colour (a method its own), the others marker and dashes."""
    firsts = list(dict.fromkeys(first for first, *_ in lines))
    rests = list(dict.fromkeys(tuple(rest) for _, *rest in lines))
    known = label_styles()
    own = all(first in known for first in firsts)
    found = {}
    for first, *rest in lines:
        place, other = firsts.index(first), rests.index(tuple(rest))
        style = known[first] if own else Style(place, _nth(OTHER_COLOURS, place), _nth(OTHER_MARKERS, place))
        if rest:
            style = style._replace(marker=_nth(OTHER_MARKERS, other), dashes=_nth(list(DASHES), other))
        found[(first, *rest)] = style
    return found


def _nth(choices: Sequence[Any], place: int) -> Any:
    return choices[place % len(choices)]


def _draw_panel(ax: "Axes", figure: Figure, panel: Panel, styles: Mapping[Values, Style]) -> None:
    for line in panel.lines:
        _draw_line(ax, line, styles[line.values], panel.column.unit)
    _scale(ax, figure, panel)
    _mark_diverged(ax, panel, styles)
    arrow = {True: " (higher is better)", False: " (lower is better)", None: ""}[panel.column.higher_is_better]
    ax.set_title(panel.column.label + arrow, loc="left", fontsize=10, parse_math=False)
    ax.set_xlabel(figure.x.replace("_", " "))


def _mark_diverged(ax: "Axes", panel: Panel, styles: Mapping[Values, Style]) -> None:
    """Draw a cross at the panel's foot for each line and x at which runs diverged, one above another."""
    stacked: dict[float, int] = {}
    for line in panel.lines:
        for x in line.diverged:
            height = 0.03 + 0.05 * stacked.get(x, 0)
            stacked[x] = stacked.get(x, 0) + 1
            ax.plot(
                x,
                height,
                linestyle="none",
                marker="X",
                markersize=8,
                color=COLOURS[styles[line.values].colour],
                markeredgecolor="white",
                transform=ax.get_xaxis_transform(),
                zorder=5,
                label=DIVERGED,
            )
    if stacked:  # room below the lines
        low, high = ax.get_ylim()
        room = 0.05 * max(stacked.values())
        ax.set_ylim(low * (low / high) ** room if ax.get_yscale() == "log" else low - room * (high - low), high)


def _draw_line(ax: "Axes", line: Line, style: Style, unit: float) -> None:
    """Draw error bars where there are few points, a band where there are many."""
    known = [
        (x, cell.low / unit, cell.high / unit) for x, cell in line.points if cell.low is not None and cell.high is not None
    ]
    if len(line.points) >= MANY_POINTS:
        shape: dict[str, Any] = {"linewidth": 1.4}
        if known:
            xs, lows, highs = zip(*known, strict=True)
            ax.fill_between(xs, lows, highs, color=COLOURS[style.colour], alpha=0.15, linewidth=0)
    else:
        shape = {"marker": style.marker, "markersize": 5.5, "linewidth": 1.5}
        for x, low, high in known:
            ax.plot([x, x], [low, high], color=COLOURS[style.colour], marker="_", markersize=6, linewidth=0.9)
    at, means = [x for x, _ in line.points], [cell.mean / unit for _, cell in line.points]
    ax.plot(at, means, color=COLOURS[style.colour], linestyle=DASHES[style.dashes], label=line.name, **shape)
    if line.paper is not None:
        ax.axhline(line.paper.value, color=COLOURS[style.colour], linestyle=PAPER_DASHES, linewidth=1, label=PAPER)


def _scale(ax: "Axes", figure: Figure, panel: Panel) -> None:
    at = sorted({x for line in panel.lines for x in [*line.diverged, *(x for x, _ in line.points)]})
    if figure.x != STEP and _spans_decades(at):
        ax.set_xscale("log")
    elif figure.x != STEP and len(at) <= 10:
        ax.set_xticks(at, [f"{x:g}" for x in at])
    values = [cell.mean for line in panel.lines for _, cell in line.points]
    if not (panel.column.is_score or panel.column.higher_is_better) and _spans_decades(values):
        ax.set_yscale("log")


def _spans_decades(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and math.log10(max(values) / min(values)) >= DECADES_FOR_LOG


def _draw_legend(canvas: Any, axes: Sequence["Axes"], across: int) -> None:
    """Draw below all panels an entry for each line, for diverged runs and for the paper."""
    from matplotlib.lines import Line2D

    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    drawn = {line.get_label() for ax in axes for line in ax.get_lines()}
    if DIVERGED in drawn:
        found["diverged"] = Line2D(
            [], [], linestyle="none", marker="X", markersize=8, color=COLOURS["grey"], markeredgecolor="white"
        )
    if PAPER in drawn:
        found["in the paper"] = Line2D([], [], linestyle=PAPER_DASHES, linewidth=1, color=COLOURS["grey"])
    rows = math.ceil(len(found) / (ENTRIES_ACROSS * across))
    legend = canvas.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=math.ceil(len(found) / rows), frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
