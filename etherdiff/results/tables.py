"""`etherdiff table`: rows of runs, columns of scores and facts, the paper's numbers, and notes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from etherdiff.config import TableOptions
from etherdiff.eval.compare import Checked, check_identities
from etherdiff.eval.metrics import METRICS
from etherdiff.eval.paper import PaperValue, paper_of, paper_of_real_images, paper_scope
from etherdiff.results.facts import FACTS, fact
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
    usual_columns,
    value_of,
)
from etherdiff.results.pooling import SHARE, Cell, Plateau, Scored, find_plateau, pool_numbers, pool_scores, scored
from etherdiff.results.runs import Collection, LeftOut, collect
from etherdiff.runs.result import SetScores
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.system.terminal import track


@dataclass(frozen=True)
class TableRow:
    """Runs that are averaged."""

    values: tuple[Value, ...]
    """Values of the rows' keys."""
    runs: list[Run]
    cells: dict[str, Cell]
    """Quantity -> number; unknown ones are left out."""
    paper: dict[str, PaperValue] = field(default_factory=dict)
    left_out: int = 0
    """Number of runs with the same values that are left out."""
    best: Value = None
    """Best value of the key of `--best`."""
    plateau: Plateau | None = None
    """Range of good values around the best; None if unknown."""
    reference: str = ""
    """Label of a reference row (real images, the base); empty for runs."""

    @property
    def over(self) -> str:
        """Units of the intervals of its scores."""
        return "; ".join(dict.fromkeys(cell.over for name, cell in self.cells.items() if is_score(name) and cell.over))


@dataclass(frozen=True)
class Table:
    """The content of a table, whatever its format."""

    keys: tuple[str, ...]
    columns: list[Quantity]
    rows: list[TableRow]
    remarks: list[str]
    left_out: list[LeftOut]
    best: str | None = None
    shows_paper: frozenset[str] = frozenset()
    """Columns with numbers of the paper."""

    def is_best(self, row: TableRow, name: str) -> bool:
        """Say whether no other row of runs has a better score in the column."""
        higher = column(name).higher_is_better
        if row.reference or name not in row.cells or higher is None:
            return False
        means = [other.cells[name].mean for other in self.rows if not other.reference and name in other.cells]
        return len(means) > 1 and row.cells[name].mean == (max if higher else min)(means)


def make_table(paths: Sequence[Path], options: TableOptions) -> Table:
    """Read the runs and average those of each row. UserError with everything that is wrong, before anything is computed."""
    named = options.columns
    problems = column_problems(named, "columns") if named is not None else []
    if named is not None and not named:
        problems.append("--columns: name at least one")
    if problems:
        raise UserError(problems)
    collection = collect(paths, scored=named is None or bool(scores_behind(named)))
    runs = collection.runs
    _refuse_keys(collection, options)
    names = list(named) if named is not None else usual_columns(runs)
    checked = check_identities(runs, scores_behind(names), options.anyway)
    judged = [name for name in names if column(name).higher_is_better is not None]
    if options.best is not None and not judged:
        raise UserError("--best: needs a score among --columns to choose by, or dino_clip_t, or validation_loss")
    groups = group(runs, options.rows)
    averaged = (*options.rows, *([options.best] if options.best else []))
    refuse_mixtures(group(runs, averaged), averaged, "rows")
    numbers = Numbers(checked)
    numbers.compute_facts(runs, names)
    if options.best is None:
        rows = [_row(values, of, names, numbers, collection, options) for values, of in groups.items()]
    else:
        rows = [
            _best_row(values, of, names, options.best, judged[0], numbers, collection, options) for values, of in groups.items()
        ]
    shows_paper = frozenset(name for row in rows for name in row.paper)
    rows = [*_reference_rows(runs, names, numbers, options, shows_paper), *rows]
    remarks = [*_remarks(rows, judged, options, runs), *numbers.remarks()]
    columns = [column(name) for name in names]
    return Table(options.rows, columns, rows, remarks, collection.left_out, options.best, shows_paper)


def _refuse_keys(collection: Collection, options: TableOptions) -> None:
    """Raise UserError if rows or `best` are not keys of these runs, or the runs are of several tasks."""
    runs = collection.runs
    problems = check_keys(options.rows, runs, "rows")
    if not options.rows:
        problems.append("--rows: name at least one key")
    if options.best is not None:
        problems += check_keys((options.best,), runs, "best")
        if options.best in options.rows:
            problems.append(f"--best {options.best}: it is one of --rows already")
        if not problems:
            problems += setting_problems(options.best, runs)
    elif options.share is not None:
        problems.append("--share: it applies to --best only; name a key with --best")
    if len(tasks := {run.task: run for run in runs}) > 1:
        examples = " and ".join(f"{run.folder.path} ({task})" for task, run in tasks.items())
        problems.append(f"a table is of one task, but there are {examples}: give the folders of one of them")
    if problems:
        raise UserError(problems)


