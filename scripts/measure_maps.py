"""How well maps of the tiny world are followed: ETHER+ and the control encoder alone, on test maps (about 25 minutes each).

    python scripts/measure_maps.py --json maps.json --picture maps.png

Each method is trained and scored with the command line as it stands, once with the control in both halves of guidance, as
in the paper, and once with `--guide-control`; what is finished is not done again.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from etherdiff.images.reading import read_image
from etherdiff.images.writing import contact_sheet
from etherdiff.runs.model import open_control_run, run_dataset
from etherdiff.system.terminal import quiet_libraries, say

TRAINING = (
    "--base tiny --dataset tiny --steps 800 --batch-size 16 --lr-schedule cosine --learning-rate 5e-3 "
    "--encoder-learning-rate 5e-3 --debiased-estimation --mixed-precision bf16 --eval-every 200"
)
ALSO = {"none": "--encoder-learning-rate 2e-3"}  # at 5e-3 the encoder, alone, soon says the same of every map
SCORING = "--num-maps 300 --steps 20 --batch-size 10"
GUIDANCE = {"as in the paper": "--guidance-scale 3", "guided": "--guidance-scale 4 --guide-control"}
BESIDE = "--shuffle-maps --without-control --real"  # of ETHER+ guided only: what it says of the others is the same
KEPT = ("mean", "low", "high")
SHOWN = 8
ENLARGED = 2


def main(
    methods: Annotated[list[str] | None, typer.Argument(help="names [default: ether+ none]")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="where to write the figures")] = None,
    runs: Annotated[Path, typer.Option(help="where the run folders go: maps-METHOD")] = Path("runs"),
    picture: Annotated[Path | None, typer.Option(help="where to save a sheet of the first method's maps")] = None,
) -> None:
    """Train and score each method; print its scores, and those of what stands beside."""
    quiet_libraries()
    names = methods or ["ether+", "none"]
    figures: dict[str, Any] = {"training": TRAINING, "also": ALSO, "scoring": SCORING, "guidance": GUIDANCE}
    for how in GUIDANCE:
        figures[how] = {name: _measure(name, runs / f"maps-{name}", how) for name in names}
    text = json.dumps(figures, indent=2)
    say(text)
    if json_file:
        json_file.write_text(text + "\n", encoding="utf-8")
    if picture:
        _sheet(_guided(runs / f"maps-{names[0]}")).save(picture)


def _measure(name: str, run: Path, how: str) -> dict[str, Any]:
    if not (run / "control_encoder.sha256.json").exists():
        _etherdiff("train-s2i", "--method", name, "--output", str(run), *TRAINING.split(), *ALSO.get(name, "").split())
    if how == "guided":  # a run folder holds one set of scores
        run, trained = _guided(run), run
        if not run.exists():
            shutil.copytree(trained, run, ignore=shutil.ignore_patterns("eval", "checkpoints"))
    if not (run / "eval" / "metrics.json").exists():
        beside = BESIDE if (name, how) == ("ether+", "guided") else ""
        _etherdiff("eval", str(run), *SCORING.split(), *GUIDANCE[how].split(), *beside.split())
    result = json.loads((run / "eval" / "metrics.json").read_text(encoding="utf-8"))
    sets = {"images": result, **result.get("beside", {})}
    return {name: {score: {key: one[key] for key in KEPT} for score, one in of["scores"].items()} for name, of in sets.items()}


def _guided(run: Path) -> Path:
    return run.with_name(f"{run.name}-guided")


def _etherdiff(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "etherdiff", *arguments], check=True)


def _sheet(run: Path) -> Image.Image:
    """A column per map: control, what was drawn, and the real image."""
    _, config = open_control_run(run)
    assert config.resolution is not None
    dataset = run_dataset(config, config.data_root, config.resolution)
    drawn = sorted((run / "eval" / "images").glob("*/*.png"))[:SHOWN]
    pairs = [dataset.evaluation[int(path.stem)] for path in drawn]
    rows = [
        [Image.fromarray(dataset.signal.picture(pair.control, config.resolution)) for pair in pairs],
        [Image.open(path).convert("RGB") for path in drawn],
        [read_image(pair.image) for pair in pairs],
    ]
    side = config.resolution * ENLARGED
    cells = [picture.resize((side, side), Image.Resampling.NEAREST) for row in rows for picture in row]
    return contact_sheet(cells, SHOWN, ["map", config.method, "real image"], [pair.text for pair in pairs])


if __name__ == "__main__":
    typer.run(main)
