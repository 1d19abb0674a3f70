"""What stands in for etherdiff in tests of the sweep: run folders in a second, with all that a sweep looks at.

It keeps etherdiff's promises: a lock on the run folder, a checkpoint on SIGTERM, files that appear whole, `resume` and `eval`
that go on, status 2 for what is wrong. LEDGER/events gets a line for each thing that is finished. Its pace and its faults are
in the recipe, as `identifier`: "slow" sleeps between steps, "unlucky" fails once, "hopeless" always, "wrong" with status 2.
"""

import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

PAUSE = {"slow": 0.25}


def main() -> None:
    command, *rest = sys.argv[1:]
    {"resume": resume, "eval": evaluate}.get(command, train)(rest)


def train(arguments: list[str]) -> None:
    recipe, run = Path(arguments[1]), Path(arguments[3])
    run.mkdir(parents=True, exist_ok=True)
    with locked(run):
        if any(path.name != ".lock" for path in run.iterdir()):
            sys.exit(f"{run} is not empty")
        config = yaml.safe_load(recipe.read_text())
        text = yaml.safe_dump({**config, "output": str(run), "provenance": {"task": task_of(config)}})
        write(run / "run.yaml", f"# sha256 of what follows: {sha256(text.encode())}\n{text}")
        go_on(run, config)


def resume(arguments: list[str]) -> None:
    run = Path(arguments[0])
    with locked(run):
        go_on(run, yaml.safe_load((run / "run.yaml").read_text()))


def go_on(run: Path, config: dict) -> None:
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    saved = run / "checkpoints" / "step"
    saved.parent.mkdir(exist_ok=True)
    step = int(saved.read_text()) if saved.exists() else 0
    print(f"resuming at step {step}" if step else "starting", flush=True)
    misfortune(run, config.get("identifier", ""))
    while step < config["steps"] and not stopped:
        time.sleep(PAUSE.get(config.get("identifier", ""), 0.01))
        step += 1
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
        write(saved, str(step))
    if step < config["steps"]:
        sys.exit(128 + signal.SIGTERM)
    results = (["control_encoder"] if task_of(config) == "s2i" else []) + (["adapter"] if config["method"] != "none" else [])
    results += ["refitted_adapter"] if config.get("refit") else []
    for name in results:
        (run / name).mkdir(exist_ok=True)
        write(run / name / "weights", config["method"])
        write(run / f"{name}.sha256.json", json.dumps({"weights": sha256(config["method"].encode())}))
    write(run / "cost.json", json.dumps({"steps": step}))
    finished("trained", run)


def evaluate(arguments: list[str]) -> None:
    run = Path(arguments[0])
    (run / "eval").mkdir(exist_ok=True)
    with locked(run / "eval"):
        time.sleep(0.05)
        write(run / "eval" / "metrics.json", json.dumps({"options": arguments[1:], "at": time.time()}))
        finished("scored", run)


def misfortune(run: Path, kind: str) -> None:
    if kind == "wrong":
        print("error: it is wrong", file=sys.stderr)
        sys.exit(2)
    if kind == "hopeless" or (kind == "unlucky" and not (run / "unlucky").exists()):
        write(run / "unlucky", "")
        print("error: the machine coughed", file=sys.stderr)
        sys.exit(1)


def finished(what: str, run: Path) -> None:
    with (Path(os.environ["ETHERDIFF_CACHE"]) / "events").open("a") as file:
        file.write(f"{what} {run.name} {os.environ['OMP_NUM_THREADS']}\n")


def task_of(config: dict) -> str:
    return "s2i" if "dataset" in config else "dreambooth"


class locked:  # noqa: N801 - a function in all but name
    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"

    def __enter__(self) -> None:
        self.file = self.path.open("a")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"error: {self.path.parent} is in use", file=sys.stderr)
            sys.exit(2)

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        self.file.close()


def write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.new")
    partial.write_text(text)
    partial.replace(path)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    main()
