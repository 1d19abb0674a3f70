"""How far a run of a sweep is, read from its run folder."""

from enum import IntEnum

from etherdiff.runs.folder import RunFolder, is_sealed
from etherdiff.runs.identity import named_differences
from etherdiff.runs.run import Run
from etherdiff.sweeps.spec import OWN_KEYS
from etherdiff.sweeps.states import read_state, scores_hash
from etherdiff.sweeps.units import Run as SweepRun
from etherdiff.system.errors import UserError


class Stage(IntEnum):
    """In this order."""

    ABSENT = 0
    BEGUN = 1
    """To be resumed."""
    MADE = 2
    """Its result is whole; its scores, with the file's options, are not there."""
    FINISHED = 3


def stage_of(run: SweepRun) -> Stage:
    """How far a run is. UserError where its folder holds a run of another configuration."""
    folder = RunFolder(run.folder)
    if not folder.settings.is_file():
        return Stage.BEGUN if folder.checkpoints.is_dir() else Stage.ABSENT
    if not is_sealed(folder.settings):
        return Stage.BEGUN  # resuming mends it, or says why not
    made = Run.open(run.folder)
    there = made.config.model_dump(mode="json", exclude=set(OWN_KEYS))
    if there != run.config:
        found = "; ".join(named_differences(there, run.config)) or "other keys"
        raise UserError(f"{run.folder} holds a run of another configuration ({found}): move it away, or remove it")
    if not made.is_finished:
        return Stage.BEGUN
    return Stage.FINISHED if run.scoring is None or is_scored(run) else Stage.MADE


def is_scored(run: SweepRun) -> bool:
    """Whether metrics.json is what scoring with the run's options wrote.

    The state tells: it has the options since before they were used, and the hash of the metrics.json that was there then,
    so that one which came since is theirs, whoever was killed before he could write that it came.
    """
    state, scores = read_state(run), scores_hash(run)
    if scores is None or not run.is_scored_with(state.get("eval")):
        return False
    return bool(scores == state["scores"] if "scores" in state else scores != state.get("scores_before", scores))
