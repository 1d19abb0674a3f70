"""The figures of a made-up package, counted by hand."""

import json
import subprocess
import sys
from pathlib import Path

import measure_tree
import pytest
import typer

BRANCHY = "def choose(x):\n" + "".join(f"    if x == {i}:\n        return {i}\n" for i in range(10)) + "    return None\n"
SIMPLE = BRANCHY.replace("choose", "almost").replace("    if x == 0:\n        return 0\n", "")
FILES = f"class Plan:\n    pass\n\n\ndef write():\n    assert Plan is not None\n    assert Plan\n\n\n{BRANCHY}{SIMPLE}"
SOURCES = {
    "__init__.py": '"""The package."""\n',
    "__main__.py": "from etherdiff import cli\n",
    "py.typed": "",
    "style.css": "body {}\n",
    "assets/weights.bin": "0",
    "cli.py": "import etherdiff.eval.scores\n\n\ndef main():\n    from etherdiff.system.files import write\n\n    write()\n",
    "eval/__init__.py": "",
    "eval/scores.py": "from etherdiff.eval import tables\nfrom etherdiff.system import files\n\n\nclass Plan:\n    pass\n",
    "eval/tables.py": "from etherdiff.system.files import write, Plan\n\nassert Plan is not None and write is not None\n",
    "system/__init__.py": "",
    "system/files.py": FILES,
    "system/__pycache__/files.cpython-311.pyc": "bytecode",
}


@pytest.fixture
def tree(tmp_path) -> Path:
    for name, text in SOURCES.items():
        path = tmp_path / "etherdiff" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "README.md").write_text("# A title\n\nA line.\n")
    (tmp_path / "elsewhere.py").write_text("import etherdiff\n")
    return tmp_path


def test_figures_are_those_counted_by_hand(tree):
    figures = measure_tree.measure(tree)
    assert figures["top"] == ["cli.py", "eval", "style.css", "system"]
    assert figures["top_entries"] == 4
    assert figures["python_files"] == 8
    assert figures["python_lines"] == 1 + 1 + 7 + 0 + 6 + 3 + 0 + (9 + 22 + 20)
    assert figures["rooms"] == 5  # etherdiff, __main__, cli, eval, system
    assert figures["module_arrows"] == 6  # main-cli, cli-scores, cli-files, scores-tables, scores-files, tables-files
    assert figures["room_arrows"] == 4  # main-cli, cli-eval, cli-system, eval-system
    assert figures["duplicate_classes"] == {"Plan": ["etherdiff.eval.scores", "etherdiff.system.files"]}
    assert figures["assert_is_not_none"] == 2
    assert figures["complex_functions"] == {"etherdiff.system.files.choose": 11}
    assert next(iter(figures["longest_files"].items())) == ("etherdiff/system/files.py", 51)
    assert figures["readme_lines"] == 3


def test_files_that_git_ignores_do_not_count(tree):
    (tree / ".gitignore").write_text("etherdiff/local.py\n")
    (tree / "etherdiff" / "local.py").write_text("x = 1\n")
    assert measure_tree.measure(tree)["python_files"] == 9
    subprocess.run(["git", "init", "--quiet", str(tree)], check=True)
    assert measure_tree.measure(tree)["python_files"] == 8


def test_json_holds_what_is_printed(tree):
    command = [sys.executable, measure_tree.__file__, str(tree)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert figures == measure_tree.measure(tree)
    assert printed.strip() == measure_tree.format_figures(figures)


def test_a_folder_without_the_package_is_refused(tmp_path):
    with pytest.raises(typer.BadParameter, match="root of a checkout"):
        measure_tree.measure(tmp_path)
