"""What every test shares: a cache of its own, so that nothing is read from or left on the machine."""

import os
import sys
from pathlib import Path

import pytest

# one thread per test process: the tiny models are too small for more, and idle threads spin
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    os.environ["ETHERDIFF_CACHE"] = str(tmp_path_factory.mktemp("etherdiff-cache"))
    os.environ.pop("ETHERDIFF_DATA", None)


@pytest.fixture
def dreambooth_data() -> Path:
    """The real photos, where they are at hand: ETHERDIFF_TEST_DATA, else shared/data beside or inside the checkout."""
    here = Path(__file__).resolve().parents[1]
    named = os.environ.get("ETHERDIFF_TEST_DATA")
    for root in [Path(named)] if named else [here.parent / "shared/data", here / "shared/data"]:
        if (root / "dreambooth/dog").is_dir():
            return root
    pytest.skip("the DreamBooth photos are not here: set ETHERDIFF_TEST_DATA to a folder that holds dreambooth/dog")


@pytest.fixture
def another_process():
    """accelerate keeps its precision for a whole process, which in use is one run."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def etherdiff_(monkeypatch, capsys):
    """Run the program's main() in this process: its status, and what it wrote."""
    from etherdiff import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["etherdiff", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return run


@pytest.fixture(scope="module")
def model():
    """The tiny base, loaded."""
    from etherdiff.families.bases import find_base
    from etherdiff.families.sd1 import load_base

    return load_base(find_base("tiny"))


@pytest.fixture(scope="module")
def hashes():
    """The tiny base's fingerprint."""
    from etherdiff.families.bases import find_base
    from etherdiff.families.sd1 import fingerprint

    return fingerprint(find_base("tiny"))