def setting_problems(key: str, runs: Sequence[Run]) -> list[str]:
    """Return why decades of a key cannot be counted."""
    wrong = [shown(value) for run in runs if not _is_positive(value := value_of(run, key))]
    return [f"--best {key}: needs numbers above 0, not {wrong[0]}"] if wrong else []


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


class Numbers:
    """Cells of runs, and notes about missing numbers."""

    def __init__(self, checked: Checked) -> None:
        self.checked = checked
        self.missing: dict[str, list[str]] = {}
        self._facts: dict[tuple[Path, str], float | None] = {}

    def compute_facts(self, runs: Sequence[Run], names: Sequence[str]) -> None:
        """Compute every fact of every run, with a progress bar where that takes long."""
        slow = [name for name in names if name in FACTS and FACTS[name].keep]
        for run in track(runs, ", ".join(slow).replace("_", " ")) if slow else ():
            for name in slow:
                self._fact(run, name)

    def cell(self, runs: Sequence[Run], name: str) -> Cell | None:
        """Return a column's number for runs that are averaged."""
        cell = self._fact_cell(runs, name) if name in FACTS else self._score_cell(runs, name)
        return cell and replace(cell, differs=any(self.checked.is_otherwise(runs, score) for score in scores_behind([name])))

    def _fact_cell(self, runs: Sequence[Run], name: str) -> Cell | None:
        return pool_numbers(
            {run.name: (run.subject_name, value) for run in runs if (value := self._fact(run, name)) is not None}
        )

    def _score_cell(self, runs: Sequence[Run], name: str) -> Cell | None:
        found = scored(runs)
        lacking = [one for one in found if name not in one.result.scores]
        for run, _, result in lacking:
            self._miss(name, f"{run} ({result.not_scored.get(name, 'not asked for when it was scored')})")
        cell = pool_scores(found, name)
        if cell is None and len(lacking) < len(found):
            self._miss(name, "a score of sets is not pooled over subjects")
        return cell

    def _fact(self, run: Run, name: str) -> float | None:
        known = (run.folder.path, name)
        if known not in self._facts:
            try:
                self._facts[known] = fact(run, name)
            except UserError as error:
                self._facts[known] = None
                self._miss(name, f"{run.name} ({error})")
        return self._facts[known]

    def _miss(self, name: str, whose: str) -> None:
        runs = self.missing.setdefault(name, [])
        if whose not in runs:
            runs.append(whose)

    def remarks(self) -> list[str]:
        """Return a sentence for each column with missing numbers, and for what was computed differently."""
        missing = [f"no {name}: {'; '.join(of)}" for name, of in self.missing.items()]
        return [*missing, *(f"* {text}" for text in self.checked.sentences()), *self.checked.rounding]


# --- Rows ------------------------------------------------------------------------------------------------------------


def _row(
    values: tuple[Value, ...],
    runs: list[Run],
    names: Sequence[str],
    numbers: Numbers,
    collection: Collection,
    options: TableOptions,
    best: tuple[Value, Plateau | None] = (None, None),
) -> TableRow:
    cells = {name: cell for name in names if (cell := numbers.cell(runs, name)) is not None}
    paper = {name: value for name in names if options.paper and (value := paper_of(runs, name)) is not None}
    return TableRow(values, runs, cells, paper, len(left_out_runs(collection, options.rows, values)), *best)


def left_out_runs(collection: Collection, keys: Sequence[str], values: tuple[Value, ...]) -> list[LeftOut]:
    """Return the runs that are left out and have these values."""
    known = [one for one in collection.left_out if one.run is not None]
    return [one for one in known if one.run and tuple(value_of(one.run, key) for key in keys) == values]


def _best_row(
    values: tuple[Value, ...],
    runs: list[Run],
    names: Sequence[str],
    key: str,
    by: str,
    numbers: Numbers,
    collection: Collection,
    options: TableOptions,
) -> TableRow:
    """Return the runs of the setting with the best value of column `by`; a setting with a diverged run counts as failed."""
    by_setting = {setting: of for (setting,), of in group(runs, (key,)).items()}
    lost = left_out_runs(collection, options.rows, values)
    failed = {value_of(one.run, key) for one in lost if one.diverged and one.run}
    pooled = {s: pool_scores(scored(of), by) if is_score(by) else numbers.cell(of, by) for s, of in by_setting.items()}
    found = {setting: cell.mean for setting, cell in pooled.items() if cell is not None and setting not in failed}
    points = [(float(setting), found.get(setting)) for setting in sorted({*pooled, *filter(_is_positive, failed)})]
    higher = bool(column(by).higher_is_better)
    best = (max if higher else min)(found, key=lambda setting: found[setting], default=None)
    if best is None:  # every setting has failed
        return TableRow(values, runs, {}, left_out=len(lost))
    plateau = find_plateau(points, higher, options.share or SHARE)
    return _row(values, by_setting[best], names, numbers, collection, options, (best, plateau))


