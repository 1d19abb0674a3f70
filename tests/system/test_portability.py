"""Everything imports where a system lacks fcntl, resource, SIGUSR1 or the sched functions, as Windows does."""

import subprocess
import sys

import pytest
from filelock import Timeout

from etherdiff.families.diffusion import slug
from etherdiff.system import files, locks
from etherdiff.system.devices import peak_memory
from etherdiff.system.errors import UserError
from etherdiff.system.locks import LOCK, run_lock

LACKING = """
import builtins, signal, sys
found = builtins.__import__
def import_as_on_windows(name, globals=None, *rest, **more):
    # the libraries, which have a way of their own there, need on this system what it has
    if (globals or {}).get("__name__", "").startswith("etherdiff") and name in ("fcntl", "resource", "grp", "pwd", "termios"):
        raise ImportError(f"there is no {name} here")
    return found(name, globals, *rest, **more)
builtins.__import__ = import_as_on_windows
for name in ("SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
"""
IMPORT_ALL = """
import importlib, pkgutil, etherdiff
for module in pkgutil.walk_packages(etherdiff.__path__, "etherdiff."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print("all imported")
"""
COMMAND = """
from etherdiff.cli import main
sys.argv = ["etherdiff", *{arguments}]
main()
"""


def run_without(code):
    """Status, output and errors of Python code in a process in which Unix's own modules cannot be imported."""
    done = subprocess.run([sys.executable, "-c", LACKING + code], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_every_module_imports():
    status, output, errors = run_without(IMPORT_ALL)
    assert (status, output) == (0, "all imported\n"), errors


@pytest.mark.parametrize(
    ("arguments", "expected"), [(["--help"], "train-dreambooth"), (["inspect", "--base", "tiny"], "ether")]
)
def test_commands_run(arguments, expected):
    status, output, errors = run_without(COMMAND.format(arguments=arguments))
    assert status == 0, errors
    assert expected in output


def test_locks_signals_and_memory_work():
    code = """
from pathlib import Path
import tempfile
from etherdiff.system import devices, locks, signals
with tempfile.TemporaryDirectory() as folder, locks.run_lock(Path(folder) / "run"), signals.stop_signals():
    print([one.name for one in signals.STOPPING], devices.peak_memory() > 2**20)
"""
    status, output, errors = run_without(code)
    assert (status, output) == (0, "['SIGINT', 'SIGTERM'] True\n"), errors


# --- Where things are kept --------------------------------------------------------------------------------------------


def test_the_cache_folder_is_the_one_that_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("ETHERDIFF_CACHE", str(tmp_path / "named"))
    assert files.cache_dir() == tmp_path / "named"
    monkeypatch.delenv("ETHERDIFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_dir() == tmp_path / "xdg" / "etherdiff"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    if sys.platform == "linux":
        assert files.cache_dir() == tmp_path / ".cache" / "etherdiff"


@pytest.mark.parametrize("prompt", ['a "cat": <what?>', "a/b\\c|d*e", "ends. ", "nul", "\x00\x1f\n", "ÄÖ", "a" * 300])
def test_prompts_become_names_that_every_system_takes(prompt):
    name = f"000-{slug(prompt)}"  # numbered wherever it is used, so that none is a device such as nul
    assert not set(name) & set('<>:"/\\|?*')
    assert name.isprintable()
    assert name[-1] not in ". "
    assert len(name) < 60


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_the_peak_is_at_least_what_was_once_held():
    block = bytearray(50 * 2**20)
    held = len(block)
    del block
    assert peak_memory() > held


# --- Locks ------------------------------------------------------------------------------------------------------------


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def cannot(*_, **__):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.FileLock, "acquire", cannot)
    with run_lock(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).exists()
    assert "cannot be locked (No locks available)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_holder_that_cannot_be_read_is_another_process(tmp_path, monkeypatch):
    def held(*_, **__):
        raise Timeout("x")

    monkeypatch.setattr(locks.FileLock, "acquire", held)
    with pytest.raises(UserError, match="in use by another process: wait for it"), run_lock(tmp_path / "run"):
        pytest.fail("it is held")
