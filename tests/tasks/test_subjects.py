"""Subjects by folder, by name in the data root, and from the hub; DreamBooth's own lists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from PIL import Image

from etherdiff.config import DreamBoothConfig
from etherdiff.system.errors import UserError
from etherdiff.tasks.subjects import (
    LIVE_CLASSES,
    LIVE_PROMPTS,
    OBJECT_PROMPTS,
    SUBJECT_CLASSES,
    find_subject,
    make_prompts,
    prompts_for,
)

DREAMBOOTH = Path(os.environ.get("ETHERDIFF_DATA") or Path(__file__).parents[3] / "shared/data") / "dreambooth"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """An empty working directory, and a hub that must not be asked."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def unexpected(*_args, **_options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unexpected)


def photos(folder: Path, names: tuple[str, ...] = ("00.jpg", "01.jpg")) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def problem(subject: str, data_root: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        find_subject(subject, data_root)
    (text,) = caught.value.problems
    return text


# DreamBooth's lists


def test_there_are_30_subjects_in_15_classes_and_25_prompts_of_each_kind():
    assert len(SUBJECT_CLASSES) == 30
    assert len(set(SUBJECT_CLASSES.values())) == 15
    assert sum(noun in LIVE_CLASSES for noun in SUBJECT_CLASSES.values()) == 9
    for prompts in (OBJECT_PROMPTS, LIVE_PROMPTS):
        assert len(set(prompts)) == len(prompts) == 25
        assert all(prompt.count("{identifier} {class_noun}") == 1 for prompt in prompts)
    assert len(set(OBJECT_PROMPTS) & set(LIVE_PROMPTS)) == 15


def test_the_lists_are_those_of_the_dataset():
    published = DREAMBOOTH / "prompts_and_classes.txt"
    if not published.is_file():
        pytest.skip(f"no {published}: set ETHERDIFF_DATA to the folder that holds dreambooth/")
    text = published.read_text()
    classes = dict(re.findall(r"^(\w+),([\w ]+)$", text, re.MULTILINE))
    classes.pop("subject_name")
    assert classes == SUBJECT_CLASSES
    prompts = [
        prompt.replace("{0} {1}", "{identifier} {class_noun}") for prompt in re.findall(r"^'(.*)'\.format", text, re.MULTILINE)
    ]
    assert prompts == [*OBJECT_PROMPTS, *LIVE_PROMPTS]


def test_prompts_depend_on_the_class():
    assert text_of("dog", "sks", 10) == "a sks dog wearing a red hat"
    assert text_of("stuffed animal", "sks", 10) == "a sks stuffed animal with a wheat field in the background"
    assert text_of("cat", "<new> {x}", 0) == "a <new> {x} cat in the jungle"


def text_of(class_noun: str, identifier: str, number: int) -> str:
    return make_prompts(prompts_for(class_noun), identifier, class_noun)[number].text


@pytest.mark.parametrize("identifier", ["corgi", "red", "a", "hat", "dog", "{class_noun}", "<new> {x}", "(s.k", "\\1"])
@pytest.mark.parametrize("class_noun", ["dog", "corgi dog", "red {identifier} car", "stuffed animal"])
def test_plain_prompts_are_the_templates_without_the_identifiers_place(identifier, class_noun):
    for tiny in (False, True):
        templates = prompts_for(class_noun, tiny)
        for template, prompt in zip(templates, make_prompts(templates, identifier, class_noun), strict=True):
            before, after = template.split("{identifier} {class_noun}")
            assert prompt.text == f"{before}{identifier} {class_noun}{after}"
            assert prompt.plain == f"{before}{class_noun}{after}"


@pytest.mark.parametrize(
    ("text", "identifier", "class_noun", "plain"),
    [
        ("a corgi corgi dog on a corgi blanket", "corgi", "corgi dog", "a corgi dog on a corgi blanket"),
        ("a red dog wearing a red hat", "red", "dog", "a dog wearing a red hat"),
        ("a a dog in a house", "a", "dog", "a dog in a house"),
        ("a red dog next to a red dog", "red", "dog", "a dog next to a dog"),
        ("corgi next to the corgi dog", "corgi", "corgi dog", "next to the corgi dog"),
        ("red in a red room", "red", "dog", None),
        ("{identifier} in a red room", "red", "dog", "in a red room"),
        ("a red {class_noun}", "red", "dog", "a dog"),
    ],
)
def test_users_prompts_lose_the_identifier_where_it_is_clear_which_word_that_is(text, identifier, class_noun, plain):
    if plain is None:
        with pytest.raises(UserError, match=r"more than once: write \{identifier\}"):
            make_prompts([text], identifier, class_noun)
    else:
        assert make_prompts([text], identifier, class_noun)[0].plain == plain


# Folders


def test_a_folder_is_taken_with_its_images_in_order(tmp_path):
    folder = photos(tmp_path / "my rabbit", ("10.png", "9.jpg"))
    (folder / "notes.txt").write_text("x")
    subject = find_subject(str(folder), None)
    assert (subject.name, subject.class_noun) == ("my rabbit", None)
    assert subject.images == (folder / "9.jpg", folder / "10.png")


@pytest.mark.parametrize("given", ["teapot", "./teapot", "teapot/", "../cwd/teapot", "teapot/sub/.."])
def test_a_folder_of_a_subjects_name_has_its_class_and_goes_before_the_data_root(tmp_path, given):
    photos(Path("teapot"))
    Path("teapot/sub").mkdir()
    photos(tmp_path / "dreambooth" / "teapot")
    subject = find_subject(given, tmp_path)
    assert (subject.name, subject.class_noun) == ("teapot", "teapot")
    assert subject.images[0].resolve() == Path("teapot/00.jpg").resolve()


def test_the_working_directory_and_the_home_folder(tmp_path, monkeypatch):
    photos(Path())
    assert find_subject(".", None).name == "cwd"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_subject(DreamBoothConfig(subject="~/cwd").subject, None).name == "cwd"


def test_a_folder_without_images_says_what_it_holds_and_what_counts(tmp_path):
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").touch()
    (folder / "b.txt").touch()
    text = problem(str(folder))
    assert f"no images in {folder}: it holds 2 .txt files, 1 folder;" in text
    assert ".jpg, .jpeg" in text
    (tmp_path / "empty").mkdir()
    assert "it holds nothing;" in problem(str(tmp_path / "empty"))


def test_a_file_is_not_a_folder(tmp_path):
    Path("photo.jpg").touch()
    assert problem("photo.jpg").startswith("photo.jpg is a file: give the folder")


# Names


def test_a_name_is_looked_up_in_the_data_root(tmp_path):
    photos(tmp_path / "dreambooth" / "dog2")
    photos(tmp_path / "dreambooth" / "my_rabbit")
    found = find_subject("dog2", tmp_path)
    assert (found.name, found.class_noun) == ("dog2", "dog")
    assert found.images == (tmp_path / "dreambooth/dog2/00.jpg", tmp_path / "dreambooth/dog2/01.jpg")
    assert find_subject("my_rabbit", tmp_path).class_noun is None


def test_a_file_of_the_name_does_not_hide_the_data_root(tmp_path):
    Path("dog").touch()
    photos(tmp_path / "dreambooth" / "dog")
    assert find_subject("dog", tmp_path).class_noun == "dog"


def test_an_unknown_name_gets_a_suggestion_and_what_there_is(tmp_path):
    photos(tmp_path / "dreambooth" / "rabbit")
    photos(tmp_path / "dreambooth" / "cat")
    text = problem("Rabit", tmp_path)
    assert "Did you mean rabbit?" in text
    assert f"Subjects in {tmp_path / 'dreambooth'}: cat, rabbit." in text
    assert "wolf_plushie" in text
    assert "Did you mean teapot?" in problem("teapott")
    assert "No data root is given" in problem("zzzzzz")
    assert "Did you mean" not in problem("zzzzzz")
    assert "none" in problem("zzzzzz", tmp_path / "gone")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "  ",
        "..",
        "../secret",
        "../../secret",
        "/nowhere/at/all",
        "a\\b",
        "C:x",
        "a\0b",
        "x/" * 3000,
        "x" * 5000,
        "~nobody-here",
    ],
)
def test_names_do_not_leave_the_data_root_nor_crash(tmp_path, name):
    photos(tmp_path / "data/secret")
    photos(tmp_path / "data/dreambooth")
    assert problem(name, tmp_path / "data")


