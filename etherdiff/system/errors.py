"""Errors that a user reads, and what collects them so that everything wrong is said in one message."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar, cast, overload

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
E = TypeVar("E")
F = TypeVar("F")
Value = TypeVar("Value", covariant=True)
P = ParamSpec("P")


class UserError(Exception):
    """Everything wrong with what the user gave, one sentence per problem; the CLI exits with status 2."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ProofError(RuntimeError):
    """What was written does not do what the adapted model does, and has been removed; the CLI exits with status 1."""


class RunError(RuntimeError):
    """A run that cannot go on: no memory, no disk, NaN. What is saved stays; the CLI exits with status 1."""


class NotFiniteError(RunError):
    """The loss or its gradient is NaN or infinite, and the step was not made."""


class Stopped(BaseException):  # like KeyboardInterrupt, not to be taken for a failure by `except Exception`
    """A signal asked the program to stop; the CLI exits with status 128 + its number."""

    def __init__(self, number: int, message: str = "stopped") -> None:
        self.number = number
        super().__init__(message)


@dataclass(frozen=True)
class Answer(Generic[Value]):
    """The result of something that was attempted. True if there is one."""

    value: Value | None
    there: bool = True

    def __bool__(self) -> bool:
        return self.there


class Problems:
    """Collects what is wrong, so that the user reads it all in one message.

        problems = Problems()
        base = problems.attempt(find_base, config.base)
        images = problems.then(base, read_photos)  # not attempted where the base was not found
        found_base, found_images = problems.settle(base, images)

    A sentence is noted once, with the names of those it concerns (see `of`).
    """

    def __init__(self, prefix: str = "") -> None:
        """prefix: text before each sentence that is added here, such as a run's name."""
        self.prefix, self.name = prefix, ""
        self._concerned: dict[str, list[str]] = {}

    def of(self, name: str, prefix: str = "") -> "Problems":
        """Return a view that notes into the same collection what is wrong with one of many, such as a run of a sweep."""
        view = Problems(self.prefix + prefix)
        view.name, view._concerned = name, self._concerned
        return view

    @property
    def found(self) -> list[str]:
        """The sentences so far."""
        return list(self._concerned)

    def __bool__(self) -> bool:
        return bool(self._concerned)

    def add(self, *sentences: str) -> None:
        """Note what is wrong."""
        for sentence in sentences:
            self._concerned.setdefault(self.prefix + sentence, []).extend([self.name] if self.name else [])

    def attempt(self, action: Callable[P, A], *args: P.args, **kwargs: P.kwargs) -> Answer[A]:
        """Call the action; where the user gave something wrong, note that and return an empty answer."""
        try:
            return Answer(action(*args, **kwargs))
        except UserError as error:
            self.add(*error.problems)
        except (ValueError, OSError) as error:
            self.add(str(error))
        return Answer(None, there=False)

    def then(self, answer: Answer[A], action: Callable[[A], B]) -> Answer[B]:
        """Attempt an action on an answer; return an empty one where that is empty."""
        return self.attempt(action, cast(A, answer.value)) if answer else Answer(None, there=False)

    def check(self, sentences: Callable[P, list[str]], *args: P.args, **kwargs: P.kwargs) -> None:
        """Note the sentences that a function returns, or what keeps it from looking."""
        self.add(*(self.attempt(sentences, *args, **kwargs).value or []))

    def raise_if_any(self, where: str = "", total: int = 0) -> None:
        """Raise one UserError with everything. The names of those concerned are given, unless all `total` of them are."""
        if self._concerned:
            found = self._concerned.items()
            raise UserError([f"{where}{sentence}{_concerning(names, total)}" for sentence, names in found])

    @overload
    def settle(self, a: Answer[A], /) -> tuple[A]: ...
    @overload
    def settle(self, a: Answer[A], b: Answer[B], /) -> tuple[A, B]: ...
    @overload
    def settle(self, a: Answer[A], b: Answer[B], c: Answer[C], /) -> tuple[A, B, C]: ...
    @overload
    def settle(self, a: Answer[A], b: Answer[B], c: Answer[C], d: Answer[D], /) -> tuple[A, B, C, D]: ...
    @overload
    def settle(self, a: Answer[A], b: Answer[B], c: Answer[C], d: Answer[D], e: Answer[E], /) -> tuple[A, B, C, D, E]: ...
    @overload
    def settle(
        self, a: Answer[A], b: Answer[B], c: Answer[C], d: Answer[D], e: Answer[E], f: Answer[F], /
    ) -> tuple[A, B, C, D, E, F]: ...
    def settle(self, *answers: Answer[Any]) -> tuple[Any, ...]:
        """Raise one UserError if anything is wrong, else return the values of the answers."""
        self.raise_if_any()
        if not all(answers):  # a mistake of ours: an empty answer whose reason was not noted here
            raise ValueError("an answer is empty, and nothing was noted as wrong")
        return tuple(answer.value for answer in answers)


def _concerning(names: list[str], total: int) -> str:
    if not names or len(names) == total:
        return ""
    return f" (run {names[0]}{f', and {len(names) - 1} more' if len(names) > 1 else ''})"
