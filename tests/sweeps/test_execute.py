"""One unit: its commands, their failures, and what is left when it is stopped at any moment."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from sweeps.sweep_files import PROGRAM, events, write_file

from etherdiff.config import SweepOptions
from etherdiff.runs.folder import RunFolder
from etherdiff.sweeps import execute
from etherdiff.sweeps.execute import Interrupted, RunSettings, run_unit
from etherdiff.sweeps.runs import Stage, expect_scores, read_state, stage_of
from etherdiff.sweeps.sweep import plan_sweep, write_files
from etherdiff.system.locks import run_lock

pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS = RunSettings(retries=1, session="this", program=PROGRAM)


@pytest.fixture
def unit_of(tmp_path, cache):
    """The only unit of a sweep file with this content, its recipes written."""

    def make(**content):
        planned = plan_sweep(write_file(tmp_path / "mine.yaml", **content), SweepOptions(output=tmp_path / "out"))
        (tmp_path / "out").mkdir(exist_ok=True)
        write_files(planned)
        (unit,) = planned.units
        return unit

    return make


def test_a_run_is_made_and_scored_once(unit_of, cache):
    unit = unit_of(resources={"cpus": 3})
    (run,) = unit.runs
    assert stage_of(run) is Stage.ABSENT
    (outcome,) = run_unit(unit, SETTINGS)
    assert (outcome.run, outcome.error, outcome.attempts) == (run.name, None, 1)
    assert stage_of(run) is Stage.FINISHED
    assert events(cache) == [f"trained {run.name} 3", f"scored {run.name} 3"]
    assert read_state(run)["status"] == "done"
    run_unit(unit, SETTINGS)  # as when Ray tries again what had been done: nothing happens
    assert len(events(cache)) == 2


def test_what_is_not_whole_is_resumed_and_what_is_not_scored_is_only_scored(unit_of, cache):
    unit = unit_of()
    (run,) = unit.runs
    run_unit(unit, SETTINGS)
    (run.folder / "adapter/weights").write_text("damaged")
    assert stage_of(run) is Stage.BEGUN
    run_unit(unit, SETTINGS)
    assert stage_of(run) is Stage.FINISHED
    assert run.log.read_text().count("resuming at step 3") == 1
    (run.folder / "eval/metrics.json").write_text("{}")  # somebody scored it otherwise
    assert stage_of(run) is Stage.MADE
    run_unit(unit, SETTINGS)
    assert [line.split()[0] for line in events(cache)] == ["trained", "scored", "trained", "scored", "scored"]


def test_scores_that_came_but_were_not_noted_are_taken(unit_of):
    """Of a sweep that was killed between the two, or of a command that was printed."""
    unit = unit_of()
    (run,) = unit.runs
    run_unit(unit, SETTINGS)
    noted = read_state(run)
    run.state.unlink()
    assert stage_of(run) is Stage.MADE  # nothing tells with which options
    scores = (run.eval / "metrics.json").read_text()
    (run.eval / "metrics.json").unlink()
    expect_scores(run, {"status": "scoring"})
    (run.eval / "metrics.json").write_text(scores)
    assert stage_of(run) is Stage.FINISHED
    run.state.write_text(json.dumps({**noted, "eval": {"num": 2}}))
    assert stage_of(run) is Stage.MADE


def test_another_configuration_is_refused(unit_of):
    unit = unit_of()
    (run,) = unit.runs
    run_unit(unit, SETTINGS)
    settings = RunFolder(run.folder).settings
    first, _, rest = settings.read_text().partition("\n")
    other = rest.replace("steps: 3", "steps: 4")

    settings.write_text(f"{first[:-64]}{hashlib.sha256(other.encode()).hexdigest()}\n{other}")
    (outcome,) = run_unit(unit, SETTINGS)
    assert outcome.attempts == 1
    assert "holds a run of another configuration (steps: 4, here 3)" in outcome.error


@pytest.mark.parametrize(
    ("identifier", "attempts", "error"),
    [
        ("unlucky", 2, None),
        ("hopeless", 2, "ended with status 1:\nstarting\nerror: the machine coughed"),
        ("wrong", 1, "ended with status 2:\nstarting\nerror: it is wrong"),
    ],
)
def test_what_failed_is_tried_again_unless_its_input_is_wrong(unit_of, identifier, attempts, error):
    unit = unit_of(settings={"identifier": identifier})
    (outcome,) = run_unit(unit, SETTINGS)
    assert (outcome.attempts, outcome.error) == (attempts, error)
    assert read_state(unit.runs[0])["status"] == ("done" if error is None else "failed")


def test_what_builds_on_a_failed_run_is_left_out(unit_of, cache):
    alternative = {"method": "oft", "identifier": "hopeless", "then": [{"steps": 2, "identifier": "sks"}]}
    first, second = run_unit(unit_of(runs=[alternative]), SETTINGS)
    assert second.error == f"left out: {first.run}, which it builds on, failed"
    assert events(cache) == []


def test_a_stop_lets_the_run_save_and_the_next_start_goes_on(unit_of, cache):
    unit = unit_of(settings={"identifier": "slow", "steps": 8})
    (run,) = unit.runs
    stopping = threading.Event()
    saved = run.folder / "checkpoints/step"

    def stop_after_some_steps():
        while not (saved.exists() and int(saved.read_text() or 0) >= 2):
            time.sleep(0.01)
        stopping.set()

    threading.Thread(target=stop_after_some_steps, daemon=True).start()
    with pytest.raises(Interrupted):
        run_unit(unit, SETTINGS, stopping.is_set)
    assert stage_of(run) is Stage.BEGUN
    assert not events(cache)
    run_unit(unit, SETTINGS)
    assert "resuming at step" in run.log.read_text()
    assert [json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()] == list(range(1, 9))


def test_a_folder_that_is_still_held_is_waited_for(unit_of, cache):
    unit = unit_of()
    (run,) = unit.runs
    held = run_lock(run.folder)
    held.__enter__()
    threading.Timer(0.5, held.__exit__, (None, None, None)).start()
    (outcome,) = run_unit(unit, SETTINGS)
    assert outcome.error is None


def test_a_folder_that_is_held_for_good_is_a_failure(unit_of, monkeypatch):
    monkeypatch.setattr(execute, "STOP_TIMEOUT", 0.3)
    unit = unit_of()
    with run_lock(unit.runs[0].folder):
        (outcome,) = run_unit(unit, SETTINGS)
    assert f"is in use by process {os.getpid()}" in outcome.error


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_command_gets_sigterm_when_its_parent_is_killed(tmp_path):
    child = (
        "import signal, sys, pathlib, time\n"
        "signal.signal(15, lambda *_: (pathlib.Path(sys.argv[1]).write_text('saved'), sys.exit()))\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(0.01)\n"
    )
    parent = (
        "import os, subprocess, sys\n"
        "wrapper = [sys.executable, '-m', 'etherdiff.sweeps.child_process', str(os.getpid())]\n"
        "subprocess.run([*wrapper, sys.executable, '-c', *sys.argv[1:]])"
    )
    mark = tmp_path / "mark"
    process = subprocess.Popen([sys.executable, "-c", parent, child, str(mark)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 20
    while not mark.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    process.stdout.close()


def test_a_command_whose_parent_is_gone_already_does_not_start():
    command = [sys.executable, "-m", "etherdiff.sweeps.child_process", "1", "echo", "started"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "")


def test_the_states_module_reads_what_is_damaged_as_nothing(unit_of):
    (run,) = unit_of().runs
    run.state.parent.mkdir(parents=True)
    for text in ("", "[]", "{"):
        run.state.write_text(text)
        assert read_state(run) == {}
