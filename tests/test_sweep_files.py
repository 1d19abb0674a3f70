"""The shipped sweeps and the tiny world's recipes: every one is read, fits its base, and is fair."""

import math
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from torch import nn

from etherdiff.adapters.analysis import distance_problem
from etherdiff.adapters.methods import METHODS, TARGETS, MethodOptions
from etherdiff.config import METHOD_NAMES, DreamBoothConfig, PerturbConfig, S2IConfig, read_config
from etherdiff.families.bases import find_base
from etherdiff.sweeps.spec import Sweep, Variant, read_sweep
from etherdiff.system.errors import UserError
from etherdiff.tasks.planning import check_options, method_options, try_adapter
from etherdiff.tasks.subjects import SUBJECT_CLASSES
from etherdiff.tiny.things import SUBJECTS

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted((CONFIGS / "sweeps").glob("*/*.yaml"))
BASES = ("tiny", "sd15")
PAPER = {
    *("table2", "table3", "blocks", "perturbation", "one-sided", "cost"),
    *("learning-rate-dreambooth", "learning-rate-s2i", "steps-dreambooth", "steps-s2i"),
}
RECIPES = {"dreambooth": (DreamBoothConfig, METHOD_NAMES), "s2i": (S2IConfig, (*METHOD_NAMES, "none"))}


@cache
def sweep(base: str, name: str) -> Sweep:
    return read_sweep(CONFIGS / "sweeps" / base / f"{name}.yaml")


def configs(base: str, name: str) -> list[Any]:
    return [run.config for run in runs(sweep(base, name))]


def runs(found: Sweep) -> list[Variant]:
    return [run for unit in found.units for run in unit]


def methods(found: Sweep) -> list[str]:
    """Each once; a run on top of another has the ending that the tables give it."""
    named = (run.config.method + ("+magnitude" if getattr(run.config, "refit", None) else "") for run in runs(found))
    return list(dict.fromkeys(named))


@pytest.mark.parametrize("base", BASES)
def test_there_is_one_of_each_for_both_bases(base):
    assert {path.stem for path in (CONFIGS / "sweeps" / base).iterdir()} == PAPER


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_it_is_read_and_says_of_itself_what_it_is(path):
    found = sweep(path.parent.name, path.stem)
    labels = [run.label for run in runs(found)]
    assert len(set(labels)) == len(labels)
    assert {run.config.base for run in runs(found)} == {path.parent.name}
    said = path.read_text()
    assert f"# {found.size} runs" in said
    assert all(
        f"sweeps/{path.stem} " in line or f"/{path.stem}.yaml" in line
        for line in said.splitlines()
        if line.startswith("#   etherdiff")
    )
    assert found.resources.gpus == (path.parent.name == "sd15")
    for key in re.findall(r"--(?:rows|x|lines) ([\w,]+)", said):
        known = {name for run in runs(found) for name in type(run.config).model_fields} | {"step"}
        assert set(key.split(",")) <= known


def test_every_adapter_of_the_tiny_sweeps_fits():
    """Each combination of method, targets, blocks, rank and distance once."""
    wanted: dict[tuple[str, MethodOptions], set[float | None]] = defaultdict(set)
    for config in (config for path in FILES if path.parent.name == "tiny" for config in configs("tiny", path.stem)):
        if isinstance(config, PerturbConfig):
            wanted[config.method, MethodOptions(TARGETS[config.targets], config.blocks)].add(config.distance)
        elif config.method == "none":
            check_options(config)
        else:
            wanted[config.method, method_options(config)].add(None)
    for (method, options), distances in wanted.items():
        model = try_adapter(find_base("tiny"), method, options)
        for distance in distances - {None}:
            assert distance_problem(model, distance) is None


