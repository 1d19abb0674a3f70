"""Makes the lists of pinned packages, and an environment from one of them. Needs nothing but Python and its pip.

`lock` (make lock) asks pip which versions it would install now, and writes requirements.lock; then with every bound of
pyproject.toml at its lowest, and writes requirements-oldest.txt. Both are resolved for the machine and the Python that run it.

`install` brings the project with its development tools into the environment of the Python that runs it. A list constrains
the versions: a package that this platform does not need is not looked for. Where pins cannot be had, it names them and
goes on with the other pins, or with the bounds of pyproject.toml alone. Without a list it installs the newest versions.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK, OLDEST = ROOT / "requirements.lock", ROOT / "requirements-oldest.txt"
TESTED_EXTRAS = ("dev", "docs", "ray")
PROJECT = "etherdiff[dev] @ " + ROOT.as_uri()


def pip(*arguments: str, python: str = sys.executable) -> bool:
    """Run pip, which prints what goes wrong; return whether it succeeded."""
    return subprocess.run([python, "-m", "pip", *arguments]).returncode == 0


# --- Lists of pins ---------------------------------------------------------------------------------------------------


def lock() -> None:
    """Write both lists."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = next(str(path) for path in Path(folder).glob("*/python*") if path.stem == "python")
        pip("install", "--quiet", "--upgrade", "pip", python=python)
        write_pins(LOCK, "the newest versions that fit together", resolve(python))
        constraints = Path(folder) / "lowest.txt"
        constraints.write_text("\n".join(lowest_bounds()), encoding="utf-8")
        write_pins(OLDEST, "the lowest versions that pyproject.toml allows", resolve(python, "--constraint", str(constraints)))


def resolve(python: str, *options: str) -> list[str]:
    """Return the pins of everything that pip would install for the project."""
    report = Path(python).parents[1] / "report.json"
    done = pip(
        *("install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report), *options, PROJECT), python=python
    )
    if not done:
        sys.exit("pip finds no versions that fit together: see above")
    found = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return [f"{package['name'].lower()}=={package['version']}" for package in found if package["name"] != "etherdiff"]


def write_pins(path: Path, what: str, pins: Iterable[str]) -> None:
    """Write a list of pins under a header that says for what it was resolved."""
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    header = f"# Made by `make lock`: {what}, resolved on {machine}.\n# Elsewhere other packages may be needed too.\n"
    path.write_text(header + "\n".join(sorted(pins)) + "\n", encoding="utf-8")


def lowest_bounds() -> list[str]:
    """Return a pin at the lower bound of every dependency in pyproject.toml, those of the tested extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + [line for extra in TESTED_EXTRAS for line in project["optional-dependencies"][extra]]
    return [re.sub(r">=([^,;]+).*", r"==\1", line) for line in lines if ">=" in line]


# --- An environment --------------------------------------------------------------------------------------------------


def install(target: list[str], pins_file: Path | None, exactly: bool) -> bool:
    """Install pip's `target` with the versions of a list; return whether that, or what is allowed instead, succeeded."""
    if pins_file is None:
        return pip("install", "--quiet", "--upgrade", "--upgrade-strategy", "eager", *target)
    if pip("install", "--quiet", *target, "--constraint", str(pins_file)):
        return True
    if exactly:
        return False
    pins = read_pins(pins_file)
    with ThreadPoolExecutor(4) as pool:
        missing = [pin for pin, found in zip(pins, pool.map(can_be_had, pins), strict=True) if not found]
    say(f"{pins_file.name}: {len(missing)} of {len(pins)} pins cannot be had here: {', '.join(missing) or 'none'}")
    with tempfile.TemporaryDirectory() as folder:
        rest = Path(folder) / "constraints.txt"
        rest.write_text("\n".join(pin for pin in pins if pin not in missing), encoding="utf-8")
        say("going on with the other pins")
        if pip("install", "--quiet", *target, "--constraint", str(rest)):
            return True
    say("the other pins do not fit together: going on with the bounds of pyproject.toml alone")
    return pip("install", "--quiet", *target)


def read_pins(path: Path) -> list[str]:
    """Return the lines of a list of pins without its comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def can_be_had(pin: str) -> bool:
    """Ask pip whether it finds this version for this platform; nothing is installed."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed", pin]
    return subprocess.run(command, capture_output=True).returncode == 0


def say(message: str) -> None:
    """Print at once, between pip's own lines."""
    print(message, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("lock", help="write requirements.lock and requirements-oldest.txt")
    installing = commands.add_parser("install", help="install the project for development")
    installing.add_argument("pins", nargs="?", type=Path, help="a list of pins; without it, the newest versions")
    installing.add_argument("--exactly", action="store_true", help="fail where a pin cannot be had")
    arguments = parser.parse_args()
    if arguments.command == "lock":
        lock()
    elif not install(["--editable", f"{ROOT}[dev]"], arguments.pins, arguments.exactly):
        sys.exit("the environment could not be made: see above")


if __name__ == "__main__":
    main()
