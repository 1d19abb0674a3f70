"""`etherdiff demo`: all that it names is there and opens; in the slow proofs, what it draws is the subject."""

import json
import re
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from etherdiff.eval.metrics import SUBJECT_METRICS
from etherdiff.images.writing import PADDING
from etherdiff.report import show_report
from etherdiff.run import train
from etherdiff.runs.result import read_result
from etherdiff.system.errors import UserError
from etherdiff.system.terminal import console
from etherdiff.use.demo import ENLARGED, SEEDS, SHOWN, run_demo

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("another_process")]


def test_all_that_it_names_is_there(tmp_path):
    with console.capture() as captured:
        run_demo(tmp_path / "demo", train, show_report, steps=2, denoising_steps=1)
    last = captured.get()[captured.get().index("Look at") :]
    named = [Path(found) for found in re.findall(r"^  (/\S+)", last, flags=re.M)]
    assert [path.name for path in named] == ["before-after.png", "report.html", "merged", "lora.safetensors"]
    sheet, report, merged, lora = named
    cell = 64 * ENLARGED + PADDING
    with Image.open(sheet) as image:
        assert image.width > 2 * SEEDS * cell
        assert image.height > (1 + len(SHOWN)) * cell
    assert "</html>" in report.read_text(encoding="utf-8")
    assert set(SUBJECT_METRICS) <= set(read_result(report.parent).scores)
    assert StableDiffusionPipeline.from_pretrained(merged).unet is not None
    assert all(key.startswith("lora_unet_") for key in load_file(lora))
    for command in ("train-dreambooth", "eval", "merge"):
        assert f"  etherdiff {command} " in last
    with pytest.raises(UserError, match="not empty"):
        run_demo(tmp_path / "demo", train, show_report)


@pytest.mark.slow
def test_what_it_draws_is_more_like_the_subject_than_what_the_base_draws(tmp_path):
    run_demo(tmp_path / "demo", train, show_report)
    result = json.loads((tmp_path / "demo/run/eval/metrics.json").read_text())
    ours, base = (found["scores"]["dino_held_out"] for found in (result, result["base"]))
    assert ours["low"] > base["high"]
