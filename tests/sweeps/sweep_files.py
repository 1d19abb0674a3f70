"""Small sweep files, and doing them with what stands in for etherdiff (program.py)."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from s2i_runs import scenes_folder

from etherdiff.config import SweepOptions
from etherdiff.sweeps import sweep

PROGRAM = (sys.executable, str(Path(__file__).with_name("program.py")))
TINY = {"base": "tiny", "subject": "candy_ball", "steps": 3, "tracker": "none", "eval_scores": "off"}
TINY_MAPS = {"base": "tiny", "palette": "tiny", "steps": 3, "tracker": "none"}


def write_file(path: Path, **content) -> Path:
    """A sweep file of runs on the tiny base, subject-driven ones unless told otherwise."""
    task = content.setdefault("task", "dreambooth")
    if task == "dreambooth":
        usual, scoring = TINY, {"num": 1, "steps": 2}
    elif task == "s2i":
        usual, scoring = TINY_MAPS | {"dataset": str(scenes(path.parent / "scenes"))}, {"num_maps": 2, "steps": 2}
    else:
        usual, scoring = {"base": "tiny"}, {}
    content["settings"] = usual | content.get("settings", {})
    content.setdefault("eval", scoring)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def scenes(folder: Path) -> Path:
    """Six pairs to train on and two to evaluate with."""
    return folder if folder.exists() else scenes_folder(folder)


def options(output: Path, **more) -> SweepOptions:
    """One run after another, unless told otherwise."""
    return SweepOptions(**({"output": output, "jobs": 1} | more))


def run_sweep(file: Path, options: SweepOptions, program: tuple[str, ...] = PROGRAM) -> Path:
    """The sweep, with what stands in for etherdiff."""
    return sweep.run_sweep(file, options, program)


def events(cache: Path) -> list[str]:
    """What was finished, in order: "trained NAME 1", "scored NAME 1"."""
    path = cache / "events"
    return path.read_text().splitlines() if path.exists() else []


START = (
    "import sys\nfrom pathlib import Path\nfrom etherdiff import cli\nfrom etherdiff.sweeps import sweep\n"
    "run, program = sweep.run_sweep, tuple(sys.argv.pop(1).split('|'))\n"
    "sweep.run_sweep = lambda file, options: run(file, options, program)\ncli.main()\n"
)


def start(file: Path, output: Path, *more: str) -> subprocess.Popen:
    """The program in a process of its own, with what stands in for etherdiff."""
    command = [sys.executable, "-c", START, "|".join(PROGRAM), "sweep", str(file), "--output", str(output), *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)
