"""What each training task brings to the main path in `run.py`: one task per file."""

from typing import Any

from etherdiff.config import DreamBoothConfig, S2IConfig, TrainConfig
from etherdiff.tasks.task import Job


def plan_job(config: TrainConfig, resuming: bool = False) -> Job[Any]:
    """Check everything a run needs; one UserError with all that is wrong."""
    if isinstance(config, S2IConfig):
        from etherdiff.tasks.s2i import S2IJob

        return S2IJob(config, resuming)
    from etherdiff.tasks.dreambooth import DreamBoothJob

    assert isinstance(config, DreamBoothConfig)
    return DreamBoothJob(config, resuming)
