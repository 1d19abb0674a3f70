"""Facts of a run apart from its scores: trained parameters, cost of a step, change of the weights.

Facts computed from weights take seconds. They are kept in RUN/facts.json, with the hashes of the files they are computed from.
Distances and energies are means over the layers of the run's `targets`, so that full fine-tuning is comparable with adapters.
"""

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from etherdiff import __version__
from etherdiff.adapters.analysis import energy_difference, full_drift
from etherdiff.adapters.io import FULL, MAGNITUDE, WEIGHTS, read_adapter
from etherdiff.adapters.methods import TARGETS, MethodOptions
from etherdiff.config import TrainConfig
from etherdiff.eval.best import combined
from etherdiff.eval.metrics import HELD_OUT
from etherdiff.families.bases import find_base
from etherdiff.report.charts import points
from etherdiff.runs.folder import manifest_of
from etherdiff.runs.model import count_trained, measure_drift, merged_weights
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.system.files import file_hash, write_json
from etherdiff.tasks.planning import method_options
from etherdiff.use.inspection import training_estimate

KEPT = "facts.json"


@dataclass(frozen=True)
class Fact:
    """One number about a run."""

    label: str
    of: Callable[[Run], float | None]
    """Function of the run; None where the method has no such thing. UserError, with the reason, where it is unknown."""
    keep: bool = True
    """Whether it is slow to compute, so that it is kept."""
    exact: bool = False
    """Whether it is counted rather than measured."""
    unit: float = 1
    """Unit of the shown number; CSV has the plain number."""
    higher_is_better: bool | None = None
    """None if it is neither good nor bad."""
    scores: tuple[str, ...] = ()
    """Scores that it is computed from."""


def fact(run: Run, name: str) -> float | None:
    """Return a number of `FACTS`; None where the method has no such thing. UserError, with the reason, where it is unknown."""
    entry = FACTS[name]
    if not entry.keep:
        return entry.of(run)
    path, of = run.folder.path / KEPT, _computed_from(run)
    kept = _read_kept(path, of)
    if name not in kept:
        kept[name] = entry.of(run)
        with suppress(OSError):  # the run folder is read-only: the next table computes it again
            write_json(path, {"of": of, "values": kept})
    return kept[name]


def _read_kept(path: Path, of: Mapping[str, Any]) -> dict[str, float | None]:
    """Read what was computed from the same files before; empty if the file holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content["values"]) if content["of"] == of else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _computed_from(run: Run) -> dict[str, Any]:
    """Return hashes of everything that a kept number depends on."""
    hashes = {folder.name: _result_hash(folder) for folder in run.adapters}
    return {"etherdiff": __version__, "run.yaml": file_hash(run.folder.settings), "results": hashes}


def _result_hash(folder: Path) -> str:
    """Hash the manifest, which holds the files' hashes; the weights themselves if there is none."""
    manifest = manifest_of(folder)
    return file_hash(manifest if manifest.is_file() else folder / WEIGHTS)


# --- Counted ---------------------------------------------------------------------------------------------------------


def _step_flops(run: Run) -> float | None:
    """Count the UNet's operations in one optimizer step, forward and backward (see `use.flops`)."""
    config = _trained(run)
    if config.method == "none":
        return None
    is_refitted = run.folder.refitted_adapter.is_dir()
    options = MethodOptions(TARGETS[config.targets]) if is_refitted else method_options(config)
    images = config.batch_size * (2 if getattr(config, "prior_preservation", False) else 1)
    resolution = getattr(config, "resolution", None)
    method = "magnitude" if is_refitted else config.method
    flops = _pass_flops(config.base, config.prediction_type, method, options, resolution, images)
    return None if flops is None else flops * config.gradient_accumulation


def _trained(run: Run) -> TrainConfig:
    if not isinstance(run.config, TrainConfig):
        raise UserError("it was not trained")
    return run.config


@lru_cache
def _pass_flops(
    base: str, prediction_type: str | None, method: str, options: MethodOptions, resolution: int | None, images: int
) -> float | None:
    found = find_base(base, prediction_type, "configs")
    estimate = training_estimate(found, method, options, resolution=resolution or found.resolution, batch_size=images)
    return estimate["step_flops"]


def _seconds_per_step(run: Run) -> float:
    """Return the seconds of a step in the last session, including evaluation; other programs slow it down."""
    config = _trained(run)
    cost = run.cost
    if not cost.images_per_second or not cost.processes:
        raise UserError("cost.json cannot be read (it has no images_per_second or no processes)")
    return config.batch_size * config.gradient_accumulation * cost.processes / cost.images_per_second


def _validation_loss(run: Run) -> float:
    """Return the last logged value. Runs with the same images, seed and loss weights draw the same noise: they compare."""
    logged = points(run.curves, "validation_loss")
    if not logged:
        raise UserError("it logged no validation loss")
    _, loss = logged[-1]
    return loss


def _likeness_and_prompt(run: Run, likeness: str) -> float:
    """Return √(DINO · CLIP-T), which chooses `best/`: DINO alone is high for a copy, CLIP-T alone for the base."""
    if missing := [name for name in (likeness, "clip_t") if name not in run.scores]:
        raise UserError(f"it has no {' and no '.join(missing)}")
    return combined({"dino": run.scores[likeness].mean, "clip_t": run.scores["clip_t"].mean})


# --- Measured on the weights -----------------------------------------------------------------------------------------


def _transformation_distance(run: Run) -> float | None:
    """Return the mean of ‖T − I‖_F over the layers' multiplied sides; None for methods that add."""
    if len(run.adapters) != 1 or read_adapter(run.folder.adapter).peft_type in (FULL, MAGNITUDE):
        return None
    drift = measure_drift(run).values()
    sides = [side for layer in drift for side in (layer.input_side, layer.output_side) if side is not None]
    return _mean(sides) if sides else None


def _weight_distance(run: Run) -> float:
    """Return the mean of ‖W′ − W‖_F over the layers."""
    return _mean([layer.weight for layer in full_drift(*merged_weights(run)).values()])


def _energy_difference(run: Run, half_space: bool) -> float:
    return energy_difference(*merged_weights(run), half_space)


def _mean(values: list[float]) -> float:
    mean = sum(values) / len(values)
    if not math.isfinite(mean):
        raise UserError("the adapter holds NaN or infinity")
    return mean


FACTS: dict[str, Fact] = {
    "trainable_parameters": Fact("trainable parameters", count_trained, keep=False, exact=True),
    "step_flops": Fact("GFLOP per step", _step_flops, exact=True, unit=1e9),
    "seconds_per_step": Fact("seconds per step", _seconds_per_step, keep=False),
    "validation_loss": Fact("validation loss", _validation_loss, keep=False, higher_is_better=False),
    **{
        f"{likeness}_clip_t": Fact(
            f"√(DINO · CLIP-T){note}",
            partial(_likeness_and_prompt, likeness=likeness),
            keep=False,
            higher_is_better=True,
            scores=(likeness, "clip_t"),
        )
        for likeness, note in (("dino", ""), (f"dino{HELD_OUT}", ", held-out images"))
    },
    "transformation_distance": Fact("transformation distance ‖T − I‖", _transformation_distance),
    "weight_distance": Fact("weight distance ‖W′ − W‖", _weight_distance),
    "energy_difference": Fact("hyperspherical energy, relative change", lambda run: _energy_difference(run, False)),
    "energy_difference_half_space": Fact(
        "half-space hyperspherical energy, relative change", lambda run: _energy_difference(run, True)
    ),
}
"""Name of the column -> fact."""
