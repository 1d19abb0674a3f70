"""What is wrong with a sweep, each thing said once however many of its runs it is wrong with."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from etherdiff.system.errors import UserError

T = TypeVar("T")


class Mistakes:
    """Sentences, and the runs that each is about."""

    def __init__(self) -> None:
        self.runs: dict[str, list[str]] = {}

    def add(self, sentences: Iterable[str], run: str | None = None) -> None:
        """Note what is wrong, of a run or of all."""
        for sentence in sentences:
            self.runs.setdefault(sentence, []).extend([] if run is None else [run])

    def attempt(self, action: Callable[[], T], run: str | None = None, about: str = "") -> T | None:
        """The action's result; None, and its problems noted, where something is wrong. `about` goes before each."""
        try:
            return action()
        except UserError as error:
            self.add([about + problem for problem in error.problems], run)
        except (ValueError, OSError) as error:
            self.add([f"{about}{error}"], run)
        return None

    def raise_if_any(self, file: Path | None = None, runs: int = 0) -> None:
        """One UserError with all of it; what is wrong with every one of `runs` is said of the file."""
        where = "" if file is None else f"{file}: "
        if self.runs:
            raise UserError([f"{where}{sentence}{_which(found, runs)}" for sentence, found in self.runs.items()])


def _which(found: list[str], runs: int) -> str:
    if not found or len(found) == runs:
        return ""
    return f" (run {found[0]}{f', and {len(found) - 1} more' if len(found) > 1 else ''})"
