"""Results that are equal, and results that differ in a tensor, a pixel, a number or a file."""

import json
import math

import compare_trees
import numpy as np
import pytest
import torch
import typer
from compare_trees import compare_files, find_differences, flatten
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture
def folders(tmp_path):
    """Two folders with the same results."""
    for name in ("old", "new"):
        (tmp_path / name / "images").mkdir(parents=True)
        write_results(tmp_path / name)
    return tmp_path / "old", tmp_path / "new"


def write_results(folder, weight=1.0, grey=7, score=0.5, generator="1.0"):
    save_file({"u": torch.tensor([weight, 2.0]), "v": torch.zeros(3)}, folder / "adapter.safetensors")
    Image.fromarray(np.full((4, 4, 3), grey, np.uint8)).save(folder / "images" / "0.png")
    result = {"scores": {"dino": {"mean": score, "n": 2, "identity": {"versions": {"torch": generator}, "seeds": [0, 1]}}}}
    (folder / "metrics.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {score}}}\n{{"step": 2, "loss": NaN}}\n')


@pytest.mark.parametrize("pattern", ["*.safetensors", "images/[0-9]*.png", "metrics.json", "metrics.jsonl"])
def test_equal_results(folders, pattern):
    write_results(folders[1], generator="2.0")  # versions are not compared
    assert compare_files(*folders, pattern) == ""


@pytest.mark.parametrize(
    ("pattern", "change", "text"),
    [
        ("*.safetensors", {"weight": 1.25}, "1 of 2 differ; the largest difference is 0.25 at adapter.safetensors u"),
        ("images/[0-9]*.png", {"grey": 10}, "1 of 1 differ; the largest difference is 3 at images/0.png"),
        ("metrics.json", {"score": 0.625}, "1 of 4 differ; the largest difference is 0.125 at metrics.json scores.dino.mean"),
        ("metrics.jsonl", {"score": 0.625}, "1 of 4 differ; the largest difference is 0.125 at metrics.jsonl 0.loss"),
    ],
)
def test_the_largest_difference_is_told(folders, pattern, change, text):
    write_results(folders[1], **change)
    assert compare_files(*folders, pattern) == text


def test_a_missing_file_is_a_difference(folders):
    old, new = folders
    (new / "images" / "0.png").unlink()
    assert compare_files(old, new, "images/*.png").endswith("torch.uint8 (4, 4, 3) became missing")
    (old / "images" / "1.png").write_bytes((old / "images" / "0.png").read_bytes())
    (new / "images" / "1.png").write_bytes((old / "images" / "0.png").read_bytes())
    assert compare_files(new, old, "images/*.png") == "1 of 2 differ; images/0.png: missing became torch.uint8 (4, 4, 3)"


def test_nothing_to_compare_is_a_difference(folders):
    assert compare_files(*folders, "control_encoder/*.safetensors") == "no control_encoder/*.safetensors to compare with"


def test_every_item_is_compared(folders):
    differences = compare_trees.compare_folders(*folders)
    assert differences.keys() == compare_trees.ITEMS.keys()
    assert all(differences.values())  # these folders hold none of the files


@pytest.mark.parametrize(
    ("old", "new", "size"),
    [
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]), None),
        (torch.tensor(0.0), torch.tensor(-0.0), math.inf),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), math.inf),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), math.inf),
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([1.0, 2.5], dtype=torch.bfloat16), 0.5),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan]), math.inf),
        (math.nan, math.nan, None),
        (1.0, math.nan, math.inf),
        (1, 1.0, math.inf),
        (1, True, math.inf),
        (None, None, None),
        (None, 0.0, math.inf),
        ("mean", "median", math.inf),
        (3, 5, 2),
    ],
)
def test_leaves_are_equal_only_bit_for_bit(old, new, size):
    assert find_differences({"leaf": old}, {"leaf": new}) == ({} if size is None else {"leaf": size})


def test_json_is_flattened_with_its_empty_parts():
    value = {"a": [1, {"b": None}], "c": {}, "d": [], "versions": {"torch": "2"}, "paper": {"x": 1}, "dataset": "maps"}
    assert dict(flatten(value)) == {"a.0": 1, "a.1.b": None, "c": "{}", "d": "[]"}


PROGRAM = "import json, sys\njson.dump({'said': sys.argv[1:], 'value': VALUE}, open('out.json', 'w'))\nsys.exit(STATUS)\n"


def write_checkout(folder, value, status=0):
    (folder / "etherdiff").mkdir(parents=True, exist_ok=True)
    (folder / "etherdiff" / "__init__.py").write_text("")
    (folder / "etherdiff" / "__main__.py").write_text(PROGRAM.replace("VALUE", str(value)).replace("STATUS", str(status)))
    return folder


def run_main(*arguments) -> int:
    with pytest.raises(typer.Exit) as left:
        compare_trees.main(*arguments)
    return left.value.exit_code


def test_checkouts_are_run_once_and_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_trees, "COMMANDS", {"draw": "draw 'two words'"})
    monkeypatch.setattr(compare_trees, "ITEMS", {"drawn": "out.json"})
    old, new, output = write_checkout(tmp_path / "a", 1.0), write_checkout(tmp_path / "b", 1.0), tmp_path / "results"
    assert run_main(old, new, output) == 0
    assert json.loads((output / "old" / "out.json").read_text()) == {"said": ["draw", "two words"], "value": 1.0}
    assert "not run again" not in capsys.readouterr().out

    write_checkout(new, 1.5)
    assert run_main(old, new, output) == 1
    said = capsys.readouterr().out
    assert f"{output / 'old'}: complete, not run again" in said
    assert f"{output / 'new'}: complete" not in said
    assert "the largest difference is 0.5 at out.json value" in said


def test_a_command_that_fails_is_told_and_not_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_trees, "COMMANDS", {"draw": "draw"})
    monkeypatch.setattr(compare_trees, "ITEMS", {"drawn": "out.json"})
    old, new, output = write_checkout(tmp_path / "a", 1.0), write_checkout(tmp_path / "b", 1.0, status=3), tmp_path / "results"
    assert run_main(old, new, output) == 1  # though the results are equal
    said = capsys.readouterr().out
    assert f"FAILED with 3: see {output / 'new' / 'draw.log'}" in said
    assert "1 of 1 items are equal; 1 failures" in said
    assert not (output / "new" / "complete.json").exists()


def test_a_checkout_that_changes_while_it_runs_is_not_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_trees, "COMMANDS", {"draw": "draw"})
    monkeypatch.setattr(compare_trees, "ITEMS", {"drawn": "out.json"})
    old, new, output = write_checkout(tmp_path / "a", 1.0), write_checkout(tmp_path / "b", 1.0), tmp_path / "results"
    program = new / "etherdiff" / "__main__.py"
    program.write_text(f"open({str(new / 'etherdiff' / 'more.py')!r}, 'w').close()\n{program.read_text()}")
    assert run_main(old, new, output) == 1
    assert f"new: {new} CHANGED while it ran" in capsys.readouterr().out
    assert not (output / "new" / "complete.json").exists()


def test_an_installed_package_is_not_mistaken_for_the_checkout(tmp_path):
    (tmp_path / "empty").mkdir()
    environment = {"PYTHONPATH": str(write_checkout(tmp_path / "a", 1.0))}
    with pytest.raises(typer.BadParameter, match="not the one that Python imports"):
        compare_trees.refuse_another_package(tmp_path / "empty", tmp_path, environment)
