"""Terminal output of a sweep: a live table in a terminal, a line per finished run elsewhere."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from etherdiff.sweeps.execute import Outcome
from etherdiff.sweeps.runs import SweepRun, read_state
from etherdiff.system.terminal import console, say

TAIL = 4096
"""Bytes from the end of metrics.jsonl that hold its last line."""


class Progress:
    """Context that shows the progress; call `update` about once a second."""

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
