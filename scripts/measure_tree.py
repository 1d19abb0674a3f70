"""Measure the shape of a checkout: entries at the top of the package, files, lines, import arrows, classes of one name.

    python scripts/measure_tree.py                  # this checkout
    python scripts/measure_tree.py ../old --json

The sources are parsed, never imported, so any checkout can be measured in any environment. Files that git ignores do not count.
"""

import ast
import json
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "etherdiff"
UNCOUNTED = {"__init__.py", "__main__.py", "py.typed", "assets"}
MAX_COMPLEXITY = 10
LONGEST = 10
BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def main(
    tree: Annotated[Path, typer.Argument(help="checkout to measure")] = ROOT,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Print the figures of a checkout."""
    figures = measure(tree)
    typer.echo(json.dumps(figures, indent=2) if as_json else format_figures(figures))


def measure(tree: Path) -> dict[str, Any]:
    """Collect every figure of the package in a checkout, and the length of its README."""
    files = [path for path in list_files(tree) if path.parts[0] == PACKAGE]
    texts = {path: (tree / path).read_text(encoding="utf-8") for path in files if path.suffix == ".py"}
    if not texts:
        raise typer.BadParameter(f"{tree} holds no {PACKAGE}/*.py; give the root of a checkout")
    modules = {name_module(path): ast.parse(text, str(path)) for path, text in texts.items()}
    arrows = {
        (name, other) for name, module in modules.items() for other in find_imports(module, set(modules)) if other != name
    }
    rooms = {(room_of(name), room_of(other)) for name, other in arrows}
    lines = {str(path): text.count("\n") for path, text in texts.items()}
    top = sorted({path.parts[1] for path in files} - UNCOUNTED)
    readme = tree / "README.md"
    return {
        "top_entries": len(top),
        "python_files": len(texts),
        "python_lines": sum(lines.values()),
        "rooms": len({room_of(name) for name in modules}),
        "room_arrows": sum(one != other for one, other in rooms),
        "module_arrows": len(arrows),
        "duplicate_classes": find_duplicate_classes(modules),
        "assert_is_not_none": sum(count_none_asserts(module) for module in modules.values()),
        "complex_functions": find_complex_functions(modules),
        "longest_files": dict(sorted(lines.items(), key=lambda item: -item[1])[:LONGEST]),
        "readme_lines": readme.read_text(encoding="utf-8").count("\n") if readme.exists() else 0,
        "top": top,
    }


def list_files(tree: Path) -> list[Path]:
    """List what git tracks or would track, relative to the checkout; where there is no git, every file that is no bytecode."""
    command = ["git", "-C", str(tree), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    paths = [Path(name) for name in listed.split("\0") if name] or [path.relative_to(tree) for path in tree.rglob("*")]
    return sorted({path for path in paths if "__pycache__" not in path.parts and (tree / path).is_file()})


def name_module(path: Path) -> str:
    """Give the dotted name of a source file."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """Give the room of a module: the folder or loose module at the top of the package; of the package itself, its name."""
    return ".".join(module.split(".")[:2])


def find_imports(module: ast.Module, known: set[str]) -> set[str]:
    """Find the modules of the package that a module imports, anywhere in its source."""
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in full} & known
    return found


def find_duplicate_classes(modules: dict[str, ast.Module]) -> dict[str, list[str]]:
    """Find class names that several modules define, with those modules."""
    places = defaultdict(set)
    for name, module in modules.items():
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                places[node.name].add(name)
    return {name: sorted(places[name]) for name in sorted(places) if len(places[name]) > 1}


def count_none_asserts(module: ast.Module) -> int:
    """Count the assert statements that contain `is not None`."""
    asserts = [node for node in ast.walk(module) if isinstance(node, ast.Assert)]
    return sum(any(map(is_not_none, ast.walk(node.test))) for node in asserts)


def is_not_none(node: ast.AST) -> bool:
    """Tell whether an expression is a comparison `x is not None`."""
    if not isinstance(node, ast.Compare) or not isinstance(node.ops[0], ast.IsNot):
        return False
    return isinstance(node.comparators[0], ast.Constant) and node.comparators[0].value is None


def find_complex_functions(modules: dict[str, ast.Module]) -> dict[str, int]:
    """Find functions over the limit of cyclomatic complexity, the most complex first."""
    found = {
        f"{name}.{node.name}": complexity
        for name, module in modules.items()
        for node in ast.walk(module)
        if isinstance(node, FUNCTIONS) and (complexity := measure_complexity(node)) > MAX_COMPLEXITY
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure_complexity(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count 1, and 1 for each `if`, loop, handler, case and inner function (McCabe, as in ruff's C901)."""
    return 1 + sum(isinstance(node, BRANCHES + FUNCTIONS) for node in ast.walk(function) if node is not function)


def format_figures(figures: dict[str, Any]) -> str:
    """Lay the figures out for reading: a line per figure, and lists indented below their counts."""
    lines = []
    for key, value in figures.items():
        label = key.replace("_", " ")
        lines.append(f"{label:22}{len(value) if isinstance(value, dict | list) else value}")
        if isinstance(value, dict):
            lines += [f"    {name}: {', '.join(one) if isinstance(one, list) else one}" for name, one in value.items()]
        elif isinstance(value, list):
            lines.append(f"    {' '.join(value)}")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