def _reference_rows(
    runs: Sequence[Run], names: Sequence[str], numbers: Numbers, options: TableOptions, shows_paper: frozenset[str]
) -> list[TableRow]:
    """Return the rows of real images and of the base, by the first run of each subject."""
    if "subject" in options.rows:
        return []
    firsts = list({run.subject_name: run for run in reversed(runs)}.values())[::-1]
    found = []
    for title, result_of in (("real images", _real_scores), ("the base", _base_scores)):
        is_real = title == "real images"
        known = [Scored(run.name, run.subject_name, scores) for run in firsts if (scores := result_of(run))]
        columns = {name: _reference_score(name) if is_real else name for name in names if name not in FACTS}
        cells = {name: cell for name, score in columns.items() if (cell := pool_scores(known, score)) is not None}
        if not cells or len(known) < len(firsts):
            continue
        paper = {name: value for name in shows_paper if is_real and (value := paper_of_real_images(firsts, name))}
        found.append(TableRow(("",) * len(options.rows), firsts, cells, paper, reference=title))
    return found


def _reference_score(name: str) -> str:
    """Return the name under which a score among real images is kept."""
    return METRICS[name].baseline or name if name in METRICS else name


def _base_scores(run: Run) -> SetScores | None:
    base = run.result.base if run.result else None
    return base if base and base.scores else None


def _real_scores(run: Run) -> SetScores | None:
    """Return the scores of real images: for a controllable run those of its own maps, if they were asked for."""
    if run.result is None:
        return None
    if run.is_controlled:
        return run.result.beside.get("real_images")
    baselines = {entry.baseline for entry in METRICS.values()}
    scores = {name: one for name, one in run.scores.items() if name in baselines}
    return run.result.model_copy(update={"scores": scores}) if scores else None


# --- Notes ---------------------------------------------------------------------------------------


def _remarks(rows: Sequence[TableRow], judged: Sequence[str], options: TableOptions, runs: Sequence[Run]) -> list[str]:
    remarks = [
        _of_best(options, judged[0]) if options.best else "",
        _of_intervals([row for row in rows if not row.reference]),
        _of_subjects([row for row in rows if not row.reference]),
        _of_paper(rows, runs[0].task),
    ]
    return [remark for remark in remarks if remark]


def _of_best(options: TableOptions, by: str) -> str:
    at_least = f"{options.share or SHARE:.0%} of the row's own best or better"
    at_most = f"the row's own best / {options.share or SHARE:g} or less"
    good = at_least if column(by).higher_is_better else at_most
    return (
        f"of each row, the runs with the best {options.best} by {by}, chosen by these same numbers; decades: the width "
        f"around it in which {by} is {good} (linear over the "
        "logarithm between the values that were tried; ≥ if it is still good at the last of them)"
    )


def _of_intervals(rows: Sequence[TableRow]) -> str:
    meanings: dict[str, str] = {
        "subjects": "over subjects, which are resampled (bootstrap)",
        "prompts": "over prompts, resampled, of these subjects and trained adapters",
        "images": "over images, resampled, of these trained adapters",
        "seeds": "over seeds, by the t interval of the trainings' scores",
    }
    units = dict.fromkeys(unit for row in rows for unit in meanings if row.over.endswith(unit))
    return f"[intervals] are 95% intervals {'; '.join(meanings[unit] for unit in units)}" if units else ""


def _of_subjects(rows: Sequence[TableRow]) -> str:
    """Name the subjects that rows lack: such rows are not quite comparable."""
    everything = dict.fromkeys(run.subject_name for row in rows for run in row.runs)
    lacking = {
        " ".join(shown(value) for value in row.values): [
            s for s in everything if s not in {run.subject_name for run in row.runs}
        ]
        for row in rows
    }
    incomplete = [f"{name} is without {', '.join(subjects)}" for name, subjects in lacking.items() if subjects]
    are_averaged = any(len({run.subject_name for run in row.runs}) > 1 for row in rows)
    return f"rows of different subjects: {'; '.join(incomplete)}" if incomplete and are_averaged else ""


def _of_paper(rows: Sequence[TableRow], task: str) -> str:
    values = [value for row in rows for value in row.paper.values()]
    if not values:
        return ""
    reasons = list(
        dict.fromkeys(reason for value in values for reason in value.differs if not reason.startswith("the paper's:"))
    )
    apart = f"; † measured differently: {'; '.join(reasons)}" if any(value.differs for value in values) else ""
    return f"the paper's: {paper_scope(task)}{apart}"


def described(runs: Sequence[Run]) -> str:
    """Count runs, subjects and seeds: "12 (6 subjects × 2 seeds)"."""
    subjects = {run.subject_name for run in runs}
    seeds = len(runs) // len(subjects)
    if len(runs) == 1 or len(subjects) == 1:
        return str(len(runs))
    times = f" × {seeds} seeds" if seeds > 1 and seeds * len(subjects) == len(runs) else ""
    return f"{len(runs)} ({len(subjects)} subjects{times})"
