"""Errors that a user reads: what they gave is wrong, or what was made does not hold."""


class UserError(Exception):
    """Everything wrong with what the user gave, one sentence per problem; the CLI exits with status 2."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ProofError(RuntimeError):
    """What was written does not do what the adapted model does, and has been removed; the CLI exits with status 1."""


class RunError(RuntimeError):
    """A run that cannot go on: no memory, no disk, numbers that are none. What is saved stays; the CLI exits with status 1."""


class NotFiniteError(RunError):
    """The loss or its gradient is NaN or infinite, and the step was not made."""


class Stopped(BaseException):  # like KeyboardInterrupt, not to be taken for a failure by `except Exception`
    """A signal asked the program to stop; the CLI exits with status 128 + its number."""

    def __init__(self, number: int, message: str = "stopped") -> None:
        self.number = number
        super().__init__(message)
