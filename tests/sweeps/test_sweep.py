"""A whole sweep, one run after another: every run once, failures apart, and going on after anything."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import yaml
from sweeps.sweep_files import PROGRAM, events, options, run_sweep, start, wait_until, write_file

from etherdiff import cli
from etherdiff.config import SweepOptions, read_config
from etherdiff.sweeps import sweep as sweep_module
from etherdiff.sweeps.sweep import dry_run, print_commands
from etherdiff.system.errors import RunError, UserError
from etherdiff.system.locks import run_lock

pytestmark = pytest.mark.filterwarnings("ignore")


def counts(cache) -> dict[str, int]:
    """What was done -> how often, whichever run."""
    return Counter(line.split()[0] for line in events(cache))


def test_every_run_once_and_then_nothing(tmp_path, cache, capsys):
    file = write_file(tmp_path / "mine.yaml", grid={"seed": [0, 1]}, runs=[{"method": "ether"}, {"method": "lora"}])
    output = run_sweep(file, options(tmp_path / "out"))
    assert counts(cache) == {"trained": 4, "scored": 4}
    assert len({line.split()[1] for line in events(cache)}) == 4
    names = [line.split(":")[0] for line in dry_run(file, options(output))]
    assert sorted(path.name for path in (output / "runs").iterdir()) == sorted(names)
    recipe = yaml.safe_load((output / "recipes" / f"{names[0]}.yaml").read_text())
    assert (recipe["method"], recipe["seed"], recipe["class_noun"]) == ("ether", 0, "ball")
    assert (output / "sweep.yaml").read_text() == file.read_text()
    capsys.readouterr()
    run_sweep(file, options(output))
    assert counts(cache) == {"trained": 4, "scored": 4}
    assert "4 runs, 4 finished already" in capsys.readouterr().err


def test_other_scores_and_more_runs(tmp_path, cache, capsys):
    file = write_file(tmp_path / "mine.yaml", grid={"seed": [0, 1]})
    run_sweep(file, options(tmp_path / "out"))
    write_file(file, grid={"seed": [1, 2]}, eval={"num": 2})
    run_sweep(file, options(tmp_path / "out"))
    assert counts(cache) == {"trained": 3, "scored": 4}
    assert re.search(r"holds 1 runs that the file does not ask for \(any more\), such as 0-", capsys.readouterr().err)
    write_file(file, grid={"seed": [1, 2]}, eval=False)
    run_sweep(file, options(tmp_path / "out"))
    assert counts(cache) == {"trained": 3, "scored": 4}


def test_a_run_on_top_of_another(tmp_path, cache):
    file = write_file(tmp_path / "mine.yaml", task="s2i", runs=[{"method": "oft", "then": [{"refit": "{previous}"}]}])
    output = run_sweep(file, options(tmp_path / "out"))
    first, second = dict.fromkeys(line.split()[1] for line in events(cache))
    assert yaml.safe_load((output / "runs" / second / "run.yaml").read_text())["refit"] == str(output / "runs" / first)


def test_failures_are_reported_and_the_others_done(tmp_path, cache, capsys):
    kinds = ["hopeless", "sks", "wrong", "unlucky"]
    file = write_file(tmp_path / "mine.yaml", grid={"identifier": kinds})
    with pytest.raises(RunError) as error:
        run_sweep(file, options(tmp_path / "out"))
    assert counts(cache) == {"trained": 2, "scored": 2}
    text = str(error.value)
    assert text.startswith("2 of 4 runs failed and are left out; the same command tries them again:")
    assert re.search(r"hopeless-\w{8} \(tried 2 times\)\n    ended with status 1:\n", text)
    assert re.search(r"wrong-\w{8} \(tried 1 times\)", text)
    assert "[4/4]" in capsys.readouterr().err
    with pytest.raises(RunError, match="2 of 4 runs failed"):
        run_sweep(file, options(tmp_path / "out", retries=0))
    assert counts(cache) == {"trained": 2, "scored": 2}


def test_commands_for_slurm_do_the_same(tmp_path, cache):
    runs = [{"method": "oft"}, {"method": "ether", "identifier": "unlucky"}]
    file = write_file(tmp_path / "mine.yaml", runs=runs, resources={"cpus": 2})
    lines = print_commands(file, options(tmp_path / "out"))
    assert not (tmp_path / "out/runs").exists()
    assert [line.count(" && ") for line in lines] == [1, 1]
    theirs = shlex.join([sys.executable, "-m", "etherdiff"])
    do = [subprocess.run(["bash", "-c", line.replace(theirs, shlex.join(PROGRAM))], capture_output=True) for line in lines]
    assert [done.returncode for done in do] == [0, 1]
    assert [line.split(": ")[1] for line in dry_run(file, options(tmp_path / "out"))] == ["finished", "to be resumed"]
    (line,) = print_commands(file, options(tmp_path / "out"))
    assert "-m etherdiff resume " in line
    subprocess.run(["bash", "-c", line.replace(theirs, shlex.join(PROGRAM))], check=True)
    assert print_commands(file, options(tmp_path / "out")) == []
    run_sweep(file, options(tmp_path / "out"))
    assert Counter(line.split()[0] for line in events(cache)) == {"trained": 2, "scored": 2}
    assert {line.split()[2] for line in events(cache)} == {"2"}


def test_mistakes_come_before_anything_is_written(tmp_path, cache):
    file = write_file(tmp_path / "mine.yaml", grid={"subject": ["candy_ball", "nobody"]})
    with pytest.raises(UserError, match="nobody"):
        run_sweep(file, options(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError) as error:
        read_config(SweepOptions, None, [], {"jobs": 0, "retries": -1, "print_commands": True, "dry_run": True})
    assert [problem.split(":")[0] for problem in error.value.problems] == ["jobs", "retries", "dry_run"]


def test_a_folder_of_something_else_is_refused(tmp_path, cache):
    file = write_file(tmp_path / "mine.yaml")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").touch()
    with pytest.raises(UserError, match="holds something that is not a sweep"):
        run_sweep(file, options(tmp_path / "photos"))


def test_one_sweep_per_folder(tmp_path, cache):
    file = write_file(tmp_path / "mine.yaml")
    with run_lock(tmp_path / "out"), pytest.raises(UserError, match="is in use by process"):
        run_sweep(file, options(tmp_path / "out"))


def test_what_needs_ray_says_so(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(sweep_module, "has_ray", lambda: False)
    file = write_file(tmp_path / "mine.yaml")
    for more in ({"jobs": 2}, {"address": "auto"}):
        with pytest.raises(UserError, match=r"several runs at a time need Ray: pip install 'etherdiff\[ray\]'"):
            run_sweep(file, options(tmp_path / "out", **more))
    run_sweep(file, options(tmp_path / "out", jobs=None))
    assert counts(cache) == {"trained": 1, "scored": 1}


def test_the_command(tmp_path, cache, monkeypatch, capsys):
    file = write_file(tmp_path / "mine.yaml")

    def status(*arguments):
        monkeypatch.setattr(sys, "argv", ["etherdiff", "sweep", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code or 0

    assert status(file, "--output", tmp_path / "out", "--dry-run") == 0
    assert re.fullmatch(r"run-\w{8}: to do\n", capsys.readouterr().out)
    assert status(file, "--output", tmp_path / "out", "--print-commands") == 0
    assert " && " in capsys.readouterr().out
    assert status(file, "--dry-run", "--print-commands") == 2
    assert status(tmp_path / "none.yaml") == 2


# --- With etherdiff itself -----------------------------------------------------------------------------------------------

REAL = {
    "dreambooth": {"settings": {"prior_preservation": False, "steps": 2}, "eval": {"num": 1, "steps": 1, "base": False}},
    "s2i": {
        "settings": {"batch_size": 2, "steps": 2},
        "runs": [{"method": "oft", "then": [{"refit": "{previous}", "steps": 1}]}, {"method": "none"}],
    },
    "perturb": {
        "settings": {"subject": "candy_ball", "method": "naive", "distance": 1},
        "eval": {"num": 1, "steps": 1, "base": False, "metrics": "clip_t"},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("task", REAL)
def test_what_etherdiff_makes_is_recognised_as_what_was_planned(tmp_path, cache, task):
    file = write_file(tmp_path / "mine.yaml", task=task, **REAL[task])
    output = run_sweep(file, options(tmp_path / "out"), program=())
    logs = {path: path.read_bytes() for path in (output / "logs").iterdir()}
    assert len(logs) == (3 if task == "s2i" else 1)
    assert all((output / "runs" / path.stem / "eval/metrics.json").is_file() for path in logs)
    assert {line.split(": ")[1] for line in dry_run(file, options(output))} == {"finished"}
    run_sweep(file, options(output), program=())
    assert {path: path.read_bytes() for path in logs} == logs


# --- Killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, cache, number):
    file = write_file(tmp_path / "mine.yaml", settings={"identifier": "slow", "steps": 12}, grid={"seed": [0, 1]})
    process = start(file, tmp_path / "out", "--jobs", "1")
    wait_until(lambda: list((tmp_path / "out").glob("runs/*/checkpoints/step")), process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "stopped: 0 of 2 runs are finished, those at work have saved. Go on with the same command" in said
    assert events(cache) == []
    run_sweep(file, options(tmp_path / "out"))
    assert counts(cache) == {"trained": 2, "scored": 2}
    assert any("resuming at step" in path.read_text() for path in (tmp_path / "out/logs").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--jobs", "1"), ("--jobs", "2")], ids=["one after another", "on Ray"])
def test_killed_three_times_at_random_moments_and_finished(tmp_path, cache, more):
    """24 runs: each trained once and scored once, none lost, none twice."""
    if more == ("--jobs", "2"):
        pytest.importorskip("ray")
    settings = {"identifier": "slow", "steps": 4}
    grid = {"seed": list(range(6)), "method": ["ether", "ether+", "lora", "oft"]}
    file = write_file(tmp_path / "mine.yaml", settings=settings, grid=grid)
    dice = random.Random(os.getpid())
    for _ in range(3):
        process, before = start(file, tmp_path / "out", *more), len(events(cache))
        wait_until(lambda before=before: len(events(cache)) > before + dice.randrange(6, 12), process)
        time.sleep(dice.random())
        process.kill()
        process.communicate()
    process = start(file, tmp_path / "out", *more)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    done = Counter(line.rsplit(" ", 1)[0] for line in events(cache))
    names = {path.name for path in (tmp_path / "out/runs").iterdir()}
    assert len(names) == 24
    assert done == {f"{what} {name}": 1 for what in ("trained", "scored") for name in names}
