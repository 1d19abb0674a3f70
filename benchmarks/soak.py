"""A tiny run that is killed and resumed at random moments, with files corrupted in between: nothing may be lost.

    python benchmarks/soak.py --kills 50 [--seed 0] [--json FILE]

At the end its weights, metrics and last checkpoint have to be those of a run that nobody disturbed, byte for byte, and no
file may lie around that such a run does not leave. Figures are printed, and with --json written.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from etherdiff.runs.folder import RunFolder, is_sealed
from etherdiff.tiny.world import render_folder
from etherdiff.train.checkpoint import newest_checkpoint

STEPS_PER_KILL = 12
SIGNALS = (signal.SIGKILL,) * 4 + (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
RESUMABLE = (
    "checkpoints/*/*",
    "metrics.jsonl",
    "run.yaml",
    "cost.json",
    "adapter/*",
    "../cache/*/*.safetensors",
    "../cache/*/*/*.png",
)
"""What may be corrupted: all that resuming reads or makes anew. Sample images and the tracker's files are results."""


def harm(path: Path, chance: random.Random) -> str:
    """Corrupt a file in one of the ways that disks do; says which."""
    content = bytearray(path.read_bytes())
    kind = chance.choice(["bit", "truncated", "zeros", "gone"]) if content else "gone"
    if kind == "gone":
        path.unlink()
        return kind
    at = chance.randrange(len(content))
    if kind == "bit":
        content[at] ^= 1 << chance.randrange(8)
    elif kind == "truncated":
        del content[at:]
    else:
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    path.write_bytes(content)
    return kind


