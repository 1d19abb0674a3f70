"""A sweep of real runs on the tiny base whose process is killed at random moments: every run is made once, and none is lost.

    python benchmarks/sweep_kills.py [--runs 20] [--kills 3] [--jobs N] [--seed 0] [--output FOLDER] [--json FILE]

Each start is told nothing but the same command. At the end the logs tell how often a run's training and its scoring came to
their end: once each. Runs are as short as they can be, since it is the sweep that is tested.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

SETTINGS = {
    "base": "tiny",
    "subject": "candy_ball",
    "steps": 4,
    "checkpoint_every": 1,
    "prior_preservation": False,
    "eval_scores": "off",
    "tracker": "none",
    "device": "cpu",
}
EVAL = {"num": 1, "steps": 1, "base": False, "metrics": "clip_t"}
TRAINED = re.compile(r"^\S+: done\. Next:$", re.MULTILINE)
SCORED = re.compile(r"^(intervals: how|no intervals)", re.MULTILINE)
"""What training and scoring say last of all."""


def write_sweep(path: Path, runs: int) -> None:
    """A file that asks for so many runs: half of them of one method, half of another."""
    grid = {"seed": list(range(-(-runs // 2))), "method": ["ether", "lora"]}
    path.write_text(yaml.safe_dump({"task": "dreambooth", "settings": SETTINGS, "grid": grid, "eval": EVAL}, sort_keys=False))


def start(folder: Path, jobs: int | None) -> subprocess.Popen[bytes]:
    """The sweep, in a process of its own."""
    more = [] if jobs is None else ["--jobs", str(jobs)]
    command = [sys.executable, "-m", "etherdiff", "sweep", str(folder / "runs.yaml"), "--output", str(folder / "sweep"), *more]
    environment = {**os.environ, "ETHERDIFF_CACHE": str(folder / "cache")}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def endings(folder: Path) -> dict[str, dict[str, int]]:
    """Of each run that was begun: how often its training and its scoring came to their end."""
    found = {}
    for log in sorted((folder / "sweep/logs").glob("*.log")):
        text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        scores = folder / "sweep/runs" / log.stem / "eval/metrics.json"
        # one that was killed when it had written its scores, and had only to print them, has scored
        scored = max(len(SCORED.findall(text)), int(scores.is_file()))
        found[log.stem] = {"trained": len(TRAINED.findall(text)), "scored": scored}
    return found


def done(folder: Path) -> int:
    """How many trainings and scorings came to their end."""
    return sum(count for run in endings(folder).values() for count in run.values())


def kill_when(process: subprocess.Popen[bytes], folder: Path, enough: int, delay: float) -> None:
    """SIGKILL, some seconds after so many trainings and scorings."""
    while done(folder) < enough:
        if process.poll() is not None:
            sys.exit(f"the sweep ended with status {process.returncode}: see {folder / 'log.txt'}")
        time.sleep(0.2)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


def prove(folder: Path, runs: int, kills: int, jobs: int | None, seed: int) -> dict[str, Any]:
    """Do it; figures. AssertionError where a run is lost or was made twice."""
    chance, began = random.Random(seed), time.perf_counter()
    write_sweep(folder / "runs.yaml", runs)
    asked = 2 * -(-runs // 2)
    moments = sorted(chance.sample(range(1, 2 * asked - 1), kills))
    for moment in moments:
        kill_when(start(folder, jobs), folder, moment, chance.uniform(0, 10))
        print(f"killed after {done(folder)} of {2 * asked} trainings and scorings", flush=True)
    status = start(folder, jobs).wait()
    assert status == 0, f"the last start ended with status {status}: see {folder / 'log.txt'}"
    found = endings(folder)
    assert len(found) == asked, f"{len(found)} runs of {asked}"
    wrong = {name: counts for name, counts in found.items() if counts != {"trained": 1, "scored": 1}}
    assert not wrong, f"not once each: {wrong}"
    resumed = sum("resuming at step" in log.read_text(errors="replace") for log in (folder / "sweep/logs").glob("*.log"))
    seconds = round(time.perf_counter() - began)
    return {"runs": asked, "kills": kills, "killed_after": moments, "resumed_from_a_checkpoint": resumed, "seconds": seconds}


def main() -> None:
    """Read the command line, print figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--jobs", type=int, help="runs at a time; 1: without Ray")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a new folder, to look at afterwards")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)
        folder.mkdir(exist_ok=True)
        figures = prove(folder.absolute(), arguments.runs, arguments.kills, arguments.jobs, arguments.seed)
    print(json.dumps(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
