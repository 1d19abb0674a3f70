"""One prompt at every learning rate, a row per method, from a sweep that was made and scored (paper, Figure 8).

    python scripts/draw_rates.py sweeps/learning-rate-dreambooth --prompt 12 --output rates.png

A cross stands where a run diverged.
"""

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw

from etherdiff.images.writing import contact_sheet
from etherdiff.results.keys import value_of
from etherdiff.results.runs import collect

METHODS = "full,lora,oft,boft,naive,ether,ether+"
SIDE = 96
GREY = "#dddddd"


def main(
    sweep: Annotated[Path, typer.Argument(help="its folder")],
    output: Annotated[Path, typer.Option(help="the picture")],
    prompt: Annotated[int, typer.Option(help="its number among those of the evaluation, from 0")] = 0,
    methods: Annotated[str, typer.Option(metavar="METHOD,…")] = METHODS,
    lowest: Annotated[float, typer.Option(help="learning rate to begin with")] = 1e-4,
) -> None:
    """Draw the sheet."""
    drawn = {
        (str(run.config.method), float(str(value_of(run, "learning_rate")))): sorted(
            run.folder.eval.glob(f"images/{prompt:03d}-*/*.png")
        )
        for run in collect([sweep]).runs
    }
    names = [name for name in methods.split(",") if any(name == method for method, _ in drawn)]
    rates = sorted({rate for _, rate in drawn if rate >= lowest})
    if not names or not rates:
        raise typer.BadParameter(f"{sweep} holds no such methods or rates")
    if not any(drawn.values()):
        raise typer.BadParameter(f"no run of {sweep} has drawn prompt {prompt}; evaluations count theirs from 0")
    cells = []
    for name in names:
        for rate in rates:
            pictures = drawn.get((name, rate))
            cells.append(Image.open(pictures[0]).convert("RGB").resize((SIDE, SIDE)) if pictures else _cross())
    contact_sheet(cells, len(rates), names, [f"{rate:g}" for rate in rates], SIDE).save(output)


def _cross() -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(picture)
    draw.line((0, 0, SIDE, SIDE), fill=GREY, width=2)
    draw.line((0, SIDE, SIDE, 0), fill=GREY, width=2)
    return picture


if __name__ == "__main__":
    typer.run(main)
