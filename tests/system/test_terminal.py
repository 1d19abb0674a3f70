"""What users wrote is printed as it is: prompts, names and labels hold brackets and colons that are no markup."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Group
from rich.table import Table

import etherdiff
from etherdiff import cli
from etherdiff.control.datasets import Report
from etherdiff.control.datasets import render as render_check
from etherdiff.eval.compare import ComparedRun, as_table
from etherdiff.system import terminal

TEXT = "dog [v2] in [/end] [bold]snow[/bold] :dog: [link=x]"


def titled(text):
    table = Table(title=text, caption=text)
    table.add_column(text)
    table.add_row(text)
    return table


@pytest.mark.parametrize("make", [str, titled, lambda text: Group(text, titled(text))])
def test_brackets_and_colons_are_text(make):
    written = io.StringIO()
    terminal.make_console(file=written, width=200).print(make(TEXT))
    assert written.getvalue().count(TEXT) == {str: 1, titled: 4}.get(make, 5)


def test_messages_and_bars_keep_them(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(terminal, "console", terminal.make_console(file=written, soft_wrap=True, width=200))
    terminal.warn(TEXT)
    list(terminal.track([1], TEXT))
    assert written.getvalue().count(TEXT) >= 2


def test_tables_of_commands_keep_them(capsys):
    """The two that lost them: names of runs in `compare`, of files in `data check`."""
    runs = [ComparedRun(name=f"run [{letter}]", facts={"subject": TEXT}, scores={}, differs={}) for letter in "ab"]
    report = Report(TEXT, "canny", {}, {"unreadable": [f"train/{TEXT}.png"]}, {}, None)
    for made, render in ((runs, as_table), (report, render_check)):
        cli._print(made, False, render)
    out = "".join(capsys.readouterr().out.split())
    for part in ("run[a]", "run[b]", "[/end]", ":dog:"):
        assert part in out


def test_every_console_is_made_in_one_place():
    package = Path(etherdiff.__file__).parent
    makers = [
        path.name for path in package.rglob("*.py") if re.search(r"\bConsole\(|rich import print", path.read_text("utf-8"))
    ]
    assert makers == ["terminal.py"]
