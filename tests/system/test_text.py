"""Text files of users, as editors and shells save them."""

import codecs
import json
import re
import shlex
from pathlib import Path

import pytest

from etherdiff.config import load_yaml
from etherdiff.control.captions import read_captions, read_lines
from etherdiff.control.readers.coco import read_coco
from etherdiff.control.signals.landmarks import Landmarks
from etherdiff.control.signals.segmentation import find_palette
from etherdiff.system.errors import UserError
from etherdiff.system.text import program, read_user_json, read_user_text
from etherdiff.tasks.subjects import read_prompts

FORMS = {
    "plain": lambda text: text.encode(),
    "byte-order mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "Notepad": lambda text: codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode(),
    "PowerShell": lambda text: codecs.BOM_UTF16_LE + text.replace("\n", "\r\n").encode("utf-16-le"),
    "big-endian": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "old Macintosh": lambda text: text.replace("\n", "\r").encode(),
}


@pytest.fixture(params=FORMS)
def save(request, tmp_path):
    """Save a text in one of the forms; the file's path."""

    def saved(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FORMS[request.param](text))
        return path

    return saved


def test_text_is_the_same_in_every_form(save):
    assert read_user_text(save("x.txt", "# é\n犬\n\n")) == "# é\n犬\n\n"


def test_prompts(save):
    path = save("prompts.txt", "# the first line is a comment\na sks dog\n\n  a sks dog \na\u2028b\x0bc\n")
    assert read_prompts(path) == ["a sks dog", "a\u2028b\x0bc"]


def test_recipes(save):
    assert load_yaml(save("recipe.yaml", "steps: 3\nidentifier: 犬\n")) == {"steps": 3, "identifier": "犬"}


def test_captions_and_metadata(save):
    lines = '{"image": "a/1.png", "text": "a cat"}\n{"image": "2.png", "text": "犬"}\n'
    assert [entry["text"] for _, entry in read_lines(save("metadata.jsonl", lines))] == ["a cat", "犬"]
    assert [caption.text for caption in read_captions(save("captions.jsonl", lines))] == ["a cat", "犬"]
    assert [caption.text for caption in read_captions(save("captions.json", '{"1.png":\n "a cat"}'))] == ["a cat"]
    assert [c.text for c in read_captions(save("list.json", '[{"image": "1.png",\n "text": "a cat"}]'))] == ["a cat"]


def test_captions_of_coco(save, tmp_path):
    content = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]}
    for split in ("train2017", "val2017"):
        save(f"annotations/captions_{split}.json", json.dumps(content, indent=1))
        (tmp_path / split).mkdir()
        (tmp_path / split / "1.jpg").touch()
    assert [row.text for _, row in read_coco(tmp_path, None).rows()] == ["a cat", "a cat"]


def test_palettes(save):
    assert find_palette(str(save("palette.json", '{"sky": [0, 90, 250],\n "sea": [1, 2, 3]}'))).classes == ("sky", "sea")


def test_landmarks(save):
    path = save("points.json", '{"points": [[4, 5]],\n "size": [9, 9]}')
    assert not Landmarks.choose(None, 64).problems(path)


@pytest.mark.parametrize("content", [b"\xff", "é".encode("latin-1"), codecs.BOM_UTF16_LE + b"a", codecs.BOM_UTF8 + b"\xff"])
def test_what_is_no_text_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.txt: cannot be read .*save it as UTF-8"):
        read_user_text(tmp_path / "x.txt")


def test_what_cannot_be_read_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"gone\.txt: cannot be read \(No such file"):
        read_user_text(tmp_path / "gone.txt")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match=r"x\.json: cannot be read as JSON"):
        read_user_json(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["runs/dog", "my runs/dog's", "runs/$HOME", "runs/a;b", "runs/[x]*", "runs/猫"])
def test_a_command_that_is_suggested_can_be_pasted_into_a_shell(name, monkeypatch):
    monkeypatch.setattr("os.name", "posix")
    assert shlex.split(program("resume", Path(name), "--steps", 3)) == ["etherdiff", "resume", name, "--steps", "3"]
    monkeypatch.setattr("os.name", "nt")
    assert program("resume", r"C:\my runs\dog") == r'etherdiff resume "C:\my runs\dog"'


def test_no_suggested_command_is_written_without_quoting():
    package = Path(read_user_text.__code__.co_filename).parents[1]
    found = [
        path
        for path in package.rglob("*.py")
        if re.search(r"etherdiff (resume|eval|merge|export|generate) (--run )?\{", path.read_text("utf-8"))
    ]
    assert found == []