class Soak:
    """One run and what is done to it."""

    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self.folder, self.kills, self.chance = folder, kills, random.Random(seed)
        self.environment = {**os.environ, "ETHERDIFF_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        self.steps = max(60, kills * STEPS_PER_KILL)
        self.figures: dict[str, int] = {}

    def count(self, what: str) -> None:
        self.figures[what] = self.figures.get(what, 0) + 1

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "etherdiff", *arguments]
        log = (self.folder / "log.txt").open("a", encoding="utf-8")
        return subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, text=True)

    def training(self, output: Path) -> list[str]:
        settings = (
            "class_images=3 class_sampling_steps=2 checkpoint_every=5 eval_every=20 keep=4 ema_decay=0.9 caption_dropout=0.2"
        )
        settings += (
            f" lr_schedule=cosine sample_every={self.steps // 2} sample_count=1 flip=true class_noun=ball tracker=tensorboard"
        )
        options = [part for setting in settings.split() for part in ("--set", setting)]
        return [
            *("train-dreambooth", "--base", "tiny", "--subject", str(self.folder / "ball"), "--device", "cpu"),
            *("--steps", str(self.steps), "--output", str(output), *options),
        ]

    def undisturbed(self) -> float:
        """Make the reference; seconds per step."""
        if self.start(*self.training(self.folder / "undisturbed")).wait() != 0:
            raise SystemExit(f"the undisturbed run failed: see {self.folder / 'log.txt'}")
        cost = json.loads((self.folder / "undisturbed" / "cost.json").read_text(encoding="utf-8"))
        return float(cost["seconds"]["train"]) / self.steps

    def disturb(self, run: Path, seconds_per_step: float) -> None:
        """Kill and resume at random moments, in starting up as well as in training; corrupt a file now and then."""
        killed = 0
        while killed < self.kills:
            before = self.metrics_time(run)
            begun = (run / "run.yaml").exists() or (run / "checkpoints").exists()
            process = self.start(*(["resume", str(run)] if begun else self.training(run)))
            in_training = self.chance.random() < 0.85  # else somewhere in starting up
            while in_training and process.poll() is None and self.metrics_time(run) == before:
                time.sleep(0.02)
            time.sleep(self.chance.uniform(0, 2 * STEPS_PER_KILL * seconds_per_step if in_training else 8))
            chosen = self.chance.choice(SIGNALS)
            if process.poll() is None:
                process.send_signal(chosen)
                self.count(chosen.name)
                killed += 1
            status = process.wait()
            if status not in (0, -chosen, 128 + chosen):
                raise SystemExit(f"a run that was sent {chosen.name} left with status {status}: see {self.folder / 'log.txt'}")
            if status == 0:
                self.count("finished before its kill")
            if self.chance.random() < 0.4:
                self.corrupt(run)

    @staticmethod
    def metrics_time(run: Path) -> int:
        path = run / "metrics.jsonl"
        return path.stat().st_mtime_ns if path.exists() else 0

    def corrupt(self, run: Path) -> None:
        """Harm one file, once there is a checkpoint to come back from and a second one in case it is harmed itself."""
        if len(list((run / "checkpoints").glob("step-*"))) < 2:
            return
        path = self.chance.choice(sorted(path for pattern in RESUMABLE for path in run.glob(pattern) if path.is_file()))
        self.count(f"{harm(path, self.chance)}: {path.parent.name if path.parent != run else path.name}")

    def check(self, run: Path) -> list[str]:
        """What is not as in the undisturbed run."""
        reference, wrong = self.folder / "undisturbed", []
        last = f"checkpoints/step-{self.steps:06d}"
        names = [f"{last}/{name}.safetensors" for name in ("parameters", "optimizer", "ema")] + ["metrics.jsonl"]
        names += [str(path.relative_to(reference)) for path in sorted((reference / "adapter").iterdir())]
        names += [str(path.relative_to(reference)) for path in sorted((reference / "samples").rglob("*.png"))]
        for name in names:
            if not (run / name).exists():
                wrong.append(f"{name} is missing")
            elif (run / name).read_bytes() != (reference / name).read_bytes():
                wrong.append(f"{name} differs")
        newest, passed_over = newest_checkpoint(RunFolder(run).checkpoints)
        if newest is None or newest.name != Path(last).name or passed_over:
            wrong.append(f"the newest whole checkpoint is {newest}, not {last} ({passed_over})")
        if not is_sealed(run / "run.yaml"):
            wrong.append("run.yaml is damaged")
        return wrong + [f"{path} is left over" for path in self.strays(run)]

    def strays(self, run: Path) -> list[Path]:
        """Files that an undisturbed run does not leave: in its folder (a stop may leave its own checkpoint), in the cache."""
        known = {path.relative_to(self.folder / "undisturbed") for path in (self.folder / "undisturbed").rglob("*")}
        places = [
            path.relative_to(run) for path in run.rglob("*") if not path.match("checkpoints/*") and not path.match("events.*")
        ]
        strays = [run / place for place in places if place not in known and place.parts[0] != "checkpoints"]
        strays += [path for path in (run / "checkpoints").iterdir() if not path.name.startswith("step-")]
        return strays + list((self.folder / "cache").rglob(".*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="etherdiff-soak-") as name:
        soak = Soak(Path(name), options.kills, options.seed)
        render_folder("candy_ball", soak.folder / "ball")
        seconds_per_step = soak.undisturbed()
        run = soak.folder / "run"
        soak.disturb(run, seconds_per_step)
        log = soak.folder / "log.txt"
        if soak.start("resume", str(run)).wait() != 0:
            raise SystemExit(f"the last resume failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
        wrong = soak.check(run)
        said = log.read_text(encoding="utf-8")
    soak.figures |= {what: said.count(text) for what, text in SAID.items()}
    figures = {"kills": options.kills, "steps": soak.steps, "seed": options.seed, "seconds": round(time.monotonic() - began)}
    figures |= dict(sorted(soak.figures.items()))
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if wrong:
        raise SystemExit("\n".join(["NOT THE SAME AS AN UNDISTURBED RUN:", *wrong]))
    print("the same weights, metrics and last checkpoint as the undisturbed run, byte for byte; nothing lost, no stray files")


SAID = {
    "resumed from a checkpoint": "resuming at step",
    "damaged checkpoints passed over": "passed over checkpoint",
    "run.yaml put back": "put back from",
    "tracebacks": "Traceback (most recent call last)",
}


if __name__ == "__main__":
    main()
