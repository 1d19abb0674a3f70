"""`etherdiff perturb`: a run folder whose adapter is a random transformation, to see what a base bears (paper, figure 3)."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from etherdiff.adapters.ether import REFLECTION_DISTANCE
from etherdiff.adapters.io import save_adapter
from etherdiff.adapters.methods import TARGETS, MethodOptions, add_adapter, resolve_options
from etherdiff.adapters.perturbation import distance_problem, perturb_adapter
from etherdiff.config import PerturbConfig
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import Base, fingerprint, load_base
from etherdiff.runs.folder import RunFolder, write_settings
from etherdiff.system.files import staged_folder
from etherdiff.system.locks import run_lock
from etherdiff.system.paths import data_root
from etherdiff.tasks.planning import Problems, absolute, class_noun_of, output_problems, prompt_problems, try_adapter
from etherdiff.tasks.subjects import find_subject
from etherdiff.tasks.task import save_result
from etherdiff.train.randomness import Draw, normal


@dataclass(frozen=True)
class PerturbPlan:
    """A perturbation that can be made: `config` has every default filled in."""

    config: PerturbConfig
    base: Base
    options: MethodOptions
    output: Path
    distance: float
    """Of every block from the identity."""


def perturb(config: PerturbConfig) -> Path:
    """Make the run folder, whole or not at all; returns it. UserError, before any weight is read, where it cannot be made."""
    plan = plan_perturbation(config)
    with run_lock(plan.output):
        unet, base_hashes = load_base(plan.base).unet, fingerprint(plan.base)
        model = add_adapter(unet, plan.config.method, plan.options, plan.config.seed)
        perturb_adapter(model, plan.distance, lambda number, shape: drawn(plan.config.seed, number, shape))
        with staged_folder(plan.output) as staged:
            run = RunFolder(staged)
            facts = {"base": {"name": plan.base.name, "path": str(plan.base.local_path), "fingerprint": base_hashes}}
            write_settings(run, "perturb", plan.config, facts)
            base = {"name": plan.base.name, "fingerprint": base_hashes}
            save_result(run.adapter, lambda: save_adapter(model, run.adapter, base))
    return plan.output


def drawn(seed: int, number: int, shape: tuple[int, ...]) -> Tensor:
    """The random numbers of one of the adapter's tensors."""
    return normal(shape, seed, Draw.PERTURBATION, step=0, index=number)


def plan_perturbation(config: PerturbConfig) -> PerturbPlan:
    """Check the whole configuration against the base and the subject. Raises one UserError with everything that is wrong."""
    problems = Problems()
    root = data_root(config.data_root)
    base = problems.attempt(lambda: find_base(config.base, config.prediction_type))
    subject = problems.attempt(lambda: find_subject(config.subject, root))
    class_noun = problems.attempt(lambda: class_noun_of(config, subject))
    distance = REFLECTION_DISTANCE if config.distance is None and config.method == "ether" else config.distance
    if distance is None:
        problems.found.append(f"distance: say how far {config.method}'s matrices are to be from the identity, for instance 1")
    given = MethodOptions(TARGETS[config.targets], config.blocks)
    options = problems.attempt(lambda: resolve_options(config.method, given))
    if base is not None and options is not None:
        adapted = problems.attempt(lambda: try_adapter(base, config.method, options))
        if adapted is not None and distance is not None and (problem := distance_problem(adapted, distance)):
            problems.found.append(f"distance: {problem}")
    if base is not None:
        prompt = f"a photo of {config.identifier} {class_noun}"
        problems.found += problems.attempt(lambda: prompt_problems(base, prompt)) or []
    output = config.output or Path("runs") / f"{Path(config.subject).name}-{config.method}-random"
    problems.found += problems.attempt(lambda: output_problems(output, config.overwrite)) or []
    problems.raise_if_any()
    assert base is not None
    assert options is not None
    assert distance is not None
    resolved = config.model_copy(
        update={
            "output": output.absolute(),
            "base": absolute(config.base),
            "subject": absolute(config.subject),
            "data_root": root.absolute() if root else None,
            "blocks": options.blocks,
            "class_noun": class_noun,
            "distance": distance,
        }
    )
    return PerturbPlan(resolved, base, options, output, distance)
