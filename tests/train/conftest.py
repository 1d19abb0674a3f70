"""The tiny base and its fingerprint, for the tests of what is computed with it."""

import pytest

from etherdiff.models import find_base, fingerprint, load_base


@pytest.fixture(scope="module")
def model():
    return load_base(find_base("tiny"))


@pytest.fixture(scope="module")
def hashes():
    return fingerprint(find_base("tiny"))
