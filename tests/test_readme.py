"""The README's commands: those of the start are run, one after another; all others have to be understood."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from diffusers import StableDiffusionPipeline

from etherdiff.cli import app
from etherdiff.tiny import tiny_folder

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """The arguments of every `etherdiff …` (also under torchrun) in the code blocks."""
    found = []
    for block in re.findall(r"```(?:bash|console)\n(.*?)```", text, flags=re.S):
        for line in block.splitlines():
            called = re.match(r"(?:\$ )?(?:torchrun .* -m )?etherdiff (.*)", line)
            if called:
                words = shlex.split(called[1], comments=True)
                found.append(words[: words.index(">")] if ">" in words else words)
    return found


STARTING = commands(README[README.index("<!-- run by tests/test_readme.py") : README.index("## On Stable Diffusion")])


@pytest.mark.parametrize("arguments", commands(README), ids=" ".join)
def test_every_command_is_understood(arguments):
    command = typer.main.get_command(app)
    name, *rest = arguments
    context = command.make_context("etherdiff", [name], resilient_parsing=True)
    command.get_command(context, name).make_context(name, rest, parent=context)


@pytest.mark.parametrize(
    "shorter", [{"100": "10", "120": "12"}, pytest.param({}, marks=pytest.mark.slow)], ids=["quick", "as written"]
)
def test_the_start_works(shorter, tmp_path):
    assert len(STARTING) >= 5
    for written in STARTING:
        arguments = [shorter.get(word, word) for word in written]
        done = subprocess.run(
            [sys.executable, "-m", "etherdiff", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "pictures").glob("*/*.png"))) == 2
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "merged").unet is not None
    StableDiffusionPipeline.from_single_file(
        str(tmp_path / "merged.safetensors"), config=str(tiny_folder()), local_files_only=True
    )
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder())
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(str(tmp_path / "kohya.safetensors"))
