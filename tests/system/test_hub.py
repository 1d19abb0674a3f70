"""The one download from the hub: what it asks for, and what it says when that fails."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

import etherdiff
from etherdiff.system.errors import UserError
from etherdiff.system.hub import fetch, find_cached


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that answers with a folder, or raises what `hub.error` is."""
    hub = SimpleNamespace(error=None, asked=None, folder=tmp_path)

    def snapshot_download(repo, **options):
        hub.asked = (repo, options)
        if hub.error is not None:
            raise hub.error
        return str(hub.folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return hub


def answered(kind, message="first line\nsecond line"):
    """An error as the hub client raises it after an answer of the server."""
    response = SimpleNamespace(headers={}, status_code=404, request=None, text="", json=dict)
    return kind(message, response=response)


def failure(**options):
    with pytest.raises(UserError) as caught:
        fetch("org/name", ["*.json"], what="the thing could not be fetched", instead="Give a folder.", **options)
    return str(caught.value)


def test_what_is_asked_for(hub):
    (hub.folder / "a.json").touch()
    folder = fetch(
        "org/name", ["*.json"], what="x", instead="y", kind="dataset", revision="v1", ignored=["b*"], needed="*.json"
    )
    assert folder == hub.folder
    asked = {"repo_type": "dataset", "revision": "v1", "allow_patterns": ["*.json"], "ignore_patterns": ["b*"]}
    assert hub.asked == ("org/name", asked)


def test_offline(hub):
    hub.error = ConnectionError("no route to host\nmore")
    assert failure() == "the thing could not be fetched (ConnectionError: no route to host). Give a folder."


def test_an_error_without_words(hub):
    hub.error = RuntimeError()
    assert "(RuntimeError: no reason given)" in failure()


def test_offline_with_a_part_in_the_cache(hub):
    assert failure(needed="*.safetensors") == "the thing could not be fetched (it gave no *.safetensors). Give a folder."


def test_not_found_or_private(hub):
    hub.error = answered(errors.RepositoryNotFoundError)
    assert "does not exist on the hub, or is private: log in with `hf auth login`, or set HF_TOKEN" in failure()


@pytest.mark.parametrize(("kind", "page"), [("model", "org/name"), ("dataset", "datasets/org/name")])
def test_gated(hub, kind, page):
    hub.error = answered(errors.GatedRepoError)
    text = failure(kind=kind)
    assert f"accept its terms at https://huggingface.co/{page}, then log in with `hf auth login`" in text
    assert "HF_TOKEN" in text
    assert "does not exist" not in text


def test_no_such_revision(hub):
    hub.error = answered(errors.RevisionNotFoundError)
    assert "it has no revision v9" in failure(revision="v9")


def test_no_hub_id(hub):
    hub.error = errors.HFValidationError("Repo id must be in the form\nmore")
    assert "org/name is no hub id: Repo id must be in the form" in failure()


def test_what_is_cached_is_found_without_the_hub(hub):
    assert find_cached("org/name") == hub.folder
    assert hub.asked == ("org/name", {"repo_type": "model", "local_files_only": True})
    find_cached("org/name", "dataset")
    assert hub.asked == ("org/name", {"repo_type": "dataset", "local_files_only": True})
    hub.error = errors.LocalEntryNotFoundError("nothing")
    assert find_cached("org/name") is None


def test_no_other_module_downloads():
    users = [
        path.name
        for path in Path(etherdiff.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and node.attr in ("snapshot_download", "hf_hub_download"))
        or (isinstance(node, ast.alias) and node.name in ("snapshot_download", "hf_hub_download"))
    ]
    assert set(users) == {"hub.py"}
