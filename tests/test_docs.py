"""README and documentation: commands are parsed, the start is run, links and generated pages hold, Sphinx has no warning."""

import importlib.util
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

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = sorted(path for path in (ROOT / "docs/results").iterdir() if path.is_dir())


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


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


COMMANDS = {tuple(words): name_of(path) for path in PAGES for words in commands(path.read_text(encoding="utf-8"))}
STARTING = commands((ROOT / "docs/start.md").read_text(encoding="utf-8").split("<!-- run by tests/test_docs.py")[1])


@pytest.mark.parametrize("arguments", [words for words in COMMANDS if words[0] != "--version"], ids=" ".join)
def test_every_command_is_understood(arguments):
    command = typer.main.get_command(app)
    name, *rest = arguments
    context = command.make_context("etherdiff", [name], resilient_parsing=True)
    command.get_command(context, name).make_context(name, rest, parent=context)


@pytest.mark.parametrize(
    "shorter", [{"100": "10", "120": "12"}, pytest.param({}, marks=pytest.mark.slow)], ids=["quick", "as written"]
)
def test_the_start_works(shorter, tmp_path):
    assert [arguments[0] for arguments in STARTING] == ["train-dreambooth", "generate", "merge", "export", "resume"]
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
    pipeline.load_lora_weights(str(tmp_path / "ball.safetensors"))


def test_programs_and_make_targets_that_are_named_are_there():
    text = "\n".join(path.read_text(encoding="utf-8") for path in [*PAGES, ROOT / "CONTRIBUTING.md"])
    programs = set(re.findall(r"(?:scripts|benchmarks)/\w+\.py", text))
    assert len(programs) > 5
    assert not [program for program in programs if not (ROOT / program).is_file()]
    targets = set(re.findall(r"(?:^ *|`)make ([a-z-]+)", text, flags=re.M))
    assert {"demo", "test", "docs"} <= targets
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    assert targets <= rules


def test_the_readme_is_a_page_and_says_what_was_not_run():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert "not run on a GPU" in "\n".join(lines[:20])


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    gone = [target for target in targets if not target.startswith("http") and not (path.parent / target).exists()]
    assert not gone


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_a_result_tells_date_commit_command_and_reading(folder):
    text = (folder / "index.md").read_text(encoding="utf-8")
    date = re.match(r"\d{4}-\d{2}-\d{2}", folder.name)
    assert date
    assert f"| date | {date[0]}" in text
    assert re.search(r"^\| commit \| `[0-9a-f, ]{7,}` \|$", text, flags=re.M)
    assert "```bash\n" in text
    assert "\n## Reading\n" in text
    assert folder.name in (folder.parent / "index.md").read_text(encoding="utf-8")


def test_the_generated_pages_are_what_the_code_says():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "scripts/make_reference.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, make in script.PAGES.items():
        written = (script.REFERENCE / name).read_text(encoding="utf-8")
        assert written == make().rstrip() + "\n", "write them again: python scripts/make_reference.py"


def test_sphinx_builds_without_a_warning(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        tmp_path / "doctrees",
        ROOT / "docs",
        tmp_path / "html",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html/reference/cli.html").is_file()
