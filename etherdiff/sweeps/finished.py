"""How far a run of a sweep is, read from its run folder."""

import json
from enum import IntEnum

from etherdiff.runs.folder import RunFolder, check_result, is_sealed, manifest_of, read_settings
from etherdiff.sweeps.spec import OWN_KEYS
from etherdiff.sweeps.states import read_state, scores_hash
from etherdiff.sweeps.units import Run
from etherdiff.system.errors import UserError


class Stage(IntEnum):
    """In this order."""

    ABSENT = 0
    BEGUN = 1
    """To be resumed."""
    MADE = 2
    """Its result is whole; its scores, with the file's options, are not there."""
    FINISHED = 3


def stage_of(run: Run) -> Stage:
    """How far a run is. UserError where its folder holds a run of another configuration."""
    folder = RunFolder(run.folder)
    if not folder.settings.is_file():
        return Stage.BEGUN if folder.checkpoints.is_dir() else Stage.ABSENT
    if not is_sealed(folder.settings):
        return Stage.BEGUN  # resuming mends it, or says why not
    _, config, _ = read_settings(run.folder)
    there = config.model_dump(mode="json", exclude=set(OWN_KEYS))
    if there != run.config:
        from etherdiff.eval.results import named_differences  # slow to import, and not needed where all is well

        found = "; ".join(named_differences(there, run.config)) or "other keys"
        raise UserError(f"{run.folder} holds a run of another configuration ({found}): move it away, or remove it")
    if not _is_whole(folder, run):
        return Stage.BEGUN
    return Stage.FINISHED if run.scoring is None or is_scored(run) else Stage.MADE


def is_scored(run: Run) -> bool:
    """Whether metrics.json is what scoring with the run's options wrote.

    The state tells: it has the options since before they were used, and the hash of the metrics.json that was there then,
    so that one which came since is theirs, whoever was killed before he could write that it came.
    """
    state, scores = read_state(run), scores_hash(run)
    if scores is None or run.scoring is None or state.get("eval") != run.scoring.record():
        return False
    return bool(scores == state["scores"] if "scores" in state else scores != state.get("scores_before", scores))


def _is_whole(folder: RunFolder, run: Run) -> bool:
    """Whether all that the task saves is there, as it was written, and trained to the end."""
    try:
        for result in run.results:
            if not manifest_of(result).is_file():
                return False
            check_result(folder, result)
        return run.steps == 0 or json.loads(folder.cost.read_text(encoding="utf-8"))["steps"] == run.steps
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return False
