"""`etherdiff perturb`: a run whose adapter is a random transformation, to measure what a base tolerates (paper, figure 3)."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from etherdiff.adapters.analysis import distance_problem, perturb_adapter
from etherdiff.adapters.ether import REFLECTION_DISTANCE
from etherdiff.adapters.io import save_adapter
from etherdiff.adapters.methods import add_adapter
from etherdiff.config import PerturbConfig
from etherdiff.families.sd1 import fingerprint, load_base
from etherdiff.runs.folder import RunFolder, write_settings
from etherdiff.system.errors import Problems, UserError
from etherdiff.system.files import staged_folder
from etherdiff.system.locks import run_lock
from etherdiff.tasks.planning import Plan, absolute, check_common, check_subject
from etherdiff.tasks.subject_sets import find_subject_sets
from etherdiff.tasks.task import Task, save_result
from etherdiff.train.randomness import Draw, normal


@dataclass(frozen=True)
class PerturbPlan(Plan):
    """A perturbation that can be made."""

    config: PerturbConfig
    distance: float
    """Distance of every block from the identity."""


class Perturb(Task[PerturbPlan]):
    """Transform every targeted layer at random."""

    name = "perturb"
    command = "perturb"
    config_class = PerturbConfig
    image_sets = staticmethod(find_subject_sets)

    def __init__(self, config: PerturbConfig) -> None:
        self.plan = plan_perturbation(config)

    def make(self) -> Path:
        """Make the run folder, whole or not at all, and return it."""
        plan, config = self.plan, self.plan.config
        with run_lock(plan.output):
            unet, base_hashes = load_base(plan.base).unet, fingerprint(plan.base)
            model = add_adapter(unet, config.method, plan.options, config.seed)
            perturb_adapter(model, plan.distance, lambda number, shape: draw_tensor(config.seed, number, shape))
            with staged_folder(plan.output) as staged:
                run = RunFolder(staged)
                facts = {"base": {"name": plan.base.name, "path": str(plan.base.local_path), "fingerprint": base_hashes}}
                write_settings(run, self.name, config, facts)
                base = {"name": plan.base.name, "fingerprint": base_hashes}
                save_result(run.adapter, lambda: save_adapter(model, run.adapter, base))
        return plan.output


def perturb(config: PerturbConfig) -> Path:
    """Make the run folder and return it. UserError, before any weight is read, where it cannot be made."""
    return Perturb(config).make()


def draw_tensor(seed: int, number: int, shape: tuple[int, ...]) -> Tensor:
    """Return the random numbers of one of the adapter's tensors."""
    return normal(shape, seed, Draw.PERTURBATION, step=0, index=number)


def plan_perturbation(config: PerturbConfig) -> PerturbPlan:
    """Check the whole configuration against the base and the subject. UserError with everything that is wrong."""
    problems = Problems()
    common = check_common(config, problems, f"{Path(config.subject).name}-{config.method}-random")
    _, noun = check_subject(config, problems, common)
    distance = problems.attempt(find_distance, config, common.adapted.value)
    base, options, found_distance, class_noun = problems.settle(common.base, common.options, distance, noun)
    resolved = config.model_copy(
        update=common.filled_in(config, options, base.resolution)
        | {"subject": absolute(config.subject), "class_noun": class_noun, "distance": found_distance}
    )
    return PerturbPlan(resolved, base, options, common.output, found_distance)


def find_distance(config: PerturbConfig, adapted: nn.Module | None) -> float:
    """Return the blocks' distance from the identity. UserError where it is needed, or the method cannot have it."""
    distance = REFLECTION_DISTANCE if config.distance is None and config.method == "ether" else config.distance
    if distance is None:
        raise UserError(f"distance: say how far {config.method}'s matrices are to be from the identity, for instance 1")
    if adapted is not None and (problem := distance_problem(adapted, distance)):
        raise UserError(f"distance: {problem}")
    return distance
