"""The kinds of run. `find_task` gives the class of one; making it plans a run."""

from typing import TYPE_CHECKING, Any

from etherdiff.config import DreamBoothConfig, S2IConfig, TrainConfig

if TYPE_CHECKING:
    from etherdiff.tasks.dreambooth import FindScorer
    from etherdiff.tasks.task import Task, Training


def find_task(name: str) -> "type[Task[Any]]":
    """Return a task by its name in run.yaml. KeyError where there is none."""
    from etherdiff.tasks.dreambooth import DreamBooth  # here: `tasks.subjects` is needed where torch is not
    from etherdiff.tasks.perturb import Perturb
    from etherdiff.tasks.s2i import S2I

    tasks: list[type[Task[Any]]] = [DreamBooth, S2I, Perturb]
    return {task.name: task for task in tasks}[name]


def plan_training(config: TrainConfig, resuming: bool = False, find_scorer: "FindScorer | None" = None) -> "Training[Any]":
    """Plan a training run. UserError with everything that is wrong.

    find_scorer: finds what scores along the way; without it nothing does.
    """
    from etherdiff.tasks.dreambooth import DreamBooth
    from etherdiff.tasks.s2i import S2I

    if isinstance(config, S2IConfig):
        return S2I(config, resuming)
    assert isinstance(config, DreamBoothConfig)
    return DreamBooth(config, resuming, find_scorer)