def test_the_real_subjects_are_found():
    if not DREAMBOOTH.is_dir():
        pytest.skip(f"no {DREAMBOOTH}: set ETHERDIFF_DATA to the folder that holds dreambooth/")
    for folder in sorted(path for path in DREAMBOOTH.iterdir() if path.is_dir()):
        subject = find_subject(folder.name, DREAMBOOTH.parent)
        assert subject.class_noun == SUBJECT_CLASSES[folder.name]
        assert [path.name for path in subject.images] == sorted(path.name for path in folder.glob("*.jpg"))


# The hub


def test_one_of_the_30_is_fetched_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo_id, *, repo_type, allow_patterns, **_):
        asked.append((repo_id, repo_type, allow_patterns))
        photos(tmp_path / "snapshot/dataset/rc_car")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    subject = find_subject("rc_car", tmp_path)
    assert asked == [("google/dreambooth", "dataset", ["dataset/rc_car/*.jpg"])]
    assert (subject.name, subject.class_noun) == ("rc_car", "toy")
    assert [path.name for path in subject.images] == ["00.jpg", "01.jpg"]


@pytest.mark.parametrize("error", [ConnectionError("no route to host\nmore"), OSError("disk full"), RuntimeError()])
def test_a_hub_that_fails_is_explained(tmp_path, monkeypatch, error):
    def snapshot_download(*_args, **_options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    text = problem("dog", tmp_path)
    reason = str(error).split("\n")[0] or "no reason given"
    for part in ("./dog", str(tmp_path / "dreambooth/dog"), "google/dreambooth", f"{type(error).__name__}: {reason})"):
        assert part in text
    for remedy in ("Pass a folder", "--data-root", "ETHERDIFF_DATA", "DATA/dreambooth/dog"):
        assert remedy in text
    assert "more" not in text
    assert "none is given" in problem("dog", None)


def test_a_cached_snapshot_without_the_subject_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_args, **_options: str(tmp_path))
    assert "it gave no dataset/dog/*.jpg" in problem("dog", tmp_path)


def test_neither_torch_nor_the_hub_is_imported():
    code = "import sys, etherdiff.tasks.subjects; sys.exit(bool({'torch', 'huggingface_hub'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
