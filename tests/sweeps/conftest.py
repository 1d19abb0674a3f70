"""A cache of its own for each test of sweeps: the program that stands in for etherdiff keeps its ledger there."""

import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("ETHERDIFF_CACHE", str(folder))
    return folder
