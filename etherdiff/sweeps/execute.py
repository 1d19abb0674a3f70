"""Run a unit: its commands in processes of their own, each tried again if it failed for a transient reason."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from etherdiff.sweeps.runs import Stage, SweepRun, Unit, confirm_scores, expect_scores, stage_of, write_state
from etherdiff.system.errors import UserError
from etherdiff.system.files import remove_temporary
from etherdiff.system.locks import run_lock

WRONG_INPUT = 2
"""Exit status of a command whose input is wrong: trying again changes nothing."""
STOP_TIMEOUT = 60.0
"""Seconds for a process to save and end after it was asked to, and for another process to release a run folder."""
LAST_LINES = 12


@dataclass(frozen=True)
class RunSettings:
    """Common settings of all units of one start of a sweep."""

    retries: int
    """Times that a failed command is tried again."""
    session: str
    """Identifier of this start, which tells its states from those of an earlier one."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables on top of those where the unit runs."""
    program: tuple[str, ...] = ()
    """Program that runs instead of this interpreter's etherdiff."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run."""

    run: str
    error: str | None = None
    """Last lines of the command that failed; None if the run is finished."""
    attempts: int = 1
    seconds: float = 0.0


class CommandError(Exception):
    """A command ended with another status than 0."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    """The sweep is stopping, and so did the command."""


def run_unit(unit: Unit, settings: RunSettings, stopping: Callable[[], bool] = lambda: False, place: str = "") -> list[Outcome]:
    """Finish a unit; return an outcome for each of its runs. Interrupted if `stopping` became true.

    place: where this runs, for the logs, in addition to the machine's name.
    """
    outcomes: list[Outcome] = []
    for run in unit.runs:
        if outcomes and outcomes[-1].error is not None:
            outcome = Outcome(run.name, f"left out: {outcomes[-1].run}, which it builds on, failed", 0)
            write_state(run, {"status": "failed", "session": settings.session, "attempts": 0, "error": outcome.error})
        else:
            outcome = _UnitRunner(
                run, unit, settings, stopping, " ".join(filter(None, [socket.gethostname(), place]))
            ).until_done()
        outcomes.append(outcome)
    return outcomes


class _UnitRunner:
    """Runs one run of a unit."""

    def __init__(self, run: SweepRun, unit: Unit, settings: RunSettings, stopping: Callable[[], bool], place: str) -> None:
        self.run, self.unit, self.settings, self.stopping, self.place = run, unit, settings, stopping, place
        self.began = time.monotonic()
        self.attempts = 0

    def until_done(self) -> Outcome:
        """Try as often as the settings say."""
        while True:
            self.attempts += 1
            try:
                self._complete()
            except (CommandError, UserError, OSError) as error:
                is_wrong = isinstance(error, UserError) or (isinstance(error, CommandError) and error.status == WRONG_INPUT)
                if is_wrong or self.attempts > self.settings.retries:
                    write_state(self.run, self._state("failed", error=str(error)))
                    return self._outcome(str(error))
            else:
                confirm_scores(self.run, self._state("done"))
                return self._outcome(None)

    def _outcome(self, error: str | None) -> Outcome:
        return Outcome(self.run.name, error, self.attempts, time.monotonic() - self.began)

    def _complete(self) -> None:
        """Take the run from where it is to its end."""
        self._wait_until_free()
        stage = stage_of(self.run)
        if stage < Stage.MADE:
            write_state(self.run, self._state("training"))
            if stage is Stage.ABSENT and self.run.folder.is_dir():
                # left by a process that was killed before it wrote its first file
                remove_temporary(self.run.folder, also_of_live_processes=True)
            self._command(self.run.resume_command() if stage is Stage.BEGUN else self.run.make_command())
            stage = stage_of(self.run)
            if stage < Stage.MADE:
                raise CommandError(1, f"{self.run.folder} is not whole after training")
        if stage < Stage.FINISHED:
            expect_scores(self.run, self._state("scoring"))
            self._command(self.run.score_command())

    def _state(self, status: str, **more: Any) -> dict[str, Any]:
        common = {"session": self.settings.session, "attempts": self.attempts, "place": self.place}
        return {"status": status, **common, **more}

    def _wait_until_free(self) -> None:
        """Wait for a killed sweep's command, which may still be saving. UserError if another process keeps the folder."""
        end = time.monotonic() + STOP_TIMEOUT
        for folder in (self.run.folder, self.run.eval):
            while folder.is_dir():
                try:
                    with run_lock(folder):
                        break
                except UserError:
                    if time.monotonic() > end:
                        raise
                    self._pause(0.2)

    def _pause(self, seconds: float) -> None:
        if self.stopping():
            raise Interrupted
        time.sleep(seconds)

    def _command(self, arguments: list[str]) -> None:
        """Run etherdiff to its end. CommandError if its status is not 0."""
        program = self.settings.program or (sys.executable, "-m", "etherdiff")
        wrapper = [sys.executable, "-m", "etherdiff.sweeps.child_process", str(os.getpid())] if sys.platform == "linux" else []
        command = [*wrapper, *program, *arguments]
        environment = {**os.environ, **self.settings.environment, **self.unit.environment()}
        self.run.log.parent.mkdir(parents=True, exist_ok=True)
        with self.run.log.open("ab") as log:
            log.write(f"--- {self.place}: etherdiff {' '.join(arguments)}\n".encode())
            log.flush()
            beginning = log.tell()
            # a session of its own: Ctrl-C is for the sweep, which passes it on once
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same, on Windows
            )
            try:
                while process.poll() is None:
                    self._pause(0.05)
            finally:
                end_process(process)
        if process.returncode != 0:
            raise CommandError(process.returncode, self._last_lines(process.returncode, beginning))

    def _last_lines(self, status: int, beginning: int) -> str:
        text = self.run.log.read_bytes()[beginning:].decode("utf-8", errors="replace")
        lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.splitlines()]
        output = "\n".join([line for line in lines if line][-LAST_LINES:]) or "it said nothing"
        how = f"ended with status {status}" if status > 0 else f"was killed by signal {-status}"
        return f"{how}:\n{output}"


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to save and end, if it has not ended yet."""
    if process.poll() is not None:
        return
    if os.name == "nt":  # terminate() gives no time to save there
        process.send_signal(signal.CTRL_BREAK_EVENT)  # type: ignore[attr-defined]
    else:
        process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
