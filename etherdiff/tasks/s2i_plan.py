"""Before anything expensive: find everything that a controllable run needs, and say all that is wrong with it at once."""

from dataclasses import dataclass
from pathlib import Path

from etherdiff.adapters.methods import METHODS, MethodOptions, resolve_options
from etherdiff.config import S2IConfig
from etherdiff.control.datasets import ControlDataset
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import Base
from etherdiff.runs.control import open_control_run, run_dataset
from etherdiff.runs.folder import RunFolder
from etherdiff.system.errors import UserError
from etherdiff.system.paths import data_root
from etherdiff.tasks.planning import Problems, absolute, machine_problems, method_options, output_problems, try_adapter

ENCODER_RATE = 1e-4
"""The control encoder's learning rate at most, and with the method `none` (ETHER paper, appendix C)."""


@dataclass(frozen=True)
class S2IPlan:
    """A run that can start: `config` has every default filled in."""

    config: S2IConfig
    base: Base
    options: MethodOptions
    dataset: ControlDataset
    output: Path
    resolution: int
    refit: RunFolder | None = None
    """The run whose magnitudes are learned."""


def plan_s2i(config: S2IConfig, resuming: bool = False) -> S2IPlan:
    """Check the whole configuration against the machine, the base and the data. Raises one UserError with everything."""
    problems = Problems()
    refit = None
    if config.refit is not None:
        config, refit = problems.attempt(lambda: refitting(config)) or (config, None)
    root = data_root(config.data_root)
    base = problems.attempt(lambda: find_base(config.base, config.prediction_type, "configs" if config.dry_run else "weights"))
    resolution = config.resolution or (base.resolution if base else 0)
    dataset = None
    if base is not None:
        if found := base.resolution_problems(resolution):
            problems.found += found
        else:
            dataset = problems.attempt(lambda: run_dataset(config, root, resolution))
    options = problems.attempt(lambda: s2i_options(config))
    if base is not None and options is not None and config.method != "none":
        problems.attempt(lambda: try_adapter(base, config.method, options))
    problems.found += machine_problems(config)
    suffix = "-refit" if config.refit else ""
    output = config.output or Path("runs") / f"{Path(config.dataset).name}-{config.method}{suffix}"
    if not resuming:
        problems.found += problems.attempt(lambda: output_problems(output, config.overwrite)) or []
    problems.raise_if_any()
    assert base is not None
    assert options is not None
    assert dataset is not None
    rate = config.learning_rate or (ENCODER_RATE if config.method == "none" else METHODS[config.method].s2i_learning_rate)
    resolved = config.model_copy(
        update={
            # absolute, so that the run can be resumed from any folder
            "output": output.absolute(),
            "base": absolute(config.base),
            "dataset": absolute(config.dataset),
            "data_root": root.absolute() if root else None,
            "captions": config.captions.absolute() if config.captions else None,
            "palette": config.palette and absolute(config.palette),
            "refit": refit.path.absolute() if refit else None,
            "signal": dataset.signal.name,
            "learning_rate": rate,
            "encoder_learning_rate": config.encoder_learning_rate or min(rate, ENCODER_RATE),
            "blocks": options.blocks,
            "rank": options.rank,
            "resolution": resolution,
        }
    )
    return S2IPlan(resolved, base, options, dataset, output, resolution, refit)


def refitting(config: S2IConfig) -> tuple[S2IConfig, RunFolder]:
    """The configuration with what it takes over from the run to re-fit, and that run. UserError where it cannot be."""
    assert config.refit is not None
    opened, other = open_control_run(config.refit)
    run = opened.folder
    if not run.adapter.is_dir() or run.refitted_adapter.is_dir() or other.method == "full":
        raise UserError(f"refit: {run.path} has no adapter of layers whose magnitudes could be learned")
    taken = ("base", "prediction_type", "method", "targets", "blocks", "rank", "encoder_init")
    return config.model_copy(update={name: getattr(other, name) for name in taken}), run


def s2i_options(config: S2IConfig) -> MethodOptions:
    """The adapter's options. ValueError where the method does not have one that is given."""
    options = method_options(config)
    if config.method != "none":
        return resolve_options(config.method, options)
    given = [name for name in ("blocks", "rank", "dropout") if getattr(config, name)]
    if given:
        raise ValueError(f"method none trains the control encoder alone: it does not have {' or '.join(given)}")
    return options
