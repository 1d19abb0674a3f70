"""A sweep file: which runs it asks for, read and checked without touching data or weights.

task: dreambooth                              # dreambooth, s2i or perturb
recipe: ../../tiny/dreambooth/{method}.yaml   # relative to this file; {key} stands for the run's own value
settings: {base: tiny, steps: 150}            # configuration keys, over the recipe
grid: {subject: [candy_ball, gift_box], seed: [0, 1]}          # every combination
runs:                                         # alternatives, each with every combination
  - {method: ether}
  - {method: oft, then: [{refit: "{previous}", steps: 60}]}    # another run on top of this one, from its folder
eval: {num: 4, steps: 20}                     # options of `etherdiff eval`; false: not scored
resources: {cpus: 1, gpus: 0}                 # of each run
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from etherdiff.config import (
    EVAL_OPTIONS,
    SWEEP_OWN_KEYS,
    TASK_CONFIGS,
    EvalOptions,
    Resources,
    RunConfig,
    SweepFile,
    load_run_config,
    load_yaml,
    read_recipe,
)
from etherdiff.system.errors import Problems, UserError

PREVIOUS = "{previous}"
"""Placeholder in a value under `then`: the folder of the previous run."""
MAX_RUNS = 10_000


@dataclass(frozen=True)
class Variant:
    """A run that the file asks for."""

    label: str
    """The values in which it can differ from the others, joined by "-"."""
    values: dict[str, Any]
    """Options in the file, which replace the recipe's."""
    config: RunConfig
    """Well-formed; what it names need not be there. Under `then` a value may still hold `PREVIOUS`."""


@dataclass(frozen=True)
class Sweep:
    """A sweep file whose every run is well-formed."""

    path: Path
    task: str
    units: tuple[tuple[Variant, ...], ...]
    """Independent runs, each followed by the runs on top of it."""
    scoring: EvalOptions | None
    """Options of `etherdiff eval`; None: the runs are not scored."""
    resources: Resources

    @property
    def size(self) -> int:
        """Number of runs."""
        return sum(map(len, self.units))


def read_sweep(path: Path) -> Sweep:
    """Read the runs of a sweep file. Raises one UserError with everything that is wrong with it."""
    file, problems = _read_file(path), Problems()
    if file.task not in TASK_CONFIGS:
        problems.add(f"task: must be {', '.join(TASK_CONFIGS)}, not {file.task!r}")
    problems.add(*_misplaced(file))
    resources = problems.of("", "resources: ").attempt(load_run_config, Resources, file.resources)
    scoring: EvalOptions | None = None
    if file.task in TASK_CONFIGS and file.eval is not False:
        wanted = {} if file.eval is True else file.eval
        scoring = problems.of("", "eval: ").attempt(load_run_config, EVAL_OPTIONS[file.task], wanted).value
    problems.raise_if_any(f"{path}: ")
    asked, units = list(_units(file)), []
    for unit in asked:
        variants = []
        for label, values in unit:
            config = problems.of(label).attempt(_configure, path, TASK_CONFIGS[file.task], file.recipe, values)
            variants += [Variant(label, values, config.value)] if config.value else []
        units.append(tuple(variants))
    problems.raise_if_any(f"{path}: ", sum(map(len, asked)))
    return Sweep(path, file.task, tuple(units), scoring, *problems.settle(resources))


def _read_file(path: Path) -> SweepFile:
    if not path.is_file():
        raise UserError(f"{path}: there is no such sweep file")
    content, problems = load_yaml(path), Problems(f"{path}: ")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: a sweep file is a list of `key: value` lines")
    (file,) = problems.settle(problems.attempt(load_run_config, SweepFile, content))
    return file


def _misplaced(file: SweepFile) -> list[str]:
    """List what is wrong with how the file's parts fit together."""
    found = [f"grid: {key} has no values" for key, values in file.grid.items() if not values]
    for key, values in file.grid.items():
        repeated = [value for at, value in enumerate(values) if value in values[:at]]
        found += [f"grid: {key} has the value {value} twice" for value in repeated]
    alternatives = [alternative for alternative in file.runs if isinstance(alternative.get("then", []), list)]
    if len(alternatives) < len(file.runs):
        found.append("runs: then must be a list of runs, each with its own options")
    later = [more for alternative in alternatives for more in alternative.get("then", [])]
    if not all(isinstance(more, dict) and "then" not in more for more in later):
        found.append("runs: each run under then must be `key: value` options, without another then")
        later = []
    if isinstance(file.eval, dict) and "overwrite" in file.eval:
        found.append("eval: overwrite: the sweep chooses it itself; leave it out")
    for part in (file.settings, file.grid, *file.runs, *later):
        found += [f"{key}: the sweep chooses it itself; leave it out" for key in SWEEP_OWN_KEYS if key in part]
    both = {key for alternative in file.runs for key in alternative if key in file.grid}
    found += [f"{key}: must not be both in grid and in runs" for key in sorted(both)]
    firsts = [file.settings, *file.grid.values(), *({**one, "then": None} for one in file.runs)]
    if PREVIOUS in str(firsts):
        found.append(f"{PREVIOUS} stands for the folder of the run before: use it under then")
    runs = prod(map(len, file.grid.values())) * (len(file.runs) + len(later))
    if runs > MAX_RUNS:
        found.append(f"{runs:,} runs are asked for; a sweep has at most {MAX_RUNS:,}")
    return list(dict.fromkeys(found))


def _units(file: SweepFile) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Yield the units: label and values of each run, followed by those of the runs on top of it."""
    for point in itertools.product(*file.grid.values()):
        for alternative in file.runs:
            varied = dict(zip(file.grid, point, strict=True)) | alternative
            unit = []
            for more in [{}, *varied.pop("then", [])]:
                varied |= more
                unit.append((label_of(varied), file.settings | varied))
            yield unit


def label_of(varied: Mapping[str, Any]) -> str:
    """Return a name made of a run's values: "candy_ball-0-ether"."""
    return "-".join(_slug(key, value) for key, value in varied.items())[:120].strip("-.") or "run"


def _slug(key: str, value: Any) -> str:
    if value is None or isinstance(value, bool):
        text = f"{ {None: 'default', True: 'with', False: 'no'}[value] }-{key}"
    elif PREVIOUS in str(value):
        text = key
    else:
        text = Path(value).name if isinstance(value, str) else str(value)
    return re.sub(r"[^A-Za-z0-9._+]+", "-", text)[:40].strip("-.")


def _configure(path: Path, cls: type[RunConfig], recipe: str | None, values: dict[str, Any]) -> RunConfig:
    """Return a run's configuration: its values over its recipe's."""
    content = {} if recipe is None else read_recipe(path.parent / _filled_in(recipe, values))
    return load_run_config(cls, content | values)


def _filled_in(recipe: str, values: Mapping[str, Any]) -> str:
    """Return the recipe's path with the run's values filled in."""
    lacking = [key for key in re.findall(r"\{(\w+)\}", recipe) if key not in values]
    if lacking:
        raise UserError(f"recipe: {recipe} needs {' and '.join(lacking)}, which the run does not say")
    return re.sub(r"\{(\w+)\}", lambda found: str(values[found[1]]), recipe)
