"""A table as rich text, Markdown, HTML or CSV. CSV has all digits and every run's number, the others are for reading."""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from etherdiff.eval.paper import PaperValue
from etherdiff.report.html import render
from etherdiff.results.facts import FACTS
from etherdiff.results.keys import Quantity, shown
from etherdiff.results.pooling import Cell
from etherdiff.results.runs import LeftOut
from etherdiff.results.tables import Table, TableRow, described
from etherdiff.system.errors import UserError
from etherdiff.system.files import write_text
from etherdiff.system.terminal import make_console, warn
from etherdiff.system.text import short

FORMATS = ("text", "markdown", "csv", "html")
FORMAT_OF = {".md": "markdown", ".csv": "csv", ".html": "html", ".htm": "html"}
"""Suffix of a file -> format."""
WIDTH = 240
"""Characters in a line of text that is not printed on a terminal."""


def find_format(name: str | None, output: Path | None) -> str:
    """Return the format asked for, or that of the file's suffix, or text. UserError where it is unknown."""
    if name is None:
        return FORMAT_OF.get(output.suffix.lower(), "text") if output is not None else "text"
    if name not in FORMATS:
        raise UserError(f"--format {name}: must be {', '.join(FORMATS)}")
    return name


def show(table: Table, written: str, output: Path | None) -> None:
    """Print a table in one of `FORMATS`, or write it. What CSV has no place for is printed on stderr."""
    if written == "text":
        text = _plain(as_text(table)) if output is not None else ""
    else:
        text = {"markdown": as_markdown, "html": as_html, "csv": as_csv}[written](table)
    if output is not None:
        try:
            write_text(output, text)
        except OSError as error:
            raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error
    elif written == "text":
        make_console(width=None if sys.stdout.isatty() else WIDTH).print(as_text(table))
    else:
        sys.stdout.write(text)
    for note in notes(table) if written == "csv" else left_out_notes(table.left_out) if output is not None else ():
        warn(note)


def _plain(content: Group) -> str:
    console = make_console(width=WIDTH, file=io.StringIO(), record=True)
    console.print(content)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n"


def as_text(table: Table) -> Group:
    """Return a table for the terminal: best values are bold, and an interval is below its mean."""
    grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    head = _head(table)
    for number, name in enumerate(head):
        grid.add_column(Text(name), justify="left" if number < len(table.keys) else "right", overflow="fold")
    for row in table.rows:
        style = "dim" if row.reference else ""
        cells = [(text.replace(" [", "\n[").replace(" (", "\n("), is_best) for text, is_best in _cells(table, row)]
        grid.add_row(*(Text(text, style="bold" if is_best else style) for text, is_best in cells))
        if row.reference and row is [one for one in table.rows if one.reference][-1]:
            grid.add_section()
    return Group(grid, *(Text(remark) for remark in notes(table)))


def as_markdown(table: Table) -> str:
    """Return a Markdown table."""
    head = _head(table)
    lines = [head, ["---" if number < len(table.keys) else "---:" for number in range(len(head))]]
    for row in table.rows:
        lines.append([f"**{_markdown(text)}**" if is_best else _markdown(text) for text, is_best in _cells(table, row)])
    grid = ["| " + " | ".join(line) + " |" for line in [[_markdown(name) for name in lines[0]], *lines[1:]]]
    return "\n".join([*grid, "", *(f"- {_markdown(note)}" for note in notes(table))]).rstrip() + "\n"


def as_html(table: Table) -> str:
    """Return a page of its own: no script, nothing is fetched, and every name is escaped."""
    return render(
        "table.html.j2",
        title=f"Runs by {', '.join(table.keys)}",
        head=_head(table),
        rows=[(_cells(table, row), bool(row.reference)) for row in table.rows],
        remarks=table.remarks,
        left_out=left_out_notes(table.left_out),
    )


def as_csv(table: Table) -> str:
    """Return CSV in full precision: per column mean, interval, its unit, the paper's number and every run's number.

    A run that is left out has its own line with the reason.
    """
    fields = [*table.keys, "row", "runs", "subjects", "seeds", "left_out", "why_left_out", "run_names"]
    if table.best:
        fields += [f"best_{table.best}", "decades", "good_from", "good_to", "open_below", "open_above"]
    parts = ("low", "high", "over", "values", "computed_otherwise", "paper", "paper_differs")
    for column in table.columns:
        fields += [column.name, *(f"{column.name}_{part}" for part in parts)]
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for row in table.rows:
        writer.writerow(_csv_row(table, row))
    for lost in table.left_out:
        writer.writerow({"row": "left out", "runs": 0, "why_left_out": lost.why, "run_names": lost.name})
    return text.getvalue()


def notes(table: Table) -> list[str]:
    """Return everything below a table."""
    return [*table.remarks, *left_out_notes(table.left_out)]


