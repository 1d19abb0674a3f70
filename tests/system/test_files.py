"""Files and folders that appear whole or not at all, and the one place that writes them."""

import ast
import errno
import hashlib
import json

import pytest
from small_runs import leftovers

import etherdiff
from etherdiff.system import files
from etherdiff.system.files import digest, make_once, staged_file, staged_folder, why_not_writable, write_json, write_text

# --- One place --------------------------------------------------------------------------------------------------------


def calls_that_write_by_themselves(tree):
    """Renames and temporary names: `os.replace`, `path.replace(other)`, `path.rename(other)`, anything of tempfile."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
            if {"tempfile", "uuid"} & set(names):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_os = isinstance(node.func.value, ast.Name) and node.func.value.id in ("os", "shutil")
            of_a_path = node.func.attr in ("replace", "rename") and len(node.args) == 1 and not node.keywords
            if of_a_path or (of_os and node.func.attr in ("replace", "rename", "renames", "move")):
                yield ast.unparse(node)


def test_what_writes_by_itself_is_found():
    text = (
        "os.replace(a, b)\npath.replace(b)\npath.rename(b)\nimport tempfile\nshutil.move(a, b)\n"
        "text.replace('a', 'b')\nconfig.replace(kind=1)\n"
    )
    assert len(list(calls_that_write_by_themselves(ast.parse(text)))) == 5


OTHER_USES = {"sweeps/sweep.py": ["import uuid"], "sweeps/planning.py": ["import tempfile"]}
"""Module -> what it needs for something else: a sweep's session has a unique name, and plans upon runs not made yet."""


def test_no_other_module_renames_or_names_temporary_files():
    package = files.Path(etherdiff.__file__).parent
    found = {
        path.relative_to(package).as_posix(): list(calls_that_write_by_themselves(ast.parse(path.read_text())))
        for path in package.rglob("*.py")
    }
    assert found.pop("system/files.py")
    assert {name: calls for name, calls in found.items() if calls} == OTHER_USES


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [False, True])
def test_a_staged_file_replaces_the_old_one_when_the_block_ends(tmp_path, durable):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with staged_file(path, durable) as staged:
        staged.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("own_name", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_staged_file_that_fails_leaves_the_old_one(tmp_path, error, own_name):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), staged_file(path, own_name=own_name) as staged:
        raise error(staged.write_text("half"))
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


def test_a_staged_file_can_have_its_own_name_and_makes_its_folders(tmp_path):
    with staged_file(tmp_path / "deep" / "er" / "a.txt", own_name=True) as staged:
        assert staged.name == "a.txt"
        assert not (tmp_path / "deep").exists()
        staged.write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["deep", "er", "a.txt"]


def test_text_has_the_same_bytes_on_every_system(tmp_path):
    write_text(tmp_path / "a.txt", "ä\nb\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa4\nb\n"


def test_json_is_readable_and_ends_with_a_line_break(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [2]})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": 1,\n  "a": [\n    2\n  ]\n}\n'


def test_json_without_nan_refuses_it_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")}, allow_nan=False)
    assert not list(tmp_path.iterdir())


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_a_staged_folder_replaces_the_old_one_with_parents_made(tmp_path):
    for name in ("one", "two"):
        with staged_folder(tmp_path / "deep" / "folder") as staged:
            (staged / name).touch()
    assert [path.name for path in (tmp_path / "deep" / "folder").iterdir()] == ["two"]
    assert not leftovers(tmp_path)


def test_a_folder_is_made_once(tmp_path):
    calls = []
    for _ in range(2):
        folder = make_once(tmp_path / "cache" / "a", lambda new: (calls.append(new), (new / "x").touch()))
    assert len(calls) == 1
    assert [path.name for path in folder.iterdir()] == ["x"]
    assert not leftovers(tmp_path)


def test_a_folder_that_another_process_made_meanwhile_is_taken(tmp_path):
    def make(new):
        (new / "mine").touch()
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "theirs").touch()

    assert [path.name for path in make_once(tmp_path / "a", make).iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_made_is_absent(tmp_path):
    def make(new):
        (new / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_once(tmp_path / "a", make)
    assert not list(tmp_path.iterdir())


# --- Hashes -----------------------------------------------------------------------------------------------------------


def test_the_digest_is_the_one_that_caches_and_scores_were_made_with():
    assert digest({"b": [1, 2.5, None], "a": "ä"}) == "2ed0f54c6c91c515354056a04e63e160"
    text = json.dumps(["x", 1], sort_keys=True).encode()
    assert digest(["x", 1]) == hashlib.sha256(text).hexdigest()[:32]
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


@pytest.mark.parametrize("inside", ["new", "new/x", "file", "."])
def test_a_place_that_can_be_written_is_tried_and_left_as_it_was(inside, tmp_path):
    (tmp_path / "file").touch()
    assert why_not_writable(tmp_path / inside) is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("inside", "reason"), [("file/x", "Not a directory"), ("loop/x", "symbolic links"), ("x" * 300, "name too long")]
)
def test_a_place_that_cannot_be_written_is_said_with_the_systems_reason(inside, reason, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert reason in str(why_not_writable(tmp_path / inside))


def test_a_folder_that_refuses_is_named(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert why_not_writable(tmp_path / "x") == f"{tmp_path / 'x'} cannot be written: {tmp_path}: Permission denied"
