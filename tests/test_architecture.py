"""Imports point down only (design, section 3), read from the sources."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


LAYERS = [
    {"system"},
    {"config", "images"},
    {"tiny"},
    {"families"},
    {"adapters", "control"},
    {"runs"},
    {"train"},
    {"tasks"},
    {"eval"},
    {"use"},
    {"report"},
    {"results"},
    {"sweeps"},
    {"run"},
    {"cli"},
    {"__main__"},
]
"""Rooms of the package, lowest first: a module imports from its own room and from those below, never from beside or above."""
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in sorted(rooms)}


def room_of(name: str) -> str:
    return name.split(".")[1]


def rooms_imported(name: str) -> set[str]:
    return {room for room in LEVEL if reaches(imported(name), f"etherdiff.{room}")}


@pytest.mark.parametrize("room", LEVEL)
def test_imports_point_down(room):
    modules = inside(f"etherdiff.{room}")
    assert modules, f"there is no etherdiff.{room}: name the rooms that there are in LAYERS"
    for name in modules:
        wrong = {other for other in rooms_imported(name) - {room} if LEVEL[other] >= LEVEL[room]}
        assert not wrong, f"{name} imports {', '.join(sorted(wrong))}, not below {room}"


def test_every_module_is_in_a_room_with_a_layer():
    assert {room_of(name) for name in MODULES if name != "etherdiff"} == set(LEVEL)


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


@pytest.mark.parametrize(
    "name", ["etherdiff", "etherdiff.__main__", "etherdiff.cli", "etherdiff.config", "etherdiff.system.errors"]
)
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


def test_what_is_imported_is_a_default_dependency():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    optional = {"bitsandbytes", "mediapipe", "ray", "wandb"}  # looked for before they are imported
    modules = {name.split(".")[0] for module in MODULES for name in imported(module)}
    providers = packages_distributions()
    undeclared = {
        module
        for module in modules - optional - {"etherdiff", *sys.stdlib_module_names}
        if declared.isdisjoint(canonicalize_name(provider) for provider in providers.get(module, []))
    }
    assert undeclared == set()


TWICE = {"Row", "Source"}
"""Class names that are still used in two modules; to become empty."""
MAX_NOT_NONE_ASSERTS = 3
"""`assert x is not None` in the package; to become 0."""


def parsed():
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def test_a_class_name_is_used_once():
    modules = {}
    for name, tree in parsed().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                modules.setdefault(node.name, []).append(name)
    assert modules
    assert {name: found for name, found in modules.items() if len(found) > 1 and name not in TWICE} == {}


def test_what_may_be_none_is_not_asserted_away():
    asserts = [
        f"{name}:{node.lineno}"
        for name, tree in parsed().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert) and "is not None" in ast.unparse(node.test)
    ]
    assert len(asserts) <= MAX_NOT_NONE_ASSERTS, asserts


def test_bounds_are_called_max_and_min():
    for name, tree in parsed().items():
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id.isupper()}
        wrong = {one for one in names if one.lstrip("_").startswith(("MOST_", "FEWEST_", "LARGEST_", "SMALLEST_", "LEAST_"))}
        assert not wrong, f"{name}: {wrong}"
