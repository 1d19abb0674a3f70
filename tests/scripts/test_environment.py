"""The lists of pins agree with pyproject.toml, and an environment is made even where a pin cannot be had."""

import os
import re
import tomllib
import zipfile
from pathlib import Path

import environment
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((environment.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ASKED = [
    Requirement(line)
    for line in PROJECT["dependencies"]
    + [line for extra in environment.TESTED_EXTRAS for line in PROJECT["optional-dependencies"][extra]]
    if not line.startswith("etherdiff[")
]


def versions(path):
    return {canonicalize_name(name): version for name, version in (pin.split("==") for pin in environment.read_pins(path))}


@pytest.mark.parametrize("path", [environment.LOCK, environment.OLDEST], ids=lambda path: path.name)
def test_pins_lie_within_the_bounds(path):
    pins = versions(path)
    wrong = [str(asked) for asked in ASKED if not asked.specifier.contains(pins.get(canonicalize_name(asked.name), ""))]
    assert wrong == [], "make lock"


def test_every_bound_is_tested_at_its_lowest():
    pins = versions(environment.OLDEST)
    for asked in ASKED:
        lowest = [bound.version for bound in asked.specifier if bound.operator == ">="]
        assert lowest, f"{asked} has no lower bound"
        exact = Requirement(f"{asked.name}=={lowest[0]}")
        assert exact.specifier.contains(pins[canonicalize_name(asked.name)]), f"{exact} is not what is tested: make lock"


@pytest.mark.parametrize("path", [environment.LOCK, environment.OLDEST], ids=lambda path: path.name)
def test_pins_name_no_place_and_one_build_of_opencv(path):
    text = path.read_text(encoding="utf-8")
    assert all(re.fullmatch(r"[a-z0-9._-]+==[a-z0-9.!]+", pin) for pin in environment.read_pins(path))
    assert "/" not in text
    assert [name for name in versions(path) if name.startswith("opencv")] == ["opencv-python-headless"]


# --- An environment --------------------------------------------------------------------------------------------------


def write_wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    info = f"{name}-{version}.dist-info"
    metadata = "\n".join(
        [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {one}" for one in requires)]
    )
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", metadata + "\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install the package thing, which needs a (1 or 2) and b, from a folder into another one; return what was installed."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for version in ("1.0", "2.0"):
        write_wheel(wheels, "a", version)
        write_wheel(wheels, "b", version, f"a=={version}")
    write_wheel(wheels, "thing", "1.0", "a>=1", "b>=1")
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": wheels, "TARGET": tmp_path / "site"}.items():
        monkeypatch.setenv(f"PIP_{name}", str(value))

    def run(*pins: str, exactly: bool = False):
        path = tmp_path / "pins.txt"
        path.write_text("# a list\n" + "\n".join(pins), encoding="utf-8")
        done = environment.install(["thing"], path if pins else None, exactly)
        return done and sorted(found.name.removesuffix(".dist-info") for found in (tmp_path / "site").glob("*.dist-info"))

    return run


def test_pins_are_installed_and_what_is_not_needed_is_not_looked_for(install, capfd):
    assert install("a==1.0", "b==1.0", "only_elsewhere==7.0") == ["a-1.0", "b-1.0", "thing-1.0"]
    assert "cannot be had" not in capfd.readouterr().out


def test_a_pin_that_cannot_be_had_is_named_and_the_others_hold(install, capfd):
    assert install("a==1.0", "b==1.5") == ["a-1.0", "b-1.0", "thing-1.0"]
    said = capfd.readouterr().out
    assert "pins.txt: 1 of 2 pins cannot be had here: b==1.5\n" in said
    assert "alone" not in said


def test_pins_that_do_not_fit_together_leave_the_open_bounds(install, capfd):
    assert install("a==1.0", "b==2.0", "thing==3.0") == ["a-2.0", "b-2.0", "thing-1.0"]
    assert "1 of 3 pins cannot be had here: thing==3.0\n" in capfd.readouterr().out


def test_exactly_means_exactly(install):
    assert install("a==1.0", "b==1.5", exactly=True) is False


def test_without_pins_the_newest_is_installed(install):
    assert install() == ["a-2.0", "b-2.0", "thing-1.0"]
