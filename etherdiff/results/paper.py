"""The paper's numbers for the rows of a table or the lines of a figure, and why they must not be taken for the same thing."""

from collections.abc import Sequence
from dataclasses import dataclass

from etherdiff.config import TrainConfig
from etherdiff.eval.metrics import METRICS
from etherdiff.eval.paper import PAPER_S2I_SCOPE, PAPER_SCOPE, paper_value
from etherdiff.runs.run import Run


@dataclass(frozen=True)
class PaperValue:
    """What the paper prints."""

    value: float
    """Shares of 1, not percent."""
    differs: tuple[str, ...]
    """Why ours is no repetition of it; empty where everything is as in the paper."""


def paper_of(runs: Sequence[Run], score: str) -> PaperValue | None:
    """The paper's number for the method of the runs, if they were trained, have one method and it has one."""
    methods = {run.method_label for run in runs if isinstance(run.config, TrainConfig)}
    value = paper_value(score, *methods) if len(methods) == 1 else None
    if value is None:
        return None
    return PaperValue(value, tuple(dict.fromkeys(reason for run in runs for reason in _differs(run, score))))


def paper_of_real_images(runs: Sequence[Run], score: str) -> PaperValue | None:
    """The same for the row of real images."""
    baseline = METRICS[score].baseline if score in METRICS else None
    value = None if baseline is None else paper_value(baseline, "")
    if baseline is None or value is None:
        return None
    return PaperValue(value, tuple(dict.fromkeys(reason for run in runs for reason in _differs(run, baseline))))


def paper_scope(task: str) -> str:
    """What the paper's numbers are of."""
    return PAPER_S2I_SCOPE if task == "s2i" else PAPER_SCOPE


def _differs(run: Run, score: str) -> list[str]:
    """As `etherdiff eval` recorded it; of a score that it recorded nothing of, that."""
    recorded = run.result.paper.scores.get(score) if run.result else None
    return recorded.differs if recorded else ["not compared with the paper by etherdiff eval"]
