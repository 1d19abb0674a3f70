"""Imports point down only (design, section 3), read from the sources."""

import ast
from pathlib import Path

import pytest

import etherdiff

PACKAGE = Path(etherdiff.__file__).parent
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "PIL", "huggingface_hub"}
MODULES = {
    ".".join(["etherdiff", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(name: str, at_module_level: bool = False) -> set[str]:
    """Full names of everything that a module imports, names taken out of a module included."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    nodes = tree.body if at_module_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports hide what is imported"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(part: str) -> list[str]:
    return [name for name in MODULES if name == part or name.startswith(f"{part}.")]


def reaches(names: set[str], *parts: str) -> set[str]:
    return {name for name in names for part in parts if name == part or name.startswith(f"{part}.")}


def etherdiff_(*parts: str) -> list[str]:
    return [f"etherdiff.{part}" for part in parts]


FORBIDDEN = {
    "etherdiff.adapters": etherdiff_("train", "eval", "run", "cli", "generate", "export", "models", "sampling", "diffusion"),
    "etherdiff.train": etherdiff_("run", "cli", "generate", "export", "demo", "dryrun", "eval"),
    "etherdiff.eval": etherdiff_("run", "cli", "train"),
    "etherdiff.control": etherdiff_("run", "cli", "train", "eval"),
    "etherdiff.tiny": etherdiff_("run", "cli", "train", "eval", "generate", "export", "models"),
    "etherdiff.models": etherdiff_("run", "cli", "train", "eval", "generate", "export", "adapters"),
    "etherdiff.diffusion": etherdiff_("run", "cli", "train", "eval", "generate", "export", "adapters", "models"),
    "etherdiff.config": etherdiff_("run", "cli", "train", "adapters", "models"),
    "etherdiff.jobs": etherdiff_("run", "cli", "demo", "generate", "export"),
    "etherdiff.report": etherdiff_("run", "cli", "train", "jobs"),
    "etherdiff.run": etherdiff_("cli", "demo"),
    "etherdiff.generate": etherdiff_("cli", "run", "train"),
    "etherdiff.export": etherdiff_("cli", "run", "train", "generate"),
    "etherdiff.images": ["torch", "diffusers", *etherdiff_("models", "train", "run", "cli")],
}


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_point_down(part):
    for name in inside(part):
        wrong = reaches(imported(name), *FORBIDDEN[part])
        assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


def test_nothing_but_the_program_imports_the_command_line():
    users = [name for name in MODULES if reaches(imported(name), "etherdiff.cli")]
    assert users == ["etherdiff.__main__"]


def test_adapters_know_nothing_of_pipelines():
    for name in inside("etherdiff.adapters"):
        wrong = {found for found in imported(name) if "Pipeline" in found or found.startswith("diffusers.pipelines")}
        assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


def test_the_maths_stands_alone():
    etherdiffs = reaches(imported("etherdiff.adapters.reflection"), "etherdiff", "diffusers", "peft", "transformers")
    assert not etherdiffs


@pytest.mark.parametrize("name", ["etherdiff", "etherdiff.__main__", "etherdiff.cli", "etherdiff.config", "etherdiff.errors"])
def test_what_the_help_needs_imports_nothing_heavy(name):
    """By itself or through another module of ours."""
    seen, waiting = set(), {name}
    while waiting:
        module = waiting.pop()
        seen.add(module)
        found = imported(module, at_module_level=True)
        assert not reaches(found, *HEAVY), f"{module} imports {reaches(found, *HEAVY)}"
        ours = {other for other in MODULES for one in found if one == other or one.startswith(f"{other}.")}
        waiting |= ours - seen


def test_every_module_says_what_it_is_for():
    silent = [
        name for name, path in MODULES.items() if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert [name for name in silent if name != "etherdiff"] == []
