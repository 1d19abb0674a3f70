"""Where a home folder is meant, and where it is not."""

from pathlib import Path

import pytest

from etherdiff.system.files import cache_dir, data_root
from etherdiff.system.text import expand_home


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_home_folder_is_put_for_its_sign_in_paths_texts_and_lists_of_them(home):
    assert expand_home("~/x") == f"{home}/x"
    assert expand_home(Path("~/x")) == home / "x"
    assert expand_home(["~", "a~b", Path("~/c")]) == [str(home), "a~b", home / "c"]


@pytest.mark.parametrize("other", ["sd15", "./~/x", "a/~", "~nobody-here/x", "", None, 3, True, Path("./x"), {"a": "~"}])
def test_all_else_stays_as_it_is(other):
    assert expand_home(other) == other


def test_the_environments_folders_may_be_below_the_home_folder(home, monkeypatch):
    monkeypatch.setenv("ETHERDIFF_DATA", "~/data")
    monkeypatch.setenv("ETHERDIFF_CACHE", "~/cache")
    assert (data_root(None), cache_dir()) == (home / "data", home / "cache")
    monkeypatch.delenv("ETHERDIFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/xdg")
    assert cache_dir() == home / "xdg" / "etherdiff"