def left_out_notes(left_out: Sequence[LeftOut]) -> list[str]:
    """Return a line for each reason, with the runs that are left out for it."""
    names: dict[str, list[str]] = {}
    for one in left_out:
        names.setdefault(one.why, []).append(one.name)
    return [f"left out: {', '.join(of)}: {why}" for why, of in names.items()]


# --- Parts -----------------------------------------------------------------------------------------------------------


def _head(table: Table) -> list[str]:
    head = [key.replace("_", " ") for key in table.keys] + ["runs"]
    if table.best:
        head += [f"best {table.best.replace('_', ' ')}", "decades"]
    for column in table.columns:
        arrow = {True: " ↑", False: " ↓", None: ""}[column.higher_is_better]
        head += [column.label + arrow, *([_paper_head(table, column)] if column.name in table.shows_paper else [])]
    return [*head, *(["interval over"] if any(row.over for row in table.rows) else [])]


def _paper_head(table: Table, column: Quantity) -> str:
    differs = any(row.paper[column.name].differs for row in table.rows if column.name in row.paper)
    return "paper†" if differs else "paper"


def _cells(table: Table, row: TableRow) -> list[tuple[str, bool]]:
    """Return the texts of a row, each with whether it is the best of its column."""
    names = [row.reference, *("" for _ in table.keys[1:])] if row.reference else [shown(value) for value in row.values]
    cells = [(name, False) for name in names]
    cells.append(("" if row.reference else described(row.runs) + (f", {row.left_out} left out" if row.left_out else ""), False))
    if table.best:
        cells += [("", False)] * 2 if row.reference else [(shown(row.best), False), (_plateau_text(row), False)]
    for column in table.columns:
        cell = row.cells.get(column.name)
        cells.append((_cell_text(column, cell), table.is_best(row, column.name)))
        if column.name in table.shows_paper:
            cells.append((_paper_text(row.paper.get(column.name)), False))
    if any(other.over for other in table.rows):
        cells.append((row.over, False))
    return cells


def _plateau_text(row: TableRow) -> str:
    plateau = row.plateau
    if plateau is None:
        return "–"
    low, high = (
        ("≤ " if plateau.open_low else "") + short(plateau.low),
        ("≥ " if plateau.open_high else "") + short(plateau.high),
    )
    return f"{'≥ ' if plateau.is_lower_bound else ''}{plateau.decades:.1f} ({low} to {high})"


def _cell_text(column: Quantity, cell: Cell | None) -> str:
    if cell is None:
        return ""
    mark = "*" if cell.differs else ""
    if column.name in FACTS and FACTS[column.name].exact:
        return f"{cell.mean / column.unit:,.{0 if column.unit == 1 else 1}f}{mark}"
    written = short if column.higher_is_better is None else _score
    interval = "" if cell.low is None or cell.high is None else f" [{written(cell.low)}, {written(cell.high)}]"
    return f"{written(cell.mean)}{mark}{interval}"


def _score(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _paper_text(paper: PaperValue | None) -> str:
    return "" if paper is None else f"{paper.value:.3f}" if abs(paper.value) < 10 else f"{paper.value:.1f}"


def _markdown(text: str) -> str:
    """Escape what would end a cell, be emphasis or be markup."""
    for sign in "\\|*_<`":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ")


def _csv_row(table: Table, row: TableRow) -> dict[str, object]:
    found: dict[str, object] = dict(zip(table.keys, row.values, strict=True))
    found |= {"row": row.reference or "runs", "left_out": row.left_out}
    if not row.reference:
        seeds = {getattr(run.config, "seed", None) for run in row.runs}
        found |= {"runs": len(row.runs), "subjects": len({run.subject_name for run in row.runs}), "seeds": len(seeds)}
        found["run_names"] = _listed([run.name for run in row.runs])
    if table.best and row.plateau is not None:
        plateau = row.plateau
        found |= {"decades": plateau.decades, "good_from": plateau.low, "good_to": plateau.high}
        found |= {"open_below": plateau.open_low, "open_above": plateau.open_high}
    if table.best:
        found[f"best_{table.best}"] = row.best
    for column in table.columns:
        found |= _csv_cell(column.name, row.cells.get(column.name), row.paper.get(column.name))
    return found


def _csv_cell(name: str, cell: Cell | None, paper: PaperValue | None) -> dict[str, object]:
    found: dict[str, object] = {}
    if cell is not None:
        found |= {name: cell.mean, f"{name}_low": cell.low, f"{name}_high": cell.high, f"{name}_over": cell.over}
        found |= {f"{name}_values": _listed([f"{run}={value!r}" for run, value in cell.values.items()])}
        found |= {f"{name}_computed_otherwise": cell.differs}
    if paper is not None:
        found |= {f"{name}_paper": paper.value, f"{name}_paper_differs": _listed(paper.differs)}
    return found


def _listed(texts: Sequence[str]) -> str:
    return "; ".join(texts)