def test_the_blocks_and_distances_fit_stable_diffusion():
    """By its layers' sizes: PEFT takes seconds to adapt a UNet of this size."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(find_base("sd15", parts="configs").config("unet"))
    layers = {
        name: (layer.in_features, layer.out_features) for name, layer in unet.named_modules() if isinstance(layer, nn.Linear)
    }
    for config in (config for path in FILES if path.parent.name == "sd15" for config in configs("sd15", path.stem)):
        sizes = {size for name, sides in layers.items() if name.endswith(TARGETS[config.targets]) for size in sides}
        assert all(size % (config.blocks or 1) == 0 for size in sizes)
        if isinstance(config, PerturbConfig):
            assert config.blocks == 1
            most = {"ether": 2.0, "ether+": math.sqrt(2), "oft": 2 * math.sqrt(min(sizes)) - 1e-6, "naive": math.inf}
            assert (config.distance or 0) <= most[config.method]


# --- What the paper has ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_the_tables_have_the_papers_rows(base):
    rows = ["full", "lora", "oft", "naive", "ether", "ether+one-sided", "ether+"]
    assert methods(sweep(base, "table2")) == rows
    table3 = sweep(base, "table3")
    assert methods(table3) == ["none", "lora", "oft", "oft+magnitude", "naive", "ether", "ether+"]
    assert Counter(run.config.seed for run in runs(table3)) == dict.fromkeys((0, 1, 2), 7)
    assert {run.config.targets for run in runs(table3)} == {"attention+geglu"}
    assert set(methods(sweep(base, "one-sided"))) >= {"ether+", "ether+one-sided"}
    assert {run.config.blocks for run in runs(sweep(base, "blocks"))} >= {1, 4}
    assert {run.config.method for run in runs(sweep(base, "cost"))} == set(METHODS)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("task", ["dreambooth", "s2i"])
def test_learning_rates_span_five_decades_for_every_method(base, task):
    found: dict[str, set[float]] = defaultdict(set)
    for run in runs(sweep(base, f"learning-rate-{task}")):
        found[run.config.method].add(run.config.learning_rate)
    assert set(found) == set(METHODS)
    assert len({frozenset(rates) for rates in found.values()}) == 1
    rates = found["ether+"]
    assert max(rates) / min(rates) >= 1e5 * (1 - 1e-9)
    if base == "sd15":  # where the paper's own rates are to lie among them
        own = [one.learning_rate if task == "dreambooth" else one.s2i_learning_rate for one in METHODS.values()]
        assert min(rates) <= min(own) <= max(own) <= max(rates)


def test_the_tables_subjects():
    assert set(subjects("tiny", "table2")) <= names("test")
    assert len(subjects("tiny", "table2")) >= 6
    assert set(subjects("sd15", "table2")) == set(SUBJECT_CLASSES)


# --- Fair ------------------------------------------------------------------------------------------------------------


def subjects(base: str, name: str) -> list[str]:
    return list(dict.fromkeys(run.config.subject for run in runs(sweep(base, name))))


def names(split: str) -> set[str]:
    return {name for name, subject in SUBJECTS.items() if subject.split == split}


def test_test_subjects_and_test_maps_are_for_the_tables_alone():
    for path in FILES:
        if path.parent.name == "tiny" and path.stem not in ("table2", "table3"):
            for config in configs("tiny", path.stem):
                if isinstance(config, S2IConfig):
                    assert config.dataset == "tiny-validation"
                else:
                    assert config.subject in names("validation")
    assert {run.config.dataset for run in runs(sweep("tiny", "table3"))} == {"tiny"}


@pytest.mark.parametrize("task", ["dreambooth", "s2i"])
def test_there_is_a_tiny_recipe_per_method(task):
    assert {path.stem for path in (CONFIGS / "tiny" / task).glob("*.yaml")} == set(RECIPES[task][1])


@pytest.mark.parametrize(("task", "method"), [(task, method) for task in RECIPES for method in RECIPES[task][1]])
def test_tiny_recipes_differ_in_the_method_and_its_rate_alone(task, method):
    path = CONFIGS / "tiny" / task / f"{method}.yaml"
    given = {"subject": "candy_ball"} if task == "dreambooth" else {}
    config = read_config(RECIPES[task][0], path, [], given)
    assert (config.base, config.method) == ("tiny", method)
    own = {"method", "blocks", "rank", "learning_rate"} | ({"encoder_learning_rate"} if method == "none" else set())
    written, other = (yaml.safe_load(one.read_text()) for one in (path, path.with_name("ether.yaml")))
    assert {key: value for key, value in written.items() if key not in own} == {
        key: value for key, value in other.items() if key not in own
    }
    if method != "none":
        defaults = METHODS[method].defaults
        assert (config.blocks, config.rank) == (defaults.blocks, defaults.rank)
        provisional = "provisional" in path.read_text()
        tried = {one.learning_rate for one in configs("tiny", f"learning-rate-{task}") if one.method == method}
        assert provisional or config.learning_rate in tried


def test_a_sweep_that_is_changed_wrongly_is_refused(tmp_path):
    """What the tests above rest on."""
    text = (CONFIGS / "sweeps/tiny/table2.yaml").read_text().replace("recipe: ../..", f"recipe: {CONFIGS}")
    (tmp_path / "wrong.yaml").write_text(text.replace("method: oft", "method: ofd"))
    with pytest.raises(UserError, match="ofd"):
        read_sweep(tmp_path / "wrong.yaml")
