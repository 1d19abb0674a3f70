"""What a sweep can run: of each task the command, its configuration and how it is scored."""

from dataclasses import dataclass

from etherdiff.config import DreamBoothConfig, PerturbConfig, RunConfig, S2IConfig
from etherdiff.sweeps.scoring import ControlScoring, Scoring, SubjectScoring


@dataclass(frozen=True)
class Task:
    """A command of etherdiff that makes run folders."""

    command: str
    config: type[RunConfig]
    scoring: type[Scoring]


TASKS = {
    "dreambooth": Task("train-dreambooth", DreamBoothConfig, SubjectScoring),
    "s2i": Task("train-s2i", S2IConfig, ControlScoring),
    "perturb": Task("perturb", PerturbConfig, SubjectScoring),
}
"""By the names that run.yaml has for them."""
