"""The live table and the lines of a sweep."""

import json

import pytest
from rich.console import Console
from sweeps.sweep_files import write_file

from etherdiff.config import SweepOptions
from etherdiff.sweeps.execute import Outcome
from etherdiff.sweeps.runs import write_state
from etherdiff.sweeps.sweep import Progress, last_row, plan_sweep

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def runs(tmp_path, cache):
    planned = plan_sweep(write_file(tmp_path / "mine.yaml", grid={"seed": [0, 1, 2, 3]}), SweepOptions(output=tmp_path / "out"))
    return [run for unit in planned.units for run in unit.runs]


def shown(progress, now: float) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(progress.render(now))
    return console.export_text()


def test_the_table_has_counts_and_a_row_for_what_is_worked_on(runs, capsys):
    progress = Progress(runs, finished=5, session="this")
    write_state(runs[0], {"status": "training", "session": "this"})
    write_state(runs[1], {"status": "training", "session": "this"})
    write_state(runs[2], {"status": "training", "session": "an earlier one"})
    runs[0].folder.mkdir(parents=True)
    rows = [json.dumps({"step": step, "loss": 0.5 / step}) for step in (1, 2)]
    (runs[0].folder / "metrics.jsonl").write_text("\n".join([*rows, '{"step": 3, "lo']))
    shown(progress, 100.0)
    write_state(runs[1], {"status": "scoring", "session": "this"})
    shown(progress, 130.0)
    text = shown(progress, 142.0)
    assert "5 done · 2 running · 2 waiting · 0 failed" in text
    assert [line.split() for line in text.splitlines()[2:]] == [
        [runs[0].name, "training", "2/3", "0.2500", "42"],
        [runs[1].name, "scoring", "0/3", "12"],
    ]
    progress.update([Outcome(runs[0].name, None, 1, 7.4), Outcome(runs[1].name, "ended with status 1:\nNaN", 2)])
    assert "6 done · 0 running · 2 waiting · 1 failed" in shown(progress, 143.0)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"[6/9] {runs[0].name}: done in 7 s",
        f"[7/9] {runs[1].name}: failed, ended with status 1:",
    ]


def test_a_terminal_gets_the_table_and_the_lines(runs, monkeypatch, capsys):
    monkeypatch.setattr("etherdiff.sweeps.sweep.console", Console(stderr=True, force_terminal=True, width=160))
    with Progress(runs, 0, "this") as progress:
        progress.update([Outcome(runs[0].name, None, 1, 3)])
    said = capsys.readouterr().err
    assert "1 done · 0 running · 3 waiting" in said


def test_the_last_row_of_a_long_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_row(path) == {}
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1000)))
    assert last_row(path) == {"step": 999, "loss": 1.0}
    path.write_text("torn")
    assert last_row(path) == {}
