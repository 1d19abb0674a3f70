"""Errors that a user reads: what they gave is wrong, or what was made does not hold."""


class UserError(Exception):
    """Everything wrong with what the user gave, one sentence per problem; the CLI exits with status 2."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ProofError(RuntimeError):
    """What was written does not do what the adapted model does, and has been removed; the CLI exits with status 1."""
